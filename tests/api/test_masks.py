"""Masks, ghost batches and batch renormalisation on arrays: their definition, and every refused call."""

from dataclasses import replace

import numpy as np
import pytest
from support import rng, running_pair, same_bits

import gpu_bn
from gpu_bn.backends.numpy import NumpyBackend
from gpu_bn.testing import Case, build, check, extended_cases, oracle
from gpu_bn.testing.cases import MASKS
from gpu_bn.testing.check import compare
from gpu_bn.testing.oracle import Problem
from gpu_bn.testing.tolerance import tolerance

SHAPE = (6, 3, 4, 50)
NAMES = "y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"


def data(shape=SHAPE, count=3):
    return rng().standard_normal((count, *shape)).astype(np.float32)


def parameters(channels=3):
    return [*running_pair(channels), np.linspace(0.5, 2, channels, dtype=np.float32), np.ones(channels, np.float32)]


def call(x, dy, residual, vectors, **options):
    """Return y and all gradients."""
    y, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True, residual=residual, activation="silu", **options)
    return y, *gpu_bn.batch_norm_backward(dy, saved, backend=options.get("backend"))


def test_the_cases_cover_all_masks():
    assert {case.mask for case in extended_cases()} == {None, *MASKS}
    assert {case.dtype for case in extended_cases() if case.mask} == {"float16", "bfloat16", "float32", "float64"}


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("shape", [SHAPE, (40, 3, 10, 50)], ids=str)
def test_a_mask_is_as_if_the_rest_were_not_there(shape, backend):
    """A masked call and a call with only the valid positions both meet the accuracy contract.

    They are not compared bit for bit: where a mean nearly cancels, two valid results may differ by more than an ulp.
    """
    x, dy, residual = data(shape)
    mask = rng(1).random((shape[0], 1, *shape[2:])) < 0.5
    valid = [np.moveaxis(array, 1, -1)[mask[:, 0]] for array in (x, dy, residual)]
    problem = Problem(*valid[:2], *parameters(), True, 0.1, 1e-5, valid[2], ("silu", 1.0), 1)
    truth = oracle(problem)
    allowed = tolerance(problem, truth)
    for tensors, options in (((x, dy, residual), {"mask": mask}), (valid, {})):
        vectors = parameters()
        got = call(*tensors, vectors, backend=backend, **options)
        for name, a in zip(NAMES, (*got, *vectors), strict=False):
            if a.ndim > 2:
                assert not np.where(mask, 0, a).any()
                a = np.moveaxis(a, 1, -1)[mask[:, 0]]
            compare(name, a, getattr(truth, name), allowed[name])


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (40, 3, 10, 50)], ids=str)
def test_what_a_mask_hides_is_never_used(shape, training, activation):
    mask = rng(1).random((shape[0], *shape[2:])) < 0.5
    results = []
    for garbage in (0, np.nan, np.inf):
        tensors = [np.where(mask[:, None], array, np.float32(garbage)) for array in data(shape)]
        vectors = parameters()
        y, saved = gpu_bn.batch_norm_forward(
            tensors[0], *vectors, training=training, residual=tensors[2], activation=activation, mask=mask
        )
        results.append([y, *gpu_bn.batch_norm_backward(tensors[1], saved), *vectors])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["full", "no channel axis", "extents of 1", "uint8", "strided", "last channel"])
def test_masks_of_every_form_mean_the_same(kind):
    x, dy, residual = data()
    lengths = rng(1).random((SHAPE[0], 1, 1, SHAPE[3])) < 0.5
    full = np.broadcast_to(lengths, (SHAPE[0], 1, *SHAPE[2:])).copy()
    want = call(x, dy, residual, parameters(), mask=full)
    if kind == "last channel":
        last = [np.moveaxis(array, 1, -1) for array in (x, dy, residual)]
        got = call(*last, parameters(), mask=full[:, 0], channel_axis=-1)
        got = [np.moveaxis(array, -1, 1) if array.ndim > 1 else array for array in got]
    else:
        apart = np.zeros((*full.shape[:3], 100), bool)
        apart[..., ::2] = full
        forms = {
            "full": full,
            "no channel axis": full[:, 0],
            "extents of 1": lengths,
            "uint8": 7 * full.astype(np.uint8),
            "strided": apart[..., ::2],
        }
        got = call(x, dy, residual, parameters(), mask=forms[kind])
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_mask_of_ones_changes_nothing():
    x, dy, residual = data()
    mine, theirs = parameters(), parameters()
    masked = call(x, dy, residual, mine, mask=np.ones((1, 1, 1, 1), bool))
    plain = call(x, dy, residual, theirs)
    assert all(np.array_equal(a, b) for a, b in zip((*masked, *mine), (*plain, *theirs), strict=True))


def test_nothing_but_a_mask_of_zeros():
    x, dy, residual = data()
    vectors = parameters()
    results = call(x, dy, residual, vectors, mask=np.zeros((1, 1, 1, 1), bool))
    assert not any(array.any() for array in results)
    assert all(same_bits(a, b) for a, b in zip(vectors, parameters(), strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, (6, 3, 90, 50)], ids=str)
def test_ghost_batches_are_calls_of_their_own(shape, masked):
    x, dy, residual = data(shape)
    mask = rng(1).random((shape[0], 1, *shape[2:])) < 0.5 if masked else None
    mine, theirs = parameters(), parameters()
    got = call(x, dy, residual, mine, virtual_batch_size=2, mask=mask)
    parts = []
    for first in range(0, 6, 2):
        at = slice(first, first + 2)
        parts.append(call(x[at], dy[at], residual[at], theirs, mask=None if mask is None else mask[at]))
    for a, each in zip(got, zip(*parts, strict=True), strict=True):
        if a.ndim > 1:
            assert same_bits(a, np.concatenate(each))
        else:
            np.testing.assert_allclose(a, sum(each), rtol=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_ghost_batches_are_for_training():
    x, *_ = data()
    plain = gpu_bn.batch_norm(x, *parameters())
    assert same_bits(gpu_bn.batch_norm(x, *parameters(), virtual_batch_size=4), plain)


def test_renormalisation_within_1_and_0_is_batch_normalisation():
    x, dy, residual = data()
    for a, b in zip(
        call(x, dy, residual, parameters(), renorm=(1, 0)), call(x, dy, residual, parameters()), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_renormalisation_without_bounds_uses_the_running_statistics():
    x, *_ = data()
    vectors = parameters()
    evaluated = gpu_bn.batch_norm(x, *vectors)
    trained = gpu_bn.batch_norm(x, *vectors, training=True, renorm=(1e9, 1e9))
    np.testing.assert_allclose(trained, evaluated, rtol=1e-4, atol=1e-5)


def test_the_oracle_of_renormalisation_by_its_definition():
    problem = build(Case((3, 2, 4), "float64", renorm=(1.1, 0.2), activation="silu"))
    truth = oracle(problem)
    sd = np.sqrt(problem.running_var + problem.eps)
    batch = problem.x.var(axis=(0, 2)) + problem.eps
    r = np.clip(np.sqrt(batch) / sd, 1 / 1.1, 1.1)
    d = np.clip((problem.x.mean(axis=(0, 2)) - problem.running_mean) / sd, -0.2, 0.2)
    for name, constant in (("r", r), ("d", d)):
        np.testing.assert_allclose(np.asarray(getattr(truth, name), float), constant, rtol=1e-12)
    # With r and d constant, the gradients are those of the finite differences.
    fixed = replace(problem, renorm=None, weight=problem.weight * r, bias=problem.bias + problem.weight * d)
    np.testing.assert_allclose(*(np.asarray(oracle(p).y, float) for p in (problem, fixed)), rtol=1e-12)
    np.testing.assert_allclose(*(np.asarray(oracle(p).dx, float) for p in (problem, fixed)), rtol=1e-9)
    slope = []
    for step in (1e-6, -1e-6):
        weight = problem.weight + step
        moved = replace(fixed, weight=weight * r, bias=problem.bias + weight * d)
        slope.append((oracle(moved).y * problem.dy).sum(axis=(0, 2)))
    np.testing.assert_allclose(
        np.asarray(truth.dweight, float), np.asarray(slope[0] - slope[1], float) / 2e-6, rtol=1e-6
    )


@pytest.mark.parametrize("shape", [SHAPE, (40, 3, 10, 50)], ids=str)
def test_a_count_may_be_an_array(shape):
    """A count on the device, such as the sum over several ranks, gives the same gradient as a number."""
    x, dy, _ = data(shape)
    _, saved = gpu_bn.batch_norm_forward(x, *parameters(), training=True)
    for count in (saved.moments.count, 3 * saved.moments.count):
        number, array = (
            gpu_bn.batch_norm_backward(dy, replace(saved, moments=replace(saved.moments, count=value)))
            for value in (count, np.array([count], float))
        )
        assert same_bits(number.dx, array.dx)


class MaskDroppedInTheBackwardSums(NumpyBackend):
    def backward_reduce(self, dy, saved, dz):
        return super().backward_reduce(np.nan_to_num(dy, nan=1.0), replace(saved, valid=None), dz)


class MaskDroppedInTheStatistics(NumpyBackend):
    def stats(self, x, axis, valid=None, groups=1):
        return super().stats(np.nan_to_num(x), axis, None if valid is None else np.ones_like(valid), groups)


class CountsAllPositions(NumpyBackend):
    def stats(self, x, axis, valid=None, groups=1):
        moments = super().stats(x, axis, valid, groups)
        return replace(moments, count=0 * moments.count + x.size // x.shape[axis])


class GroupsTakenForOne(NumpyBackend):
    def normalize(self, saved, residual, out):
        first = next(iter(saved.moments.parts(saved.spec.groups)))
        super().normalize(replace(saved, moments=first, spec=replace(saved.spec, groups=1)), residual, out)


@pytest.mark.parametrize(
    "mutant", [MaskDroppedInTheBackwardSums, MaskDroppedInTheStatistics, CountsAllPositions, GroupsTakenForOne]
)
def test_the_cases_notice(mutant):
    noticed = 0
    for case in (Case((4, 6, 5), mask="random"), Case((12, 8, 5, 9), mask="random", virtual_batch_size=4)):
        try:
            check(case, mutant())
        except AssertionError:
            noticed += 1
    assert noticed


X = data((4, 3, 5), 1)[0]
REFUSED = [
    ({"mask": np.ones((4, 3, 5), bool)}, ValueError, r"mask should broadcast to \(4, 1, 5\) or \(4, 5\)"),
    ({"mask": np.ones((4, 1, 4), bool)}, ValueError, r"got \(4, 1, 4\)"),
    ({"mask": np.ones(5, bool)}, ValueError, r"got \(5,\)"),
    ({"mask": np.ones((4, 5))}, TypeError, "mask should be one of bool, uint8, got float64"),
    ({"mask": [[True]]}, TypeError, "mask should be an array"),
    ({"virtual_batch_size": 3}, ValueError, "virtual_batch_size should divide the batch of 4, got 3"),
    ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size should be positive, got 0"),
    ({"virtual_batch_size": 2.0}, TypeError, "virtual_batch_size should be an int, got float"),
    ({"virtual_batch_size": 2, "x": X.swapaxes(0, 1), "channel_axis": 0}, ValueError, "which is the channel axis"),
    ({"virtual_batch_size": 1, "x": X[..., 0]}, ValueError, r"got input size \(1, 3\)"),
    ({"renorm": 3.0}, TypeError, "renorm should be two numbers"),
    ({"renorm": (0.5, 1.0)}, ValueError, "r_max >= 1 and d_max >= 0"),
    ({"renorm": (2.0, 1.0), "training": False}, ValueError, "renorm needs training and running statistics"),
    ({"renorm": (2.0, 1.0), "virtual_batch_size": 2}, ValueError, "cannot be combined"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_change_nothing(options, error, message):
    vectors = parameters()
    arguments = {"x": X, "training": True} | options
    with pytest.raises(error, match=message):
        gpu_bn.batch_norm(arguments.pop("x"), *vectors, **arguments)
    assert all(same_bits(a, b) for a, b in zip(vectors, parameters(), strict=True))


def test_the_layer():
    x, dy, residual = data()
    mask = rng(1).random((6, 4, 50)) < 0.5
    norm = gpu_bn.BatchNorm(3, virtual_batch_size=2, activation="silu")
    vectors = [norm.running_mean.copy(), norm.running_var.copy(), norm.weight, norm.bias]
    want = call(x, dy, residual, vectors, mask=mask, virtual_batch_size=2)
    assert same_bits(norm(x, residual, mask), want[0])
    dx, dresidual = norm.backward(dy)
    assert same_bits(dx, want[1])
    assert same_bits(dresidual, want[4])
    assert same_bits(norm.running_var, vectors[1])
    assert same_bits(norm.grad["weight"], want[2])
    assert norm.eval()(x[:5]).shape == (5, 3, 4, 50)
    assert repr(norm).endswith("virtual_batch_size=2)")
    assert "virtual" not in repr(gpu_bn.BatchNorm(3))


def test_the_layer_with_renormalisation():
    norm = gpu_bn.BatchNorm(3, renorm=(3.0, 5.0))
    x, *_ = data()
    want = gpu_bn.batch_norm(x, *parameters()[:0], np.zeros(3), np.ones(3), training=True, renorm=(3, 5))
    np.testing.assert_allclose(norm(x), want, rtol=1e-6, atol=1e-6)
    assert norm.eval()(x).shape == x.shape
    with pytest.raises(ValueError, match="running statistics"):
        gpu_bn.BatchNorm(3, renorm=(3.0, 5.0), track_running_stats=False)
