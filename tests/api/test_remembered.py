"""Checks are skipped for a known signature: its key holds all that they depend on; errors are raised each time."""

import gc
import weakref
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
from support import make_problem, rng, running_pair, same_bits

import gpu_bn
from gpu_bn import functional
from gpu_bn.testing import check


@pytest.fixture(autouse=True)
def forget_signatures():
    functional._FORWARDS.clear()
    functional._BACKWARDS.clear()


def data(shape, seed=0, dtype=np.float32):
    return rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("training", [True, False])
def test_calls_of_one_signature_each_give_their_own_result(training):
    for seed in range(3):
        running_mean, running_var = data(5, seed), data(5, seed) ** 2 + 1
        problem = make_problem(
            data((6, 5, 4), seed), running_mean=running_mean, running_var=running_var, weight=data(5, seed + 9),
            bias=data(5, seed + 5), training=training, momentum=0.1 * (seed + 1), residual=data((6, 5, 4), seed + 2),
            activation=("leaky_relu", 0.1 * seed),
        )  # fmt: skip
        check(problem)
    assert len(functional._FORWARDS) == 3  # one for each slope
    assert len(functional._BACKWARDS) == 1


def test_numbers_are_the_calls_own_to_the_sign_of_zero():
    x = data((4, 3))
    for slope, momentum in ((0.0, -0.0), (-0.0, 0.0), (0.0, 0.0)):
        activation = gpu_bn.leaky_relu(slope)
        _, saved = gpu_bn.batch_norm_forward(x, training=True, activation=activation, momentum=momentum)
        assert np.signbit(saved.spec.activation.parameter) == np.signbit(slope)
        assert np.signbit(saved.spec.momentum) == np.signbit(momentum)
    assert len(functional._FORWARDS) == 1


EQUAL = [
    ({"channel_axis": 1}, {"channel_axis": True}, "channel_axis should be an int, got bool"),
    ({"channel_axis": 1}, {"channel_axis": np.int64(1)}, "channel_axis should be an int, got int64"),
    ({"virtual_batch_size": 2}, {"virtual_batch_size": 2.0}, "virtual_batch_size should be an int, got float"),
    ({"eps": 0.5}, {"eps": Decimal("0.5")}, "eps should be a number, got Decimal"),
    ({"momentum": 0.5}, {"momentum": Decimal("0.5")}, "momentum should be a number, got Decimal"),
    ({"momentum": np.array(0.5)}, {"momentum": np.array([0.5])}, "momentum should be a number, got ndarray"),
    ({"momentum": np.array(0.5)}, {"momentum": np.array("half")}, "momentum should be a number, got ndarray"),
    ({"renorm": (3.0, 5.0)}, {"renorm": [3.0, 5.0]}, "renorm should be two numbers"),
    ({"activation": "relu"}, {"activation": SimpleNamespace(name="relu")}, "activation should be a name or an"),
]


@pytest.mark.parametrize(("right", "wrong", "text"), EQUAL, ids=[text for *_, text in EQUAL])
def test_a_value_that_equals_a_valid_one_may_be_refused(right, wrong, text):
    pair = running_pair(3)
    gpu_bn.batch_norm(data((4, 3)), *pair, training=True, **right)
    before = [vector.copy() for vector in pair]
    for _ in range(2):
        with pytest.raises(TypeError, match=text):
            gpu_bn.batch_norm(data((4, 3)), *pair, training=True, **wrong)
    assert all(map(same_bits, pair, before))


@pytest.mark.parametrize("training", ["yes", 2, (), None], ids=repr)
def test_a_call_means_by_training_whether_it_is_true(training, backend):
    """A value of ``training`` is taken as ``True`` or ``False``, and shares the signature of that value."""
    results = []
    for one in (training, bool(training)):
        pair = running_pair(3)
        y, saved = gpu_bn.batch_norm_forward(data((4, 3)), *pair, training=one, backend=backend)
        results.append((y, *pair, gpu_bn.batch_norm_backward(data((4, 3), 1), saved, backend=backend).dx))
    assert all(map(same_bits, *results))
    assert len(functional._FORWARDS) == 1


def test_a_nan_momentum_of_a_subclass_of_float_is_refused():
    class Momentum(float):
        pass

    pair = running_pair(3)
    gpu_bn.batch_norm(data((4, 3)), *pair, training=True, momentum=Momentum(0.5))
    before = [vector.copy() for vector in pair]
    with pytest.raises(ValueError, match="momentum should be finite, got nan"):
        gpu_bn.batch_norm(data((4, 3)), *pair, training=True, momentum=Momentum("nan"))
    assert all(map(same_bits, pair, before))


@pytest.mark.parametrize("frozen", [0, 1])
def test_running_statistics_may_become_read_only(frozen):
    pair = running_pair(3)
    call = {"running_mean": pair[0], "running_var": pair[1]}
    gpu_bn.batch_norm(data((4, 3)), **call, training=True)
    before = [vector.copy() for vector in pair]
    pair[frozen].flags.writeable = False
    for _ in range(2):
        with pytest.raises(ValueError, match="is written to, but the array given is read-only"):
            gpu_bn.batch_norm(data((4, 3)), **call, training=True)
    gpu_bn.batch_norm(data((4, 3)), **call)
    assert all(map(same_bits, pair, before))


def test_a_backend_object_without_methods_is_refused_after_one_with():
    class Backend(SimpleNamespace):
        pass

    engine = gpu_bn.registry.load("numpy")
    methods = {name: getattr(engine, name) for name in dir(engine) if not name.startswith("_")}
    want = gpu_bn.batch_norm(data((4, 3)), training=True, backend="numpy")
    assert same_bits(gpu_bn.batch_norm(data((4, 3)), training=True, backend=Backend(**methods)), want)
    with pytest.raises(TypeError, match="backend should be a name or a Backend, got Backend"):
        gpu_bn.batch_norm(data((4, 3)), training=True, backend=Backend())


def test_a_tensor_is_looked_at_each_time():
    torch = pytest.importorskip("torch")
    engine = gpu_bn.registry.load("torch")
    x = torch.ones(4, 3)
    gpu_bn.batch_norm(x, training=True, backend=engine)
    with pytest.raises(TypeError, match="input should be on one of cpu, cuda, got meta"):
        gpu_bn.batch_norm(x.to("meta"), training=True, backend=engine)


def test_needs_of_every_kind():
    x = data((4, 3))
    _, saved = gpu_bn.batch_norm_forward(x, weight=x[0], training=True)
    for need in ("dx", ["dx"], {"dx"}, iter(["dx"]), ("dx", "dx"), frozenset({"dx"})):
        grads = gpu_bn.batch_norm_backward(x, saved, need=need)
        assert grads.dx is not None
        assert grads.dweight is None
    assert gpu_bn.batch_norm_backward(x, saved).dweight is not None
    assert gpu_bn.batch_norm_backward(x, saved, need=[]) == (None,) * 4


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(functional, "REMEMBERED", 5)
    for n in range(2, 20):
        x = data((n, 3))
        y, saved = gpu_bn.batch_norm_forward(x, training=True)
        assert abs(y.mean()) < 1e-6
        gpu_bn.batch_norm_backward(y, saved)
        assert 0 < len(functional._FORWARDS) <= 5
        assert 0 < len(functional._BACKWARDS) <= 5


def test_no_array_is_remembered_nor_its_class():
    """Arrays, and the class of a subclass of ndarray, are freed after the call."""
    alive = []

    class Array(np.ndarray):
        def __del__(self):
            alive.remove(id(self))

        def __array_finalize__(self, source):
            alive.append(id(self))

    momentum = np.full((), 0.5).view(Array)
    y, saved = gpu_bn.batch_norm_forward(data((4, 3)).view(Array), *running_pair(3), training=True, momentum=momentum)
    gpu_bn.batch_norm_backward(y, saved)
    kind = weakref.ref(Array)
    del momentum, y, saved
    assert alive == []
    del Array
    gc.collect()
    assert kind() is None
