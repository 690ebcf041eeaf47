"""Masks and ghost batches in the CUDA kernels: results, independence of the schedule, and bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from emulator import Checks, Device
from emulator.schedules import require_same_results
from support import same_bits
from support.cuda_masked import (
    COLUMNS,
    EVERYTHING,
    ROWS,
    TENSORS,
    Masked,
    check_masked,
    mask,
    problem_of,
    run,
    spec_of,
    work_of,
)
from support.cupy_on_emulator import misaligned_copy

from gpu_bn.backends.protocol import Moments
from gpu_bn.call import Call
from gpu_bn.plan import DEVICES, plan
from gpu_bn.testing import Case, build
from gpu_bn.testing.check import ADAPTERS

pytestmark = pytest.mark.compile
LONG, TALL = (8, 2, 64, 64), (2600, 16)
"""Shapes whose channels are shared by several blocks, even within one ghost batch."""
DTYPES = ("float32", "float16", "bfloat16", "float64")


def usual() -> Iterator[Masked]:
    """Yield each feature once: dtypes, layouts, vector tails, blocks that share a channel, masks, groups, options."""
    for dtype, shape in zip(DTYPES, (ROWS, COLUMNS) * 2, strict=True):
        yield Masked(Case(shape, dtype, activation="relu", residual=True))
    for dtype, shape in zip(DTYPES, (COLUMNS, ROWS) * 2, strict=True):
        yield Masked(Case(shape, dtype, activation="gelu"), "a group is empty", 3)
    for dtype, shape in zip(DTYPES[:2] * 2, ((6, 5, 3, 7), (60, 7), (5, 6, 2, 5), (3, 1, 50)), strict=True):
        yield Masked(Case(shape, dtype, activation="silu", residual=True))
    yield Masked(Case(LONG, activation="relu", residual=True), "few", 2)
    yield Masked(Case(TALL, "float16", activation="relu", residual=True))
    yield Masked(Case(TALL, "float64", mean=1e4, std=1), "last")
    yield Masked(Case(ROWS, mean=1e4, std=1), "half", 2)
    yield Masked(Case(ROWS, residual=True), "half", 2)
    yield Masked(Case(ROWS, activation="leaky_relu"), "one", 2)
    yield Masked(Case(COLUMNS, activation="leaky_relu"), "all")
    yield Masked(Case(COLUMNS, activation="leaky_relu"), "unmasked", 2)
    yield Masked(Case(ROWS, activation="leaky_relu"), "unmasked", 3)
    yield Masked(Case(ROWS, mode="eval", activation="relu", residual=True))
    yield Masked(Case(COLUMNS, "float16", mode="eval"), "half", 2)  # evaluation ignores groups
    yield Masked(Case(COLUMNS, mode="train_no_stats", affine="none"), "half", 2)
    for layout in ("channels_last", "fortran", "misaligned"):
        yield Masked(Case(ROWS, layout=layout, activation="relu", residual=True), "half", 3)


def more() -> Iterator[Masked]:
    for dtype, shape in product(DTYPES, (ROWS, COLUMNS)):
        yield Masked(Case(shape, dtype, activation="relu", residual=True))
        yield Masked(Case(shape, dtype, activation="gelu"), "a group is empty", 3)
    for kind, groups, shape in product(("one", "all"), (1, 2), (ROWS, COLUMNS)):
        yield Masked(Case(shape, activation="leaky_relu"), kind, groups)
    for dtype, shape, kind in product(("float32", "float64"), (ROWS, LONG, TALL), ("half", "last", "few")):
        yield Masked(Case(shape, dtype, mean=1e4, std=1), kind, 2)
    for layout, shape in product(("sliced", "negative_stride", "sliced_channels", "read_only"), (ROWS, COLUMNS)):
        yield Masked(Case(shape, layout=layout, activation="relu", residual=True), "half", 3)
    yield Masked(Case((4, 6, 9), activation="elu", channel_axis=-1), "half", 2)
    yield Masked(Case((5, 6, 9), activation="elu", channel_axis=0))


def everything() -> Iterator[Masked]:
    """Yield all combinations of shapes, dtypes, masks, groups and activations."""
    shapes = (ROWS, COLUMNS, (6, 5, 3, 7), (60, 7), (6, 1, 50), LONG, TALL)
    kinds = ("half", "few", "last", "one", "all", "a group is empty", "unmasked")
    calls = (("relu", True), ("identity", False), ("gelu_tanh", True))
    for shape, dtype, kind, groups, (activation, residual) in product(shapes, DTYPES, kinds, (1, 2), calls):
        yield Masked(Case(shape, dtype, activation=activation, residual=residual), kind, groups)


def cases() -> Iterator:
    seen = set()
    slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
    for some, marks in (
        (usual(), ([], exhaustive, slow, exhaustive)),
        (more(), (*[exhaustive] * 11, slow)),
        (everything(), (exhaustive,)),
    ):
        for index, masked in enumerate(some):
            if masked not in seen:
                yield pytest.param(masked, marks=marks[index % len(marks)], id=str(masked))
            seen.add(masked)


@pytest.mark.parametrize("masked", list(cases()))
def test_case(masked, make_gpu):
    gpu = make_gpu(90 if "half" in masked.mask else 80)
    check_masked(gpu, masked)
    two = 3 if masked.groups > 1 and masked.case.mode == "train" else 2  # a third kernel sums over the groups
    if masked.mask != "unmasked" and masked.case.mode != "eval":
        forward = sum("backward" not in name and "add_groups" not in name for name in gpu.launched)
        assert forward <= two
        assert len(gpu.launched) - forward <= 2 + (masked.groups > 1)


def test_the_cases_share_channels_among_blocks():
    for shape, groups in product((LONG, TALL), (1, 2)):
        found = plan(work_of(shape, 2, masked=True, groups=groups), DEVICES["h100"])
        assert found.tier == "split"
        assert found.blocks > 1


def test_a_mask_of_ones_gives_the_unmasked_results(make_gpu):
    """A mask of ones gives the unmasked results up to rounding errors, because it takes another first shift."""
    gpu = make_gpu(80, "split")
    problem, _ = problem_of(Masked(Case(ROWS, activation="gelu", residual=True), "unmasked"))
    valid = mask("all", problem.x.shape, 1, 1)
    plain, masked = run(gpu, problem, None), run(gpu, problem, valid)
    for name, want in plain.items():
        np.testing.assert_allclose(masked[name], want, rtol=1e-5, atol=1e-6)


OTHERS = ((ROWS, "unmasked"), (COLUMNS, "half"))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(ROWS, "half"), (COLUMNS, "unmasked"), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)],
    ids=str,
)
def test_groups_are_calls_in_turn(shape, kind, make_gpu):
    """Groups give the bits of separate calls; only sums over the groups may differ by rounding errors."""
    gpu = make_gpu(80, "split")
    problem, valid = problem_of(Masked(Case(shape, activation="relu", residual=True, param_dtype="float64"), kind, 3))
    together = run(gpu, problem, valid, 3)
    running = {name: getattr(problem, name) for name in ("running_mean", "running_var")}
    apart = []
    for g in range(3):
        part = slice(g * shape[0] // 3, (g + 1) * shape[0] // 3)
        tensors = {name: getattr(problem, name)[part] for name in ("x", "dy", "residual")}
        apart.append(run(gpu, replace(problem, **tensors, **running), None if valid is None else valid[part]))
        running = {name: apart[-1][name] for name in running}
    for name in (*TENSORS, "mean", "rstd"):
        assert same_bits(together[name], np.concatenate([results[name] for results in apart]))
    for name in ("dweight", "dbias"):
        np.testing.assert_allclose(together[name], sum(results[name] for results in apart), rtol=1e-14)
    for name, want in running.items():
        np.testing.assert_allclose(together[name], want, rtol=1e-14)


def saved_of(gpu, masked: Masked):
    """Return dy, and what a forward call saves and writes: of the fused call, and of the phases."""
    problem, valid = problem_of(masked)
    send, _ = ADAPTERS["cupy"]
    spec, backend = spec_of(problem, masked.groups), gpu.backend
    x, residual, weight, bias = (send(getattr(problem, name)) for name in ("x", "residual", "weight", "bias"))
    device_valid = None if valid is None else send(valid)
    fused_running, running = ([send(problem.running_mean.copy()), send(problem.running_var.copy())] for _ in range(2))
    y, saved = backend.forward(Call(x, weight, bias, residual, *fused_running, None, device_valid), spec)
    moments = backend.stats(x, spec.axis, device_valid, masked.groups)
    backend.update_running(moments, *running, spec.momentum)
    phased = replace(saved, residual=residual, mask=None, moments=moments)
    out = backend.empty_like(x)
    backend.normalize(phased, residual, out)
    return send(problem.dy), (saved, y, *fused_running), (phased, out, *running)


@pytest.mark.parametrize(
    ("layout", "kind", "groups"),
    [
        ("contiguous", "unmasked", 3),
        ("fortran", "half", 3),
        pytest.param("fortran", "half", 1, marks=pytest.mark.slow),
        pytest.param("contiguous", "half", 1, marks=pytest.mark.exhaustive),
        pytest.param("contiguous", "half", 3, marks=pytest.mark.slow),
        pytest.param("fortran", "unmasked", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_phases_give_what_the_fused_calls_give(layout, kind, groups, make_gpu):
    gpu = make_gpu(90)
    dy, (saved, *written), (phased, *phase_written) = saved_of(
        gpu, Masked(Case(ROWS, layout=layout, activation="relu", residual=True), kind, groups)
    )
    for fused, phase in zip(written, phase_written, strict=True):
        assert same_bits(np.array(fused), np.array(phase))
    dx, dweight, dbias, dresidual = gpu.backend.backward(dy, saved, EVERYTHING)
    dz, out = (gpu.backend.empty_like(dy) for _ in range(2))
    sums = gpu.backend.backward_reduce(dy, phased, dz)
    gpu.backend.backward_input(dy, phased, sums, out)
    assert same_bits(np.array(out), np.array(dx))
    assert same_bits(np.array(dz), np.array(dresidual))
    for gradient, total in ((dbias, sums.dz), (dweight, sums.dz_xhat)):
        want = np.array(total).reshape(groups, -1).sum(0)
        np.testing.assert_allclose(gradient, want.astype(gradient.dtype), rtol=1e-6)


@pytest.mark.parametrize("need", [{"dx"}, {"dweight"}, {"dbias"}, {"dresidual"}, {"dx", "dbias"}], ids=sorted)
def test_only_what_is_needed(need, make_gpu):
    gpu = make_gpu(80)
    dy, (saved, *_), _ = saved_of(gpu, Masked(Case(ROWS, activation="relu", residual=True), "half", 2))
    everything = gpu.backend.backward(dy, saved, EVERYTHING)
    some = gpu.backend.backward(dy, saved, frozenset(need))
    for name, gradient, want in zip(("dx", "dweight", "dbias", "dresidual"), some, everything, strict=True):
        assert (gradient is not None) == (name in need)
        assert gradient is None or same_bits(np.array(gradient), np.array(want))


@pytest.mark.parametrize("kind", ["half", "unmasked"])
def test_a_count_may_be_on_the_device(kind, make_gpu):
    """A count in device memory, such as the sum over all ranks, gives the results of the same number on the host."""
    gpu = make_gpu(80, "split")
    masked = Masked(Case(ROWS, activation="silu", residual=True), kind)
    dy, (saved, *_), (phased, *_) = saved_of(gpu, masked)
    moments, total = saved.moments, 1000
    known = replace(saved, moments=Moments(total, moments.mean, moments.var))
    counted = replace(saved, moments=Moments(gpu.asarray(np.array([total], np.float64)), moments.mean, moments.var))
    sums = gpu.backend.backward_reduce(dy, phased, None)
    results = []
    for record in (known, counted):
        out = gpu.backend.empty_like(dy)
        gpu.backend.backward_input(dy, record, sums, out)
        fused = gpu.backend.backward(dy, record, EVERYTHING)
        results.append([np.array(array) for array in (out, *fused)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    own = [np.array(array) for array in gpu.backend.backward(dy, saved, EVERYTHING)]
    assert np.abs(own[0] - results[0][0]).max() > 1e-3  # the count matters

    running = [[gpu.asarray(np.full(ROWS[1], value, np.float32)) for value in (0, 1)] for _ in range(2)]
    for record, pair in zip((known, counted), running, strict=True):
        gpu.backend.update_running(record.moments, *pair, 0.1)
    for one, other in zip(*running, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(("shape", "groups"), [(ROWS, 1), (COLUMNS, 1), ((8, 1, 16, 64), 1), (ROWS, 2)], ids=str)
def test_no_position_counts(shape, groups, make_gpu):
    gpu = make_gpu(80)
    nothing = Masked(Case(shape, activation="sigmoid", residual=True), "none", groups)
    results, (problem, _) = check_masked(gpu, nothing), problem_of(nothing)
    for name in ("y", "dx", "dresidual", "dweight", "dbias"):
        assert not results[name].any()
    assert same_bits(results["running_mean"], problem.running_mean)
    assert same_bits(results["running_var"], problem.running_var)


@pytest.mark.parametrize(
    "layout",
    ["misaligned", "uint8", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("strided", "transposed"))],
)
def test_masks_in_any_memory(layout, make_gpu):
    gpu = make_gpu(80)
    problem, valid = problem_of(Masked(Case(ROWS)))
    want = run(gpu, problem, valid)
    match layout:
        case "strided":
            odd = np.repeat(valid, 2, axis=-1)[..., ::2]
        case "misaligned":
            odd = misaligned_copy(gpu, valid)
        case "transposed":
            odd = np.asfortranarray(valid)
        case _:
            odd = valid.astype(np.uint8) * 255
    assert same_bits(run(gpu, problem, odd), want)


# --------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("masked", [
    Masked(Case((8, 1, 16, 16), layout="misaligned", activation="relu"), "half"),  # two blocks
    pytest.param(Masked(Case((8, 1, 32, 64), activation="relu"), "half", 2), marks=pytest.mark.exhaustive),
    pytest.param(Masked(Case((1200, 16), activation="relu"), "half"), marks=pytest.mark.exhaustive),
], ids=str)  # fmt: skip
def test_results_do_not_depend_on_the_schedule(masked, make_gpu):
    problem, valid = problem_of(masked)

    def results(device: Device) -> list[np.ndarray]:
        found = run(make_gpu(90, None, device), problem, valid, masked.groups)
        assert {"y", "mean", "rstd", "running_var", "dx", "dweight", "dbias"} <= found.keys()
        return list(found.values())

    require_same_results(results, range(2), Device(checks=Checks(races=False)))


# ------------------------------------------------------------------------------------------------- traffic
L2 = 64 << 10
ARGUMENTS = {
    "stats": {"x": 0},
    "normalize": {"x": 0, "y": 1, "residual": 2, "mask": 3},
    "backward": {"x": 0, "dy": 1, "residual": 2, "mask": 3, "dx": 4, "dresidual": 5},
}
"""The positions of tensors among the arguments of a kernel; ``valid`` is the last but one."""


def traffic(gpu, launched: int) -> tuple[Counter, Counter]:
    """Return the bytes that the last launches loaded and stored, by tensor."""
    loads, stores = Counter(), Counter()
    for report, name in zip(gpu.device.reports[-launched:], gpu.launched[-launched:], strict=True):
        kind = next(kind for kind in ARGUMENTS if f"bn_{kind}" in name)
        valid = len(report.kernel.parameters) - 2
        for tensor, position in {**ARGUMENTS[kind], "valid": valid}.items():
            loads[tensor] += report.buffer(f"arg{position}", "load").bytes
            stores[tensor] += report.buffer(f"arg{position}", "store").bytes
    return +loads, +stores


@pytest.mark.parametrize(("shape", "dtype"), [((4, 4, 1024), "float32"), ((1024, 32), "float16")], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_each_tensor_is_read_and_written_as_planned(shape, dtype, groups, make_gpu):
    """Tensors move exactly the planned bytes. Each strip loads the mask, but memory delivers it once per pass."""
    checks = Checks(races=False, initialised=False)
    gpu = make_gpu(80, None, Device(checks=checks, l2_bytes=L2))
    problem = build(Case(shape, dtype, activation="relu", residual=True))
    send, _ = ADAPTERS["cupy"]
    valid = send(mask("all", shape, 1, groups))
    x, residual, dy = (send(getattr(problem, name)) for name in ("x", "residual", "dy"))
    y, saved = gpu.backend.forward(Call(x, residual=residual, valid=valid), spec_of(problem, groups))
    assert saved.mask is not None
    size, bits, positions = y.nbytes, saved.mask.nbytes, valid.nbytes
    forward = plan(work_of(shape, y.itemsize, reads=2, sign_bits=True, masked=True, groups=groups), DEVICES["a100"])
    assert forward.read_bytes == (size + positions, 2 * size + positions)
    assert sum(forward.written_bytes) == size + bits
    loads, stores = traffic(gpu, 2)
    strips = 1 if shape == (1024, 32) else shape[1]
    assert stores == {"y": size, "mask": bits}
    assert loads["residual"] == size
    assert loads["x"] > 2 * size  # plus samples
    gpu.backend.backward(dy, saved, frozenset({"dx", "dresidual"}))
    loads, stores = traffic(gpu, 2)
    work = work_of(
        shape, y.itemsize, backward=True, reads=2, staged=2, writes=2, sign_bits=True, masked=True, groups=groups
    )
    backward = plan(work, DEVICES["a100"])
    lanes = 1 if backward.tiling.columns is False else backward.tiling.lanes
    assert loads == {"x": 2 * size, "dy": 2 * size, "mask": 2 * bits, "valid": 2 * strips * lanes * positions}
    assert stores == {"dx": size, "dresidual": size}
    assert sum(loads.values()) - loads["valid"] + 2 * positions == sum(backward.read_bytes)
    assert sum(stores.values()) == sum(backward.written_bytes)
    dram = sum(report.dram_read_bytes for report in gpu.device.reports[-2:])
    vectors = 12 * (8 * groups * shape[1] + 64) + 2 * (8 * backward.partials + 64)
    assert dram <= sum(backward.read_bytes) + vectors
