"""Sums over runs of every length: full vectors, and the partial vector at the end."""

import pytest
from support import rng

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

import gpu_bn
from gpu_bn.kernels.cpu.vector import BYTES, WIDE

LONGEST = 2 * WIDE * BYTES // 4 + 1


def numbers(shape, seed, dtype):
    """Return integers, whose sums are exact."""
    return torch.from_numpy(rng(seed).integers(-8, 9, shape)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.one_in(4)
def test_runs_of_every_length_are_summed_whole(activation, dtype):
    for length in range(1, LONGEST):
        x, dy, residual = (numbers((9, 3, length), seed, dtype) for seed in range(3))
        _, saved = gpu_bn.batch_norm_forward(
            x, weight=torch.ones(3), bias=torch.zeros(3), residual=residual, training=True, activation=activation,
            backend="cpu",
        )  # fmt: skip
        assert torch.allclose(saved.moments.mean, x.double().mean((0, 2)), rtol=0, atol=1e-6)
        assert torch.allclose(saved.moments.var, x.double().var((0, 2), correction=0), rtol=1e-6)
        found = gpu_bn.batch_norm_backward(dy, saved, backend="cpu")
        assert torch.equal(found.dbias, found.dresidual.float().sum((0, 2)))
        assert activation != "identity" or torch.equal(found.dresidual, dy)
