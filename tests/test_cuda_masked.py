"""Masks and ghost batches in the CUDA kernels, on emulated GPUs; the truth is the oracle's for what counts of a group.

Whatever does not count is NaN, in the input, the residual and the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from cuda_variants import FAMILY
from emulator import Checks, Device, EmulatorError
from emulator.compile import ARCHITECTURES
from emulator.schedules import require_same_results
from gates import Group
from support import rng, same_bits
from test_cuda_gates import FULL

from gpu_bn.activations import Activation
from gpu_bn.backends._layout import Layout
from gpu_bn.backends.protocol import Moments
from gpu_bn.plan import DEVICES, Work, plan
from gpu_bn.spec import BatchNormSpec
from gpu_bn.testing import Case, Problem, build
from gpu_bn.testing.check import ADAPTERS, compare
from gpu_bn.testing.oracle import WIDE, oracle, wide
from gpu_bn.testing.tolerance import ROUNDOFF, tolerance

pytestmark = pytest.mark.compile
TENSORS = ("y", "dx", "dresidual")
EVERYTHING = frozenset({"dx", "dweight", "dbias", "dresidual"})


# ------------------------------------------------------------------------------------------------ problems
@dataclass(frozen=True)
class Masked:
    """A case of the conformance suite, which positions of it count (:func:`mask`), and its groups."""

    case: Case
    mask: str = "half"
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.case} {self.mask}{f' in {self.groups} groups' if self.groups > 1 else ''}".replace(" ", "-")


def mask(kind: str, shape: tuple[int, ...], axis: int, groups: int) -> np.ndarray | None:
    """Which positions count, True for those; of extent 1 along the channels."""
    shape = tuple(1 if a == axis else size for a, size in enumerate(shape))
    valid = np.zeros(shape, bool)
    match kind:
        case "all":
            valid[...] = True
        case "half":
            valid = rng(3).random(shape) < 0.5
        case "few":
            valid = rng(3).random(shape) < 0.02
        case "last":  # padding first, so that nothing at the start of a share helps to guess the mean
            valid[len(valid) // 2 :] = True
        case "a group is empty":
            valid = rng(3).random(shape) < 0.7
            valid[len(valid) // groups : 2 * len(valid) // groups] = False
        case "none":
            pass
        case "one":
            valid.reshape(-1)[valid.size * 2 // 3] = True
        case "unmasked":
            return None
    return valid


def problem_of(masked: Masked) -> tuple[Problem, np.ndarray | None]:
    """The problem, with NaN wherever nothing counts, and the mask."""
    problem = build(masked.case)
    valid = mask(masked.mask, problem.x.shape, problem.channel_axis % problem.x.ndim, masked.groups)
    if valid is None:
        return problem, None
    poisoned = {}
    for name in ("x", "dy", "residual"):
        if (array := getattr(problem, name)) is not None:
            poisoned[name] = array.copy("K")
            poisoned[name][np.broadcast_to(~valid, array.shape)] = np.nan
    return replace(problem, **poisoned), valid


def parts(problem: Problem, valid: np.ndarray | None, groups: int) -> Iterator[tuple[np.ndarray, Problem]]:
    """What counts of each group: where it is, with the channels last, and a problem of that alone."""
    axis = problem.channel_axis
    everywhere = np.ones([1 if a == axis % problem.x.ndim else size for a, size in enumerate(problem.x.shape)], bool)
    positions = np.moveaxis(everywhere if valid is None else valid, axis, -1)[..., 0]
    for group in range(groups):
        chosen = np.zeros_like(positions)
        size = len(chosen) // groups
        part = slice(group * size, (group + 1) * size)
        chosen[part] = positions[part]
        tensors = {
            name: None if (array := getattr(problem, name)) is None else np.moveaxis(array, axis, -1)[chosen]
            for name in ("x", "dy", "residual")
        }
        running = {"running_mean": None, "running_var": None} if problem.training else {}
        yield chosen, replace(problem, channel_axis=1, **tensors, **running)


def truth_of(problem: Problem, valid: np.ndarray | None, groups: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a call should give, and the error allowed in it."""
    axis, u, momentum = problem.channel_axis, WIDE(ROUNDOFF[str(problem.x.dtype)]), WIDE(problem.momentum)
    groups = groups if problem.training else 1
    found = {name: np.zeros((2, *np.moveaxis(problem.x, axis, -1).shape), WIDE) for name in TENSORS}
    channels = problem.x.shape[axis]
    sums = {name: np.zeros((2, channels), WIDE) for name in ("dweight", "dbias")}
    statistics = {name: [np.zeros((2, channels), WIDE)] * groups for name in ("mean", "rstd")}
    tracked = {}
    if problem.running_mean is not None:
        old = {"mean": wide(problem.running_mean), "var": wide(problem.running_var)}
        tracked = {name: np.stack([value, 2 * u * np.abs(value)]) for name, value in old.items()}
    for group, (chosen, part) in enumerate(parts(problem, valid, groups)):
        if not len(part.x):
            statistics["rstd"][group] = np.stack([np.full(channels, 1 / np.sqrt(WIDE(problem.eps)))] * 2)
            continue
        truth = oracle(part)
        allowed = tolerance(part, truth)
        for name in TENSORS:
            if getattr(truth, name) is not None:
                found[name][:, chosen] = np.stack([getattr(truth, name), np.broadcast_to(allowed[name], part.x.shape)])
        for name, total in sums.items():
            if getattr(truth, name) is not None:
                total += np.stack([getattr(truth, name), allowed[name]])
        for name, each in statistics.items():
            each[group] = np.stack([getattr(truth, name), allowed[name]])
        if problem.training and tracked:
            n = len(part.x)
            var = truth.var * n / max(n - 1, 1), 2 * (allowed["rstd"] / truth.rstd + u) * truth.var * 2
            mean = truth.mean, allowed["mean"] + 2 * u * np.abs(truth.mean)
            for name, new in (("mean", mean), ("var", var)):
                tracked[name] = (1 - momentum) * tracked[name] + momentum * np.stack(new)
    results = {name: np.moveaxis(value, -1, problem.channel_axis % problem.x.ndim + 1) for name, value in found.items()}
    results |= sums | {name: np.concatenate(each, axis=-1) for name, each in statistics.items()}
    results |= {f"running_{name}": value for name, value in tracked.items()}
    return {name: (value[0], value[1]) for name, value in results.items()}


def work_of(shape: tuple[int, ...], itemsize: int, **options) -> Work:
    layout = Layout.of(np.empty(shape, np.uint8), 1)
    return Work(layout.n, layout.c, layout.s, itemsize, **options)


def spec_of(problem: Problem, groups: int = 1) -> BatchNormSpec:
    axis = problem.channel_axis % problem.x.ndim
    return BatchNormSpec(axis, problem.training, problem.momentum, problem.eps, Activation(*problem.activation), groups)


def run(gpu, problem: Problem, valid: np.ndarray | None, groups: int = 1) -> dict[str, np.ndarray]:
    """What the backend's fused calls give, by name."""
    send, receive = ADAPTERS["cupy"]
    names = ("running_mean", "running_var", "weight", "bias", "residual")
    sent = [None if (a := getattr(problem, name)) is None else send(a.copy("K")) for name in names]
    y, saved = gpu.backend.forward(
        send(problem.x), spec_of(problem, groups), *sent, None, valid=None if valid is None else send(valid)
    )
    need = EVERYTHING - {f"d{name}" for name, array in zip(names, sent, strict=True) if array is None}
    grads = gpu.backend.backward(send(problem.dy), saved, need)
    found = {"y": y, "mean": saved.mean, "rstd": saved.rstd}
    found |= dict(zip(("dx", "dweight", "dbias", "dresidual"), grads, strict=True))
    found |= dict(zip(names[:2], sent[:2], strict=True))
    if valid is not None and problem.training:
        assert saved.moments.count.dtype == np.float64
        expected = [len(part.x) for _, part in parts(problem, valid != 0, groups)]
        assert list(receive(saved.moments.count)) == expected
    return {name: receive(array) for name, array in found.items() if array is not None}


def check_masked(gpu, masked: Masked) -> dict[str, np.ndarray]:
    """Compare all that a call gives with the truth; zeros must be zeros where nothing counts."""
    problem, valid = problem_of(masked)
    results = run(gpu, problem, valid, masked.groups)
    truth = truth_of(problem, valid, masked.groups)
    assert {"y", "mean", "rstd", "dx"} <= results.keys()
    for name, got in results.items():
        compare(f"{masked}: {name}", got, *truth[name])
        if name in TENSORS:
            assert got.dtype == problem.x.dtype
            assert valid is None or not got[np.broadcast_to(~valid, got.shape)].any()
    return results


# ------------------------------------------------------------------------------------------------ results
ROWS, COLUMNS = (6, 5, 4, 8), (60, 24)
LONG, TALL = (8, 2, 64, 64), (2600, 16)
"""Channels that several blocks share, also of one group."""
DTYPES = ("float32", "float16", "bfloat16", "float64")


def usual() -> Iterator[Masked]:
    """Each feature once: dtypes, layouts, vectors and tails, blocks that share a channel, masks, groups, options."""
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
    yield Masked(Case(COLUMNS, "float16", mode="eval"), "half", 2)  # groups do not matter here
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
    """All of dtypes, layouts, masks and groups."""
    shapes = (ROWS, COLUMNS, (6, 5, 3, 7), (60, 7), (6, 1, 50), LONG, TALL)
    kinds = ("half", "few", "last", "one", "all", "a group is empty", "unmasked")
    calls = (("relu", True), ("identity", False), ("gelu_tanh", True))
    for shape, dtype, kind, groups, (activation, residual) in product(shapes, DTYPES, kinds, (1, 2), calls):
        yield Masked(Case(shape, dtype, activation=activation, residual=residual), kind, groups)


def cases() -> Iterator:
    seen = set()
    for some, marks in ((usual(), []), (more(), [pytest.mark.slow]), (everything(), [pytest.mark.exhaustive])):
        for masked in some:
            if masked not in seen:
                yield pytest.param(masked, marks=marks, id=str(masked))
            seen.add(masked)


@pytest.mark.parametrize("masked", list(cases()))
def test_case(masked, make_gpu):
    gpu = make_gpu(90 if "half" in masked.mask else 80)
    check_masked(gpu, masked)
    two = 3 if masked.groups > 1 and masked.case.mode == "train" else 2  # and one for the C-sized rest of groups
    if masked.mask != "unmasked" and masked.case.mode != "eval":
        forward = sum("backward" not in name and "add_groups" not in name for name in gpu.launched)
        assert forward <= two
        assert len(gpu.launched) - forward <= 2 + (masked.groups > 1)


def test_the_cases_share_channels_among_blocks():
    for shape, groups in product((LONG, TALL), (1, 2)):
        found = plan(work_of(shape, 2, masked=True, groups=groups), DEVICES["h100"])
        assert found.tier == "split"
        assert found.blocks > 1


def test_what_does_not_count_could_as_well_be_absent(make_gpu):
    """A mask of all positions gives the unmasked call's results, but for roundings: another guess of the mean."""
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
    """Bit for bit, but for what is added up over the groups."""
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
    """A forward call's record, by the fused call and by the phases, with what they wrote."""
    problem, valid = problem_of(masked)
    send, _ = ADAPTERS["cupy"]
    spec, backend = spec_of(problem, masked.groups), gpu.backend
    x, residual, weight, bias = (send(getattr(problem, name)) for name in ("x", "residual", "weight", "bias"))
    device_valid = None if valid is None else send(valid)
    fused_running, running = ([send(problem.running_mean.copy()), send(problem.running_var.copy())] for _ in range(2))
    y, saved = backend.forward(x, spec, *fused_running, weight, bias, residual, None, valid=device_valid)
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
        pytest.param("contiguous", "half", 1, marks=pytest.mark.slow),
        pytest.param("contiguous", "half", 3, marks=pytest.mark.slow),
        pytest.param("fortran", "unmasked", 3, marks=pytest.mark.slow),
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
    gpu.backend.backward_input(dy, phased, sums, out, dz)
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
    """As the count over all ranks is: without a mask, and instead of a mask's own."""
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
        gpu.backend.backward_input(dy, record, sums, out, None)
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


def test_no_position_counts(make_gpu):
    gpu = make_gpu(80)
    nothing = Masked(Case(ROWS, activation="sigmoid", residual=True), "none", 2)
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
            odd = np.frombuffer(b"\0" + valid.tobytes(), bool)[1:].reshape(valid.shape)
        case "transposed":
            odd = np.asfortranarray(valid)
        case _:
            odd = valid.astype(np.uint8) * 255
    assert same_bits(run(gpu, problem, odd), want)


# --------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("masked", [
    Masked(Case((8, 1, 16, 16), layout="misaligned", activation="relu"), "half"),  # two blocks
    pytest.param(Masked(Case((8, 1, 32, 64), activation="relu"), "half", 2), marks=pytest.mark.slow),
    pytest.param(Masked(Case((1200, 16), activation="relu"), "half"), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_results_do_not_depend_on_the_schedule(masked, make_gpu):
    problem, valid = problem_of(masked)

    def results(device: Device) -> list[np.ndarray]:
        found = run(make_gpu(90, None, device), problem, valid, masked.groups)
        assert {"y", "mean", "rstd", "running_var", "dx", "dweight", "dbias"} <= found.keys()
        return list(found.values())

    require_same_results(results, range(2), Device(checks=Checks(races=False)))


# ------------------------------------------------------------------------------------------------- faults
LONGER = Masked(Case((8, 1, 64, 64), activation="relu"), "half")
GROUPED = Masked(Case(ROWS, activation="relu", residual=True), "a group is empty", 3)
FAULTS = {
    "mask dropped in the sums": ("const A d = selected[j] ?", "const A d = true ?", Masked(Case(ROWS))),
    "mask dropped in the sums of the backward pass": (
        "return at.selected[j] ? dz_of_any", "return true ? dz_of_any", Masked(Case(ROWS))),
    "mask dropped in x - centre": ("return at.selected[j] ? affine", "return true ? affine", Masked(Case(ROWS))),
    "mask dropped in y": ("selected[j] ? Activation::value", "true ? Activation::value", Masked(Case(ROWS))),
    "mask dropped in dx": ("at.selected[j] ? dxj", "true ? dxj", Masked(Case(ROWS))),
    "mask dropped in dx of frozen statistics": (
        "at.selected[j] ? g[j] * affine", "true ? affine.centred(j, at.x[j]) * affine",
        Masked(Case(ROWS, mode="eval"))),
    "shift from what does not count": ("if (selected[j]) sum", "sum", Masked(Case(ROWS))),
    "origins of blocks not told apart": ("return (origin_of(r, place) - origin) +", "return", LONGER),
    "a bad shift is not noticed": (
        "if (!__syncthreads_or(again) || attempt == 3) return n;", "__syncthreads_or(again); return n;",
        Masked(Case((8, 1, 64, 64), mean=1e4, std=1), "few")),
    "counts of blocks not merged": ("n[0] += of(r)", "n[0] = r ? n[0] : of(r)", LONGER),
    "means of blocks weighted by their shape": (
        "mean[0] += shares.of(r)", "mean[0] += tile.elements_of(r)", Masked(LONGER.case, "few")),
    "idle lanes counted": ("tile.lane ? 0. : d.count", "d.count", Masked(Case((60, 24)))),
    "count not written": ("selection.counts[tile.group] = n;", ";", LONGER),
    "count of the first group for all": ("selection.counts[tile.group], 1.", "selection.counts[0], 1.", GROUPED),
    "stride of groups wrong": ("(L::COLUMNS ? g.inner : g.channels)", "g.inner", GROUPED),
    "mask of the first group for all": ("(tile.group * tile.g.positions + in_strip)", "in_strip", GROUPED),
    "statistics of the first group for all": (
        "(i64)group * g.channels + channel : channel", "channel : channel", GROUPED),
    "tickets of the first group for all": (
        "counters += tile.group * tile.g.strips;", "", Masked(Case((8, 1, 64, 64)), "half", 2)),
    "empty group moves the running statistics": ("if (n == 0.) continue;", "", GROUPED),
    "empty batch moves the running statistics": ("if (!L::MASKED || n > 0) per", "per", Masked(Case(ROWS), "none")),
    "groups added up but for the first": (
        "dz_xhat = 0;\n  for (u32 group = 0", "dz_xhat = 0;\n  for (u32 group = 1", GROUPED),
    "running variance of groups without Bessel": (
        "m * (n > 1. ? n / (n - 1.) : 1.) * var[", "m * var[", GROUPED),
}  # fmt: skip


SHORT = (
    "mask dropped in the sums", "mask dropped in the sums of the backward pass", "counts of blocks not merged",
    "idle lanes counted", "stride of groups wrong", "mask of the first group for all",
    "empty group moves the running statistics", "groups added up but for the first",
)  # fmt: skip
"""What a normal run plants."""


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in SHORT else [pytest.mark.slow]) for fault in FAULTS]
)
def test_a_planted_fault_is_reported(fault, make_gpu, caught_faults):
    old, new, masked = FAULTS[fault]

    def edit(source: str) -> str:
        assert old in source, f"the kernels no longer hold {old!r}"
        return source.replace(old, new)

    gpu = make_gpu(90, None, Device(max_steps=50_000))
    gpu.edit_source = edit
    with pytest.raises((AssertionError, EmulatorError)) as caught:
        check_masked(gpu, masked)
    assert "no longer hold" not in str(caught.value)
    caught_faults[f"CUDA, masked: {fault}"] = str(caught.value).partition("\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("masked", dict.fromkeys(masked for _, _, masked in FAULTS.values()), ids=str)
def test_the_kernels_without_faults_are_clean(masked, make_gpu):
    check_masked(make_gpu(90), masked)


# --------------------------------------------------------------------------------------------------- gates
def gates() -> Iterator:
    """Full vectors in each dtype and layout on all architectures, then narrower ones; one set in a normal run."""
    for arch, dtype, columns, batch in product(ARCHITECTURES, FULL, (False, True), ("MASKED_GROUPS", "GROUPS")):
        usual = (arch, dtype, columns, batch) == (90, "float16", True, "MASKED_GROUPS")
        slow = batch == "MASKED_GROUPS" and dtype in ("float16", "float64") and arch in (75, 80, 90)
        marks = [] if usual else [pytest.mark.slow if slow else pytest.mark.exhaustive]
        group = Group(arch, "gelu" if arch != 80 else "relu", dtype, FULL[dtype], columns, batch)
        yield pytest.param(group, id=str(group), marks=marks)
    for arch, dtype, vector, columns in product((75, 90, 120), ("float16", "float32"), (1, 2, 4), (False, True)):
        group = Group(arch, "gelu", dtype, vector, columns, "MASKED_GROUPS")
        yield pytest.param(group, id=str(group), marks=pytest.mark.exhaustive)


@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize("group", list(gates()))
def test_gates(group):
    """No spills, no stack, the registers and the shared memory of the unmasked kernels, full vectors."""
    FAMILY.check(group)


# ------------------------------------------------------------------------------------------------- traffic
L2 = 64 << 10
ARGUMENTS = {
    "stats": {"x": 0},
    "normalize": {"x": 0, "y": 1, "residual": 2, "mask": 3},
    "backward": {"x": 0, "dy": 1, "residual": 2, "mask": 3, "dx": 4, "dresidual": 5},
}
"""Where the tensors are among a kernel's arguments; ``valid`` is the last but one."""


def traffic(gpu, launched: int) -> tuple[Counter, Counter]:
    """The bytes that the last launches asked for and stored, by tensor."""
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
    """Tensors to the byte. Each strip reads its mask, a byte a position; from memory the mask comes once a pass."""
    checks = Checks(races=False, initialised=False)
    gpu = make_gpu(80, None, Device(checks=checks, l2_bytes=L2))
    problem = build(Case(shape, dtype, activation="relu", residual=True))
    send, _ = ADAPTERS["cupy"]
    valid = send(mask("all", shape, 1, groups))
    x, residual, dy = (send(getattr(problem, name)) for name in ("x", "residual", "dy"))
    y, saved = gpu.backend.forward(x, spec_of(problem, groups), None, None, None, None, residual, None, valid=valid)
    assert saved.mask is not None
    size, bits, positions = y.nbytes, saved.mask.nbytes, valid.nbytes
    forward = plan(work_of(shape, y.itemsize, reads=2, mask=True, masked=True, groups=groups), DEVICES["a100"])
    assert forward.read_bytes == (size + positions, 2 * size + positions)
    assert sum(forward.written_bytes) == size + bits
    loads, stores = traffic(gpu, 2)
    strips = 1 if shape == (1024, 32) else shape[1]
    assert stores == {"y": size, "mask": bits}
    assert loads["residual"] == size
    assert loads["x"] > 2 * size  # and samples
    gpu.backend.backward(dy, saved, frozenset({"dx", "dresidual"}))
    loads, stores = traffic(gpu, 2)
    work = work_of(shape, y.itemsize, backward=True, reads=2, staged=2, writes=2, mask=True, masked=True, groups=groups)
    backward = plan(work, DEVICES["a100"])
    lanes = 1 if backward.tiling.columns is False else backward.tiling.lanes
    assert loads == {"x": 2 * size, "dy": 2 * size, "mask": 2 * bits, "valid": 2 * strips * lanes * positions}
    assert stores == {"dx": size, "dresidual": size}
    assert sum(loads.values()) - loads["valid"] + 2 * positions == sum(backward.read_bytes)
    assert sum(stores.values()) == sum(backward.written_bytes)
    dram = sum(report.dram_read_bytes for report in gpu.device.reports[-2:])
    vectors = 12 * (8 * groups * shape[1] + 64) + 2 * (8 * backward.partials + 64)
    assert dram <= sum(backward.read_bytes) + vectors
