"""Test the fast paths of calls with plain tensors: which calls take them, and that results and errors do not change."""

import copy
from itertools import combinations, product

import numpy as np
import pytest
from support import as_torch_2_13, rng

import gpu_bn
from gpu_bn.activations import ROWS

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn import nn
from gpu_bn.activations import IDENTITY
from gpu_bn.call import Call, Options
from gpu_bn.nn import checks
from gpu_bn.nn.operators import (
    autograd,
    plain_calls,
)
from gpu_bn.testing import ADAPTERS

NAMES = ("x", "running_mean", "running_var", "weight", "bias")


class Watch(TorchDispatchMode):
    """A mode that records which operators of gpu_bn it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("gpu_bn."):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


# ------------------------------------------------------------------------------------- which calls take a fast path
def data(*shape, seed=0):
    return torch.from_numpy(rng(seed).standard_normal(shape, np.float32))


X, VECTOR = data(4, 3, 5), torch.ones(3)
COMMON = {
    "bad length": torch.ones(4),
    "two axes": torch.ones(3, 1),
    "whole numbers": torch.ones(3, dtype=torch.int64),
    "elsewhere": torch.ones(3, device="meta"),
    "negated": torch._neg_view(VECTOR),
    "subclass": VECTOR.as_subclass(Subclass),
    "half": VECTOR.half(),
    "learned": VECTOR.clone().requires_grad_(),
    "absent": None,
}
VARIANTS = {
    "input": {
        "1 axis": data(3),
        "6 axes": data(2, 3, 1, 1, 1, 1),
        "one value": data(1, 3),
        "empty": data(0, 3, 5),
        "no channels": data(4, 0, 5),
        "other channels": data(4, 4),
        "whole numbers": X.long(),
        "elsewhere": X.to("meta"),
        "negated": torch._neg_view(X),
        "subclass": X.as_subclass(Subclass),
        "double": X.double(),
    },
    "running_mean": COMMON,
    "running_var": COMMON,
    "weight": COMMON,
    "bias": COMMON,
    "residual": {
        "there": X + 1,
        "shape": X[:, :, :4],
        "dtype": X.double(),
        "elsewhere": X.to("meta"),
        "negated": torch._neg_view(X),
    },
    "counter": {"there": torch.tensor(0), "negated": torch._neg_view(torch.tensor(0.0))},
    "momentum": {"absent": None, "whole": 1, "text": "a", "tensor": torch.tensor(0.1)},
    "eps": {"zero": 0.0, "negative": -1.0, "whole": 1, "text": "a", "nan": float("nan")},
}
USUAL = {"input": X, "running_mean": VECTOR, "running_var": VECTOR, "weight": VECTOR, "bias": VECTOR,
         "residual": None, "counter": None, "momentum": 0.1, "eps": 1e-5}  # fmt: skip


def is_ordinary(training, given):
    return checks.is_ordinary(*call_of(training, given))


def call_of(training, given, activation=IDENTITY):
    """Return the Call and the Options for some arguments."""
    names = ("input", "weight", "bias", "residual", "running_mean", "running_var", "counter")
    return Call(*[given[name] for name in names]), Options(training, given["momentum"], given["eps"], activation)


def is_quick(training, given):
    """Tell whether the fastest path serves a call. It gets copies of the usual statistics, which it may update."""
    own = [one.clone() if one is VECTOR else one for one in (given["running_mean"], given["running_var"])]
    given.update(running_mean=own[0], running_var=own[1])
    given.update(counter=given["counter"] if training else None)
    call, options = call_of(training, given)
    return plain_calls.forward(call[:7], training, options.momentum, options.eps, "relu", 0.0) is not None


def is_refused(training, given):
    try:
        checks.check(*call_of(training, given))
    except Exception:
        return True
    return False


@pytest.mark.parametrize("takes", [is_ordinary, is_quick])
@pytest.mark.parametrize("training", [True, False])
def test_no_fast_path_takes_a_call_that_is_refused(training, takes):
    """All pairs of unusual arguments are tried. Of two for the same parameter only the second is used."""
    if takes is is_quick:
        pytest.importorskip("numba", reason="the fast path on CPUs needs Numba", exc_type=ImportError)
    odd = [(name, variant) for name, variants in VARIANTS.items() for variant in variants.values()]
    taken = refused = 0
    for pair in combinations(odd, 2):
        given = USUAL | dict(pair)
        if takes(training, given):
            taken += 1
            assert not is_refused(training, given), pair
        else:
            refused += is_refused(training, given)
    assert taken > 20
    assert refused > 500


@pytest.mark.parametrize("quick", [True, False])
def test_usual_calls_take_a_fast_path(monkeypatch, quick):
    if quick:
        pytest.importorskip("numba", reason="the fast path on CPUs needs Numba", exc_type=ImportError)
    taken, nothing = [], lambda *_: None
    way = plain_calls if quick else autograd
    original = plain_calls.forward if quick else autograd.call_backend

    def record(*arguments):
        y = original(*arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(plain_calls, "forward", nothing)
    monkeypatch.setattr(way, "forward" if quick else "call_backend", record)
    x = data(4, 3, 5, 6).requires_grad_()
    options = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"activation": "relu"}]
    layers = [nn.BatchNorm2d(3, **option) for option in options]
    calls = [lambda layer=layer, y=y: layer(y) for layer in layers for y in (x, x.detach(), x.detach().bfloat16())]
    calls += [lambda layer=layer: layer.eval()(x) for layer in layers]
    calls += [lambda: nn.FrozenBatchNorm2d(3)(x), lambda: layers[0].train()(x, residual=x)]
    for call in calls:
        call()
    with torch.inference_mode():
        layers[0](x)
    assert len(taken) == len(calls) + 1
    assert all(taken)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_mode_sees_the_operators_also_if_it_comes_late(part):
    x, dy = data(4, 3, 5).requires_grad_(), data(4, 3, 5)
    plain = torch.autograd.grad(nn.batch_norm(x, training=True, activation="silu"), x, dy)[0]
    if part == "forward":
        with Watch() as watch:
            y = nn.batch_norm(x, training=True, activation="silu")
        dx = torch.autograd.grad(y, x, dy)[0]
    else:
        y = nn.batch_norm(x, training=True, activation="silu")
        with Watch() as watch:
            dx = torch.autograd.grad(y, x, dy)[0]
    assert watch.seen == [{"forward": "gpu_bn.train.default", "backward": "gpu_bn.backward.default"}[part]]
    assert torch.equal(dx, plain)


def test_what_was_written_to_is_counted_as_changed():
    layer = nn.BatchNorm1d(3)
    before = [buffer._version for buffer in layer.buffers()]
    layer(X)
    assert all(buffer._version > version for buffer, version in zip(layer.buffers(), before, strict=True))
    before = [buffer._version for buffer in layer.buffers()]
    layer.eval()(X)
    assert [buffer._version for buffer in layer.buffers()] == before


def test_a_tensor_that_left_its_transform_is_a_tensor():
    left = []
    torch.func.grad(lambda x: (left.append(x + 1), x.sum())[1])(X)
    weight = torch.ones(3, requires_grad=True)
    y = nn.batch_norm(left[0], None, None, weight, training=True)
    assert torch.equal(y, nn.batch_norm(X + 1, None, None, weight, training=True))
    y.sum().backward()
    assert weight.grad is not None


# -------------------------------------------------------------------------------------------- no check is remembered
def changes():
    """Return changes of a layer by name, which are made between two calls. Some of them make the next call invalid."""

    def put(**attributes):
        def change(layer):
            for name, value in attributes.items():
                setattr(layer, name, value())

        return change

    def load(layer):
        layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})

    return {
        "nothing": lambda _: None,
        "eval": lambda layer: layer.eval(),
        "double": lambda layer: layer.double(),
        "half": lambda layer: layer.half(),
        "meta": lambda layer: layer.to("meta"),
        "load": load,
        "no counter": put(num_batches_tracked=lambda: None),
        "cumulative": put(momentum=lambda: None),
        "momentum of text": put(momentum=lambda: "a"),
        "whole momentum": put(momentum=lambda: 1),
        "eps 0": put(eps=lambda: 0.0),
        "larger eps": put(eps=lambda: 1.0),
        "no weight": put(weight=lambda: None, bias=lambda: None),
        "frozen": lambda layer: layer.requires_grad_(False),
        "long weight": put(weight=lambda: torch.nn.Parameter(torch.ones(4))),
        "long variance": put(running_var=lambda: torch.ones(4)),
        "one statistic": put(running_mean=lambda: None),
        "no statistics": put(running_mean=lambda: None, running_var=lambda: None),
        "learned statistics": lambda layer: layer.running_mean.requires_grad_(),
        "another variance": put(running_var=lambda: torch.full((3,), 9.0)),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[as_torch_2_13] if name == "eps 0" else []) for name in changes()]
)
def test_the_next_call_is_checked_again(name):
    """Our layer and torch's are called, changed and called again: results, errors and state are the same."""
    layers = nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for layer in layers:
        layer(X)
        layer(X)
        changes()[name](layer)
    cast = X.to({"double": torch.float64, "half": torch.float16}.get(name, torch.float32))
    wrong = [] if name == "momentum of text" else [cast[:, :2], cast, cast[:1, :, 0], X.long()]  # one mistake a call
    for x in (cast, cast.clone().requires_grad_(), *wrong, cast):
        before = copy.deepcopy(layers[0].state_dict())
        mine, other = (output_or_error(layer, x) for layer in layers)
        if isinstance(other, tuple):
            assert mine == other
            assert all(equal_or_both_meta(value, before[key]) for key, value in layers[0].state_dict().items())
            # torch increments the counter even for a call that it refuses
            layers[1].num_batches_tracked = copy.deepcopy(layers[0].num_batches_tracked)
        else:
            assert mine.requires_grad == other.requires_grad
            torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=2e-3, atol=2e-3)


def output_or_error(layer, x):
    try:
        return layer(x)
    except Exception as error:
        return type(error), str(error)


def equal_or_both_meta(a, b):
    return a.is_meta if b.is_meta else torch.equal(a, b)


# -------------------------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("activation", "residual"), [*product(["identity", "relu", "gelu"], [False, True])])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (2, 40, 9), (30, 7), (1, 2, 2000)])
@pytest.mark.one_in(11)
def test_small_calls_have_the_bits_of_the_phases(dtype, activation, residual, training, shape):
    """Calls on the CPU backend give the same bits as the NumPy backend, which runs the phases one by one."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 on NumPy needs the package ml_dtypes")
    to, back = ADAPTERS["torch"].to_backend, ADAPTERS["torch"].to_numpy
    cast = back(torch.zeros(1).to(getattr(torch, dtype))).dtype
    random, channels = rng(), shape[1]
    x, dy, added = (random.normal(2, 3, shape).astype(cast) for _ in range(3))
    if len(shape) == 4:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    weight, bias, mean, var = (random.uniform(0.5, 2, channels).astype(np.float32) for _ in range(4))
    options = {"training": training, "residual": added if residual else None, "activation": activation}
    running = mean.copy(), var.copy()
    y, saved = gpu_bn.batch_norm_forward(x, *running, weight, bias, **options)
    grads = gpu_bn.batch_norm_backward(dy, saved)

    tensors = [to(array.copy("K")).requires_grad_() for array in (x, weight, bias)]
    statistics = to(mean.copy()), to(var.copy())
    options["residual"] = to(added.copy()).requires_grad_() if residual else None
    tensors += [options["residual"]] if residual else []
    z = nn.batch_norm(tensors[0], *statistics, *tensors[1:3], **options)
    results = [z.detach(), *torch.autograd.grad(z, tensors, to(dy)), *statistics]
    wanted = [y, *(grad for grad in grads if grad is not None), *running]
    names = ("y", "dx", "dweight", "dbias", "dresidual", "running")
    for name, mine, other in zip(names, results, wanted, strict=False):
        assert back(mine).tobytes("A") == other.tobytes("A"), name
    assert all(torch.equal(a, to(b)) for a, b in zip(results[-2:], wanted[-2:], strict=True))


@pytest.mark.parametrize("activation", list(ROWS))
def test_small_calls_have_the_bits_of_the_operators(activation):
    x, dy = data(4, 3, 5).requires_grad_(), data(4, 3, 5)
    results = []
    for watched in (False, True):
        layer = nn.BatchNorm1d(3, activation=activation)
        given = [x, *layer.parameters()]
        with Watch() if watched else torch.enable_grad():
            results.append([y := layer(x), *torch.autograd.grad(y, given, dy), *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5), (8, 3, 2048)])
def test_storages_can_be_resized_after_a_call(dtype, training, shape):
    """FullyShardedDataParallel does this: it frees parameters between calls."""
    layer = nn.BatchNorm1d(3, activation="relu", dtype=dtype).train(training)
    x, residual = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    y = layer(x, residual)
    y.sum().backward()
    for tensor in (x, residual, y, *layer.parameters(), *layer.buffers()):
        assert tensor.untyped_storage().resizable()


def test_what_does_not_lie_in_memory_is_copied_there_first():
    x = torch.randn(4, 3)
    for tensor, same in ((torch._neg_view(x), -x), (torch._efficientzerotensor((4, 3)), torch.zeros(4, 3))):
        for backend in (None, "numpy"):
            for given in ({"x": tensor}, {"x": x, "residual": tensor}):
                copied = {name: same if value is tensor else value for name, value in given.items()}
                y, saved = gpu_bn.batch_norm_forward(**given, training=True, backend=backend)
                expected, other = gpu_bn.batch_norm_forward(**copied, training=True, backend=backend)
                assert torch.equal(y, expected)
                found, truth = gpu_bn.batch_norm_backward(tensor, saved), gpu_bn.batch_norm_backward(same, other)
                assert torch.equal(found.dx, truth.dx)


@pytest.mark.parametrize(
    ("running", "counted"), [(torch.float32, torch.int64), (torch.float16, torch.int64), (torch.float64, torch.int32)]
)
def test_what_is_tracked_moves_together_and_autograd_sees_it(running, counted):
    x = torch.randn(4, 3, 5, requires_grad=True)
    mean, var, counter = torch.zeros(3, dtype=running), torch.ones(3, dtype=running), torch.tensor(4, dtype=counted)
    versions = [one._version for one in (mean, var, counter)]
    nn.batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=counter)
    assert counter.item() == 5
    seen = x.detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), 0.2 * seen.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(var.double(), 0.8 + 0.2 * seen.var(1), rtol=1e-3, atol=1e-4)
    assert all(one._version > before for one, before in zip((mean, var, counter), versions, strict=True))


def test_running_statistics_that_overlap_are_refused():
    together = torch.arange(1.0, 5.0)
    with pytest.raises(ValueError, match="running_mean is written to, so it may not share memory with running_var"):
        nn.batch_norm(torch.randn(4, 3, 5), together[:3], together[1:], training=True)
    assert torch.equal(together, torch.arange(1.0, 5.0))
