"""A call that raises changes nothing: an interrupt at each line, and a MemoryError at each call into C."""

import copy
import ctypes
import gc
import pickle
import sys
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support import rng, running_pair, same_bits
from support.injection import INJECTIONS, at_c_call, run_with_error

import gpu_bn
from gpu_bn import functional
from gpu_bn.layers import STATE


def data(shape=(6, 3, 40), seed=0):
    return rng(seed).standard_normal(shape).astype(np.float32)


CALLS = {
    "plain": {},
    "relu, residual": {"activation": "relu", "residual": data(seed=1)},
    "ghost batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": (2.0, 1.0)},
    "mask": {"mask": rng(2).random((6, 1, 40)) < 0.7},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("install", "place", "error"), INJECTIONS)
def test_statistics_are_all_old_or_all_new(options, install, place, error, backend):
    x, old = data(), running_pair(3)
    new = running_pair(3)
    gpu_bn.batch_norm(x, *new, training=True, backend=backend, **options)
    number = outcomes = 0
    while True:
        running, given = running_pair(3), x.copy()
        call = lambda: gpu_bn.batch_norm(given, *running, training=True, backend=backend, **options)  # noqa: B023, E731
        raised, _ = run_with_error(call, install, place(number, error), error)
        assert np.array_equal(given, x)
        state = [[same_bits(mine, other) for mine, other in zip(running, which, strict=True)] for which in (old, new)]
        assert [True, True] in state, (number, running)
        outcomes += state[0] == [True, True]
        if not raised:
            break
        number += 1
    assert number > 20
    assert outcomes > 0.9 * number  # statistics are written at the end of the call


@pytest.mark.parametrize(("install", "place", "error"), INJECTIONS)
def test_the_counter_moves_with_the_statistics(install, place, error, backend):
    x, number = data(), 0
    whole = gpu_bn.BatchNorm(3, momentum=None, backend=backend)
    old = whole.state_dict()
    whole(x)
    new = whole.state_dict()
    while True:
        layer = gpu_bn.BatchNorm(3, momentum=None, backend=backend)
        raised, _ = run_with_error(lambda: layer(x), install, place(number, error), error)  # noqa: B023
        state = layer.state_dict()
        assert same_bits(state, old) or same_bits(state, new), number
        if not raised:
            break
        number += 1
    assert number > 40


@pytest.mark.parametrize(("install", "place", "error"), INJECTIONS)
def test_gradients_are_added_all_or_none(install, place, error):
    x, number, states = data(), 0, []
    while True:
        layer = gpu_bn.BatchNorm(3, backend="numpy")
        saved = layer.forward_saving(x)[1]
        layer.backward(x, saved)
        once = dict(layer.grad)
        raised, _ = run_with_error(lambda: layer.backward(x, saved), install, place(number, error), error)  # noqa: B023
        states.append({name: float(np.abs(layer.grad[name]).sum() / np.abs(once[name]).sum()) for name in once})
        assert len({round(state) for state in states[-1].values()}) == 1, number
        if not raised:
            break
        number += 1
    assert round(states[0]["bias"]) == 1


@pytest.mark.parametrize(("install", "place", "error"), INJECTIONS)
def test_a_state_is_loaded_whole_or_not(install, place, error):
    source = gpu_bn.BatchNorm(3)
    source(data())
    source.weight[...] = 7
    state, number = source.state_dict(), 0
    while True:
        layer = gpu_bn.BatchNorm(3)
        old = layer.state_dict()
        raised, _ = run_with_error(lambda: layer.load_state_dict(state), install, place(number, error), error)  # noqa: B023
        assert same_bits(layer.state_dict(), old) or same_bits(layer.state_dict(), state)
        if not raised:
            break
        number += 1
    assert number > 20


@pytest.mark.parametrize("layout", ["dense", "every other"])
@pytest.mark.parametrize("name", CALLS)
def test_an_output_in_the_inputs_place_is_all_old_or_all_new_when_memory_runs_out(name, layout, backend, monkeypatch):
    """A call allocates memory before it writes anything; afterwards it goes on with less memory instead of failing."""
    for module, setting in (("numpy.SCRATCH_BYTES", 4 << 10), ("cpu.pieces.MIN_BYTES", 1 << 10)):  # several blocks
        monkeypatch.setattr(f"gpu_bn.backends.{module}", setting)

    def call(x):
        gpu_bn.batch_norm(x, *running_pair(3), training=True, backend=backend, out=x, **CALLS[name])

    def fresh():
        x = data()
        return x if layout == "dense" else np.repeat(x, 2, -1)[..., ::2]

    old, new = fresh(), fresh()
    call(new)
    number, reached, outcomes = 0, True, Counter()
    while reached:
        x = fresh()
        raised, seen = run_with_error(lambda: call(x), sys.setprofile, at_c_call(number, MemoryError()), MemoryError())  # noqa: B023
        assert same_bits(x, old) or same_bits(x, new), number
        outcomes[raised, same_bits(x, new)] += 1
        reached = seen > number
        number += 1
    assert number > 20
    assert outcomes[True, True] <= 3  # an error while statistics are updated, after the output
    assert outcomes[False, False] == 0


@pytest.mark.parametrize("often", [1, 3, 20])
@pytest.mark.parametrize("shape", [(8, 4, 30_000), (120, 9000)], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_block_that_memory_does_not_suffice_for_is_done_in_halves(monkeypatch, often, in_place, shape):
    """Once ``out`` is partly written, a call cannot undo that; if memory runs out, it goes on with smaller blocks."""
    from gpu_bn.backends.numpy import Normalization

    x = data(shape)
    expected = gpu_bn.batch_norm(x, training=True, activation="silu", backend="numpy")
    centred, calls = Normalization.centred, [0]

    def fails(self, block, centre):
        calls[0] += 1
        if calls[0] > often and calls[0] % 3 == 0:
            raise MemoryError
        return centred(self, block, centre)

    statistics = gpu_bn.batch_norm_forward(x, training=True, backend="numpy")[1].moments
    out = x if in_place else np.empty_like(x)
    monkeypatch.setattr(Normalization, "centred", fails)
    running = statistics.mean.copy(), statistics.var.copy()
    gpu_bn.batch_norm(x, *running, activation="silu", out=out, backend="numpy")
    assert calls[0] > often
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- nothing kept
def test_new_shapes_leave_nothing_behind():
    def call(rows):
        x = np.ones((rows, 64, 10), np.float32)
        gpu_bn.batch_norm_backward(x, gpu_bn.batch_norm_forward(x, training=True, activation="relu")[1])

    call(500)
    tracemalloc.start()
    try:
        for rows in range(501, 561):
            call(rows)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 256 << 10


@pytest.mark.parametrize("library", ["numpy", "cpu", "torch"])
def test_what_is_remembered_of_ever_new_shapes_is_bounded_in_bytes(library):
    """Remembered signatures take at most 3 MiB in all, however many shapes of five axes there were."""

    def call(size):
        x = np.ones((2, 3, size, 1, 1), np.float32)
        if library == "torch":
            x, options = torch.from_numpy(x), {}
        else:
            options = {"backend": library}
        gpu_bn.batch_norm_backward(x, gpu_bn.batch_norm_forward(x, training=True, **options)[1], **options)

    torch = pytest.importorskip("torch") if library == "torch" else None
    call(1)
    gc.collect()
    gc.freeze()  # the collector visits new objects only, which is faster
    tracemalloc.start()
    try:
        kept = []
        for size in range(2, 1900):
            call(size)
            if size % 100 == 0:
                gc.collect()
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(kept) < 3 << 20, kept
    assert min(kept[13:]) < max(kept[:13]), kept  # it stops growing
    assert len(functional._FORWARDS) <= functional.REMEMBERED <= 1024


@pytest.mark.parametrize("library", ["numpy", "cpu", "torch"])
def test_ever_new_large_shapes_add_nothing_to_the_process(library):
    """25 new shapes of 13 MB each add less than 4 MiB, once the allocator has returned its free memory."""
    status, allocator = Path("/proc/self/status"), ctypes.CDLL(None)
    if not (status.exists() and hasattr(allocator, "malloc_trim")):
        pytest.skip("the memory of a process is read from Linux's /proc, when glibc has trimmed its own")

    def call(rows):
        x = np.ones((rows, 64, 50), np.float32)
        if library == "torch":
            x, options = torch.from_numpy(x), {}
        else:
            options = {"backend": library}
        gpu_bn.batch_norm_backward(x, gpu_bn.batch_norm_forward(x, training=True, **options)[1], **options)

    def resident():
        gc.collect()
        allocator.malloc_trim(0)
        return int(status.read_text().partition("VmRSS:")[2].split()[0]) << 10

    torch = pytest.importorskip("torch") if library == "torch" else None
    for rows in range(1000, 1003):
        call(rows)
    before = resident()
    for rows in range(1003, 1028):
        call(rows)
    assert resident() - before < 4 << 20


def test_a_layer_keeps_its_input_between_a_training_forward_and_its_backward_only():
    layer = gpu_bn.BatchNorm(3)
    x = data((50, 3))
    layer.eval()(x)
    assert layer._saved is None
    layer.train()(x)
    assert layer._saved.x is x
    with pytest.raises(ValueError, match="dy should have the input's shape"):
        layer.backward(x[:4])
    assert layer._saved.x is x
    layer.backward(x)
    assert layer._saved is None
    with pytest.raises(RuntimeError, match="backward needs a call of forward in training mode since the last backward"):
        layer.backward(x)
    layer(x)
    layer.eval()(x)
    assert layer._saved is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_an_input_is_never_copied_or_pickled_with_its_layer(duplicate):
    layer = gpu_bn.BatchNorm(3, activation="relu")
    layer(data((20_000, 3)))
    assert len(pickle.dumps(layer)) < 4000
    other = duplicate(layer)
    assert other._saved is None
    assert layer._saved is not None
    assert same_bits(other.state_dict(), layer.state_dict())


def test_classes_of_arrays_and_backends_go_away():
    from gpu_bn.backends.numpy import NumpyBackend

    class Array(np.ndarray):
        pass

    class Backend(NumpyBackend):
        pass

    x = data().view(Array)
    y, saved = gpu_bn.batch_norm_forward(x, training=True)
    gpu_bn.batch_norm_backward(y, saved)
    gpu_bn.batch_norm(data(), training=True, backend=Backend())
    kinds = weakref.ref(Array), weakref.ref(Backend)
    del x, y, saved, Array, Backend
    gc.collect()
    assert [kind() for kind in kinds] == [None, None]


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("name", STATE)
def test_a_state_with_a_read_only_target_is_refused_whole(name):
    layer = gpu_bn.BatchNorm(3)
    before = layer.state_dict()
    getattr(layer, name).flags.writeable = False
    with pytest.raises(ValueError, match=f"{name} is written to, but the array given is read-only"):
        layer.load_state_dict({key: np.full_like(value, 5) for key, value in before.items()})
    assert same_bits(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("parameter", "error"), [(None, TypeError), ("0.1", TypeError), (1j, TypeError), (float("nan"), ValueError)]
)
def test_an_activation_with_a_parameter_that_is_no_number_is_refused_at_once(parameter, error):
    for name in ("elu", "leaky_relu"):
        with pytest.raises(error, match=f"the parameter of {name} should be a number"):
            gpu_bn.activations.Activation(name, parameter)


@pytest.mark.parametrize("momentum", [float("nan"), float("inf"), np.float32("nan")])
def test_a_momentum_that_is_not_finite_is_refused_though_the_signature_is_known(momentum):
    x, running = data(), running_pair(3)
    gpu_bn.batch_norm(x, *running_pair(3), training=True, momentum=type(momentum)(0.5))
    with pytest.raises(ValueError, match="momentum should be finite"):
        gpu_bn.batch_norm(x, *running, training=True, momentum=momentum)
    assert same_bits(running[0], running_pair(3)[0])


def test_an_infinite_eps_is_refused():
    with pytest.raises(ValueError, match="eps must be finite"):
        gpu_bn.batch_norm(data(), training=True, eps=float("inf"))
    with pytest.raises(ValueError, match="eps must be finite"):
        gpu_bn.BatchNorm(3, eps=float("inf"))


def test_the_layer_without_a_framework_names_the_one_for_torch():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"takes NumPy and CuPy arrays; for torch tensors there is gpu_bn\.nn"):
        gpu_bn.BatchNorm(3)(torch.ones(4, 3))
