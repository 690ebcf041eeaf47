"""The separate launch that merges partial results where double precision is slow, and these partial results."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import RecordingBackend
from support.triton_variants import record_launches

from gpu_bn.backends.triton import programs
from gpu_bn.plan import DEVICES

STATISTICS, SUMS = "bn_stats_kernel", "bn_backward_reduce_kernel"


def launches(arch, shape=(64, 5, 64, 64), dtype=torch.float16, **options):
    """Return the launches of a call by the name of the kernel: the step and the specialisation of each."""
    found = record_launches(torch.empty(shape, dtype=dtype), arch, sms=32, activation="relu", **options)
    return {step.kernel.__name__: (step, special) for step, special in found}


@pytest.mark.parametrize(
    ("arch", "dtype", "chain", "planes", "left"),
    [
        (89, "float16", programs.CHAIN, 4, "float32"),
        (120, "float32", programs.CHAIN, 4, "float32"),
        (75, "bfloat16", programs.CHAIN, 4, "float32"),
        (89, "float16", 1, 2, "float64"),
        (89, "float64", programs.CHAIN, 2, "float64"),
        (80, "float16", programs.CHAIN, 2, "float64"),
    ],
)
def test_blocks_leave_sums_in_float32_where_these_are_and_double_precision_is_slow(
    arch, dtype, chain, planes, left, monkeypatch
):
    monkeypatch.setattr(programs, "CHAIN", chain)
    found = launches(arch, dtype=getattr(torch, dtype))
    for kernel, numbers in ((STATISTICS, planes), (SUMS, 2)):
        step, special = found[kernel]
        assert step.partials == ((numbers, step.grid[1], 5), getattr(torch, left))
        assert special.signature["partials"] == {"float32": "*fp32", "float64": "*fp64"}[left]


def test_with_a_mask_blocks_leave_their_counts_too():
    backend, made = RecordingBackend(DEVICES["4090"]), []
    allocate = backend.new
    backend.new = lambda shape, *form: made.append((shape, form[1])) or allocate(shape, *form)
    x = torch.empty((64, 5, 64, 64))
    for valid in (torch.ones((64, 1, 64, 64), dtype=torch.uint8), None):
        backend.stats(x, 1, valid)
    assert [(shape[0], dtype) for shape, dtype in made if len(shape) == 3] == [(5, torch.float32), (4, torch.float32)]


@pytest.mark.parametrize("shape", [(64, 5, 64, 64), (256, 512, 49), (2000, 40, 1), (64, 1, 1 << 16)], ids=str)
def test_one_warp_merges_a_few_channels_side_by_side(shape):
    """Work in double precision is done once, and each thread does it for few blocks."""
    found = launches(89, shape)
    for kernel, before in (("bn_merge_moments_kernel", STATISTICS), ("bn_merge_sums_kernel", SUMS)):
        step, special = found[kernel]
        at_once, side_by_side = (special.constants[name] for name in ("CHUNK", "LANES"))
        assert step.num_warps == step.grid[1] == 1
        assert at_once * side_by_side <= 32 * programs.MERGED_AT_ONCE
        assert step.grid[0] == -(-shape[1] // side_by_side)
        assert side_by_side == 32 or at_once * side_by_side == 32 * programs.MERGED_AT_ONCE
        assert at_once < 2 * found[before][0].grid[1]
