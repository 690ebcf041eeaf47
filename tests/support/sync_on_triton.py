"""Run the operators of SyncBatchNorm on the Triton backend, in Triton's interpreter; parts stand for processes.

This is a process of its own, with ``TRITON_INTERPRET=1``. It prints how many comparisons with the whole batch it made.
"""

import torch
from torch.testing import assert_close

from gpu_bn import nn, registry
from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.nn.operators import sync as phases

SERVING = registry.serving
TRITON = TritonBackend()
registry.serving = lambda *_: TRITON


def compare(sizes, activation, dtype):
    """Compare phases on parts with a layer on the whole, which NumPy computes."""
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(sum(sizes), 3, 4, dtype=torch.float64).mul(2).add(5).to(dtype) for _ in range(3))
    weight, bias = torch.rand(3), torch.randn(3)
    parts = [tuple(whole.split(sizes)[at] for whole in (x, residual, dy)) for at in range(len(sizes))]
    reports = torch.stack([phases.report(part, None) for part, _, _ in parts])
    count, mean, var = phases.merge_reports(reports)
    layers = [(part, weight, bias, rest, None, count, mean, var, 1e-5, activation, 0.0) for part, rest, _ in parts]
    reduced = [phases.reduce(part[2], *layer, True) for part, layer in zip(parts, layers, strict=True)]
    sums = sum(found[0] for found in reduced)
    dx = [phases.backward_input(part[2], *layer, sums, None) for part, layer in zip(parts, layers, strict=True)]
    y = torch.cat([phases.normalize(*layer) for layer in layers])
    results = (y, torch.cat(dx), sums[1].float(), sums[0].float(), torch.cat([found[1] for found in reduced]))

    registry.serving = SERVING
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, residual)]
    expected = nn.batch_norm(*inputs[:1], None, None, *inputs[1:3], True, residual=inputs[3], activation=activation)
    gradients = torch.autograd.grad(expected, inputs, dy)
    registry.serving = lambda *_: TRITON
    for mine, other in zip(results, (expected.detach(), *gradients), strict=True):
        assert_close(
            mine, other, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-2 if dtype.itemsize == 2 else 1e-4
        )
    return len(results)


if __name__ == "__main__":
    print(compare((3, 5), "relu", torch.float32) + compare((6, 0, 1), "silu", torch.float16))
