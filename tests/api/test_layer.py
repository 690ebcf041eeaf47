"""The layer ``BatchNorm``: modes, state, accumulated gradients, refused calls, and agreement with torch's layer."""

import copy
import pickle

import numpy as np
import pytest
from support import read_only, rng, same_bits

import gpu_bn


def data(shape=(8, 3, 5), seed=0, dtype=np.float32):
    return rng(seed).standard_normal(shape).astype(dtype)


def pair(**options):
    """Return a layer of gpu_bn and one of torch with the same random parameters."""
    torch = pytest.importorskip("torch")
    ours, theirs = gpu_bn.BatchNorm(3, **options), torch.nn.BatchNorm1d(3, **options)
    for name, parameter in theirs.named_parameters():
        value = rng(len(name)).standard_normal(3).astype(np.float32)
        parameter.data.copy_(torch.from_numpy(value))
        getattr(ours, name)[...] = value
    return ours, theirs


def assert_same_state(ours, theirs):
    expected = theirs.state_dict()
    state = ours.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].shape == tuple(tensor.shape)
        assert state[name].dtype == tensor.numpy().dtype
        assert np.allclose(state[name], tensor.numpy(), rtol=1e-5, atol=1e-7), name


OPTIONS = [
    {},
    {"eps": 1e-3, "momentum": 0.4},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None, "track_running_stats": False},
    {"momentum": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_of_training_and_evaluation_give_what_torch_gives(options):
    torch = pytest.importorskip("torch")
    ours, theirs = pair(**options)
    assert_same_state(ours, theirs)
    for step, training in enumerate([True, True, False, True, False, False]):
        ours.train(training)
        theirs.train(training)
        x, dy = data(seed=step) * (1 + step) + step, data(seed=100 + step)
        tensor = torch.from_numpy(x).requires_grad_()
        expected = theirs(tensor)
        expected.backward(torch.from_numpy(dy))
        y, saved = (ours(x), None) if training else ours.forward_saving(x)
        assert np.allclose(y, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
        assert np.allclose(ours.backward(dy, saved), tensor.grad.numpy(), rtol=1e-4, atol=1e-5)
        assert_same_state(ours, theirs)
    assert ours.grad.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():  # gradients were added up over the steps
        assert np.allclose(ours.grad[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repr_is_that_of_torch(options):
    ours, theirs = pair(**options)
    assert repr(ours) == repr(theirs).replace("BatchNorm1d", "BatchNorm")


def test_repr_shows_the_activation():
    assert repr(gpu_bn.BatchNorm(3, activation=gpu_bn.elu(2.0))).endswith(", activation=elu(alpha=2.0))")


def test_an_activation_may_be_set_later():
    layer = gpu_bn.BatchNorm(3)
    layer.activation = "relu"
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert one.activation == gpu_bn.activations.Activation("relu")
        assert repr(one).endswith(", activation=relu)")
        assert one(data()).min() == 0
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        layer.activation = "swish"
    layer.activation = None
    assert "activation" not in repr(layer)
    assert layer(data()).min() < 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_goes_to_torch_and_comes_back(options):
    torch = pytest.importorskip("torch")
    ours, theirs = pair(**options)
    ours(data())
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    assert_same_state(ours, theirs)
    theirs(torch.from_numpy(data(seed=1)))
    ours.load_state_dict({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    assert_same_state(ours, theirs)
    assert np.allclose(ours.eval()(data()), theirs.eval()(torch.from_numpy(data())).detach().numpy(), atol=1e-5)


def test_torch_tensors_may_be_loaded_as_they_are():
    ours, theirs = pair()
    other = gpu_bn.BatchNorm(3)
    other.load_state_dict(theirs.state_dict())
    assert same_bits(other.state_dict(), ours.state_dict())


def test_tensors_in_half_precision_and_parameters_may_be_loaded():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(3).bfloat16()
    theirs(torch.from_numpy(data()).bfloat16())
    layer = gpu_bn.BatchNorm(3)
    layer.load_state_dict(theirs.state_dict(keep_vars=True))
    assert np.array_equal(layer.running_var, theirs.running_var.float().numpy())
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("reset", ["reset_running_stats", "reset_parameters"])
def test_a_reset_changes_all_or_nothing(reset):
    layer = gpu_bn.BatchNorm(3)
    layer(data())
    before = layer.state_dict()
    read_only(layer.running_var)
    with pytest.raises(ValueError, match="running_var is written to, but the array given is read-only"):
        getattr(layer, reset)()
    assert same_bits(layer.state_dict(), before)


def test_a_layer_that_stops_tracking_does_not_count():
    layer = gpu_bn.BatchNorm(3)
    layer.track_running_stats = False
    layer(data())
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("counter", [np.array(False), read_only(np.array(0)), 0], ids=["bool", "read-only", "int"])
def test_a_counter_that_cannot_count_is_refused_first(counter):
    layer = gpu_bn.BatchNorm(3)
    layer.num_batches_tracked = counter
    before = layer.running_mean.copy()
    with pytest.raises((TypeError, ValueError), match="num_batches_tracked"):
        layer(data())
    assert same_bits(layer.running_mean, before)


def test_state_is_a_copy_both_ways():
    layer = gpu_bn.BatchNorm(3)
    state = layer.state_dict()
    layer(data())
    assert not state["running_mean"].any()
    assert state["num_batches_tracked"] == 0
    other = gpu_bn.BatchNorm(3)
    other.load_state_dict(layer.state_dict())
    other(data(seed=1))
    assert layer.num_batches_tracked == 1
    assert other.num_batches_tracked == 2


def test_a_state_from_before_the_counter_is_accepted():
    layer = gpu_bn.BatchNorm(3)
    layer(data())
    state = layer.state_dict()
    del state["num_batches_tracked"]
    other = gpu_bn.BatchNorm(3)
    other.load_state_dict(state)
    assert same_bits(other.running_var, layer.running_var)
    assert other.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": None}, "missing ['weight'], unexpected nothing"),
        ({"scale": np.ones(3)}, "missing nothing, unexpected ['scale']"),
        ({"running_var": np.ones(4)}, "running_var should have shape (3,), got (4,)"),
        ({"num_batches_tracked": np.ones(1, int)}, "num_batches_tracked should have shape (), got (1,)"),
        ({"bias": np.array(["a", "b", "c"])}, "bias should be real numbers, got <U1"),
        ({"num_batches_tracked": 2**70}, "num_batches_tracked should be real numbers, got object"),
        ({"num_batches_tracked": 2.0**70}, "num_batches_tracked should be a whole number"),
        ({"num_batches_tracked": np.nan}, "num_batches_tracked should be a whole number, 0 or more, got nan"),
        ({"num_batches_tracked": 1.5}, "num_batches_tracked should be a whole number, 0 or more, got 1.5"),
        ({"num_batches_tracked": np.inf}, "num_batches_tracked should be a whole number, 0 or more, got inf"),
        ({"num_batches_tracked": -1}, "num_batches_tracked should be a whole number, 0 or more, got -1"),
        ({"weight": [[1], [2, 3]]}, "weight should be an array of numbers, got list"),
        ({"running_mean": np.ones(3, complex)}, "running_mean should be real numbers, got complex128"),
        ({"weight": np.zeros(3, "M8[s]")}, "weight should be real numbers, got datetime64[s]"),
        ({"running_var": np.ma.ones(3)}, "running_var should be an array without a mask"),
        ({"bias": [None] * 3}, "bias should be real numbers, got object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_that_does_not_fit_is_refused_whole(change, text):
    layer = gpu_bn.BatchNorm(3)
    before = layer.state_dict()
    state = {name: np.full_like(value, 5) for name, value in before.items()} | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        layer.load_state_dict(state)
    assert text in str(caught.value)
    assert same_bits(layer.state_dict(), before)


def test_a_state_that_is_not_strict_takes_what_fits():
    layer = gpu_bn.BatchNorm(3)
    layer.load_state_dict({"weight": np.full(3, 2.0), "scale": np.ones(3)}, strict=False)
    assert np.array_equal(layer.weight, [2, 2, 2])


def test_gradients_add_up_until_they_are_forgotten():
    layer = gpu_bn.BatchNorm(3)
    x, dy = data(), data(seed=1)
    _, saved = layer.forward_saving(x)
    layer.backward(dy, saved)
    once = {name: gradient.copy() for name, gradient in layer.grad.items()}
    layer.backward(dy, saved)
    assert all(np.array_equal(layer.grad[name], 2 * once[name]) for name in ("weight", "bias"))
    layer.zero_grad()
    assert layer.grad == {}
    layer.backward(dy, saved)
    assert same_bits(layer.grad, once)


def test_two_forwards_before_their_backwards():
    layer, alone = gpu_bn.BatchNorm(3), gpu_bn.BatchNorm(3)
    saved = [layer.forward_saving(data(seed=seed))[1] for seed in range(2)]
    for seed in range(2):
        alone(data(seed=seed))
        assert same_bits(layer.backward(data(seed=9), saved[seed]), alone.backward(data(seed=9)))
    assert same_bits(layer.grad, alone.grad)


def test_evaluation_forward_then_training_forward_then_evaluation_backward():
    layer, alone = gpu_bn.BatchNorm(3), gpu_bn.BatchNorm(3)
    _, saved = layer.eval().forward_saving(data())
    _, expected = alone.eval().forward_saving(data())
    layer.train()(data(seed=1))
    assert same_bits(layer.backward(data(seed=2), saved), alone.backward(data(seed=2), expected))


def test_a_residual_gets_its_gradient():
    layer = gpu_bn.BatchNorm(3, activation="relu")
    residual = data(seed=1)
    y = layer(data(), residual)
    dx, dresidual = layer.backward(np.ones_like(y))
    assert np.array_equal(dresidual, (y > 0).astype(np.float32))
    assert dx.shape == y.shape


def test_backward_without_forward_is_refused():
    with pytest.raises(RuntimeError, match="backward needs a call of forward"):
        gpu_bn.BatchNorm(3).backward(data())


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (data((1, 3)), ValueError),
        (data((4, 5)), ValueError),
        (data((3,)), ValueError),
        (np.ones((4, 3), int), TypeError),
        ([[1.0, 2.0, 3.0]], TypeError),
    ],
    ids=["one value a channel", "other channels", "rank", "integers", "list"],
)
def test_a_refused_call_leaves_statistics_and_counter(x, error):
    layer = gpu_bn.BatchNorm(3, momentum=None)
    layer(data())
    before = layer.state_dict()
    with pytest.raises(error):
        layer(x)
    assert same_bits(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_features": -1}, ValueError, "num_features should be a non-negative int, got -1"),
        ({"num_features": 2.5}, ValueError, "num_features should be a non-negative int, got 2.5"),
        ({"eps": -1.0}, ValueError, "eps must be non-negative, but got -1.0"),
        ({"momentum": "fast"}, TypeError, "momentum should be a number, got str"),
        ({"device": "gpu"}, ValueError, "device should be None, 'cpu' or 'cuda', got 'gpu'"),
        ({"dtype": np.int32}, TypeError, "dtype should be one of"),
        ({"dtype": np.int32, "affine": False}, TypeError, "should be one of"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ],
    ids=str,
)
def test_options_are_checked_when_the_layer_is_made(options, error, text):
    with pytest.raises(error) as caught:
        gpu_bn.BatchNorm(**({"num_features": 3} | options))
    assert text in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_dtype_is_that_of_parameters_and_statistics(dtype):
    layer = gpu_bn.BatchNorm(3, dtype=dtype)
    y = layer(data())
    layer.backward(y)
    assert y.dtype == np.float32
    names = ("weight", "bias", "running_mean", "running_var")
    assert {getattr(layer, name).dtype for name in names} == {np.dtype(dtype)}
    assert layer.grad["weight"].dtype == dtype


def test_resets():
    layer = gpu_bn.BatchNorm(3)
    fresh = layer.state_dict()
    layer(data())
    layer.weight[...] = layer.bias[...] = 7
    layer.reset_running_stats()
    assert np.array_equal(layer.weight, [7, 7, 7])
    assert layer.num_batches_tracked == 0
    layer.reset_parameters()
    assert same_bits(layer.state_dict(), fresh)


def test_parameters_are_the_arrays_themselves():
    layer = gpu_bn.BatchNorm(3)
    assert layer.parameters()["weight"] is layer.weight
    assert list(gpu_bn.BatchNorm(3, bias=False).parameters()) == ["weight"]
    assert gpu_bn.BatchNorm(3, affine=False).parameters() == {}


def test_channels_along_the_last_axis():
    layer, plain = gpu_bn.BatchNorm(5, channel_axis=-1), gpu_bn.BatchNorm(5)
    x = data((4, 3, 6, 5))
    assert np.allclose(layer(x), np.moveaxis(plain(np.moveaxis(x, -1, 1)), 1, -1), atol=1e-6)
    assert np.allclose(layer.running_var, plain.running_var)


def test_a_counter_without_momentum_averages_all_batches():
    layer = gpu_bn.BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [data(seed=seed, dtype=np.float64) + seed for seed in range(5)]
    for batch in batches:
        layer(batch)
    assert np.allclose(layer.running_mean, np.mean([batch.mean(axis=(0, 2)) for batch in batches], axis=0))
    assert np.allclose(layer.running_var, np.mean([batch.var(axis=(0, 2), ddof=1) for batch in batches], axis=0))
