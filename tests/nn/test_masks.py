"""Test masks, ghost batches and batch renormalisation with torch: derivatives, operators, layers and errors."""

import pytest
from support import rng

import gpu_bn

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.tensors import inputs, running, tensor
from torch.library import opcheck

from gpu_bn import nn
from gpu_bn.call import Call
from gpu_bn.nn import functional
from gpu_bn.nn.operators import composition

SHAPE = (4, 2, 3)
MASK = torch.from_numpy(rng(9).random((4, 3)) < 0.6)
OPTIONS = [
    {"mask": MASK},
    {"virtual_batch_size": 2},
    {"mask": MASK[:, None].to(torch.uint8), "virtual_batch_size": 2},
    {"renorm": (1.2, 0.2)},
    {"renorm": (1.2, 0.2), "mask": MASK[..., :1]},
]


def name_options(options):
    return ", ".join(options)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
@pytest.mark.one_in(3)
def test_first_and_second_derivatives(options, activation):
    x, weight, bias, residual = inputs(SHAPE)
    fixed = {}
    if "renorm" in options:  # narrow bounds make r and d constant, as the gradient takes them
        fixed = {"mask": options.get("mask"), "renorm": (1.0 + 1e-9, 1e-9)}

    def call(x, weight, bias, residual):
        mean, var = running()
        chosen = options | fixed
        return nn.batch_norm(x, mean, var, weight, bias, True, residual=residual, activation=activation, **chosen)

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias, residual))


@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_the_gradient_of_the_gradient_is_of_the_same_function(options):
    """The operator and the composition that its second derivatives use agree in value and first gradient."""
    x, weight, bias, residual = inputs(SHAPE)
    mean, var = running()
    y = nn.batch_norm(x, mean, var, weight, bias, True, residual=residual, activation="silu", **options)
    valid = gpu_bn.algorithm.valid_positions(options["mask"], x.shape, 1) if "mask" in options else None
    limits = None
    if "renorm" in options:
        mean, var = running()
        moments = gpu_bn.registry.load("torch").stats(x.detach(), 1, valid)
        r = ((moments.var + 1e-5) / (var + 1e-5)).sqrt().clip(1 / 1.2, 1.2)
        limits = r, ((moments.mean - mean) / (var + 1e-5).sqrt()).clip(-0.2, 0.2)
    groups = 2 if "virtual_batch_size" in options else 1
    silu = gpu_bn.activations.Activation.of("silu")
    call = Call(x, weight, bias, residual, valid=valid)
    composed = composition.masked_batch_norm(call, 1e-5, silu, groups, limits)
    torch.testing.assert_close(y, composed)
    dy = tensor(*SHAPE, seed=5, grad=False)
    arguments = (x, weight, bias, residual)
    for a, b in zip(torch.autograd.grad(y, arguments, dy), torch.autograd.grad(composed, arguments, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_a_mask_in_evaluation(activation):
    x, weight, bias, residual = inputs(SHAPE)
    counted = MASK[:, None].expand(SHAPE)
    results = []
    for garbage in (0.0, float("nan")):
        leaves = [torch.where(counted, t, garbage).detach().requires_grad_() for t in (x, residual)]
        y = nn.batch_norm(leaves[0], *running(), weight, bias, residual=leaves[1], activation=activation, mask=MASK)
        dy = torch.where(counted, tensor(*SHAPE, seed=5, grad=False), garbage)
        results.append((y, *torch.autograd.grad(y, (leaves[0], weight, bias, leaves[1]), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][0][~counted].any()
    plain = nn.batch_norm(x, *running(), weight, bias, residual=residual, activation=activation)
    assert torch.equal(results[0][0][counted], plain[counted])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_memory_formats_are_kept(compiled, training, grad):
    shape = 3, 2, 5, 6
    x, residual = (tensor(*shape, seed=seed, grad=False).mT.contiguous().mT.requires_grad_(grad) for seed in range(2))
    mask = torch.ones(3, 5, 6, dtype=torch.bool)

    def call(x, residual):
        return nn.batch_norm(x, *running(), None, None, training, residual=residual, activation="silu", mask=mask)

    y = (torch.compile(call, backend="aot_eager") if compiled else call)(x, residual)
    assert y.stride() == x.stride()
    for gradient in torch.autograd.grad(y, (x, residual), tensor(*shape, grad=False)) if grad else ():
        assert gradient.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_what_a_mask_hides_is_never_used(training):
    results = []
    for garbage in (0.0, float("inf"), float("nan")):
        x, weight, bias, residual = inputs((4, 2, 3, 5))
        counted = torch.from_numpy(rng(3).random((4, 1, 3, 5)) < 0.5)
        hidden = [torch.where(counted, t, garbage).detach().requires_grad_() for t in (x, residual)]
        mean, var = running()
        y = nn.batch_norm(
            hidden[0], mean, var, weight, bias, training, residual=hidden[1], activation="silu", mask=counted
        )
        grads = torch.autograd.grad(y, (hidden[0], weight, bias, hidden[1]), torch.where(counted, x, garbage).detach())
        results.append((y, *grads, mean, var))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def arguments(name, options, activation):
    x, weight, bias, residual = inputs(SHAPE, torch.float32)
    mean, var = running(2, torch.float32)
    valid = gpu_bn.algorithm.valid_positions(options["mask"], SHAPE, 1) if "mask" in options else None
    groups = 2 if "virtual_batch_size" in options else 1
    renorm = list(options.get("renorm", ()))
    constants = (1e-5, activation, 0.0)
    given = (x, weight, bias, residual, mean, var)
    if name == "train":
        return *given, torch.tensor(3), None, *constants, valid, groups, renorm
    kept = torch.ops.gpu_bn.train(*given, None, 0.1, *constants, valid, groups, renorm)[1:]
    dy = tensor(*SHAPE, dtype=torch.float32, seed=5)
    last = (torch.float32, True, *constants, groups, bool(renorm), [True] * 4)
    return dy, x, weight, bias, residual, valid, *(t.detach() for t in kept), *last


@pytest.mark.parametrize("name", ["train", "backward"])
@pytest.mark.parametrize("options", OPTIONS[2:4], ids=name_options)
@pytest.mark.parametrize("activation", [pytest.param("identity", marks=pytest.mark.slow), "silu"])
@pytest.mark.one_in(3)
def test_opcheck(name, options, activation):
    results = opcheck(getattr(torch.ops.gpu_bn, name).default, arguments(name, options, activation))
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_training_in_one_graph():
    torch._dynamo.reset()
    norms = [nn.BatchNorm1d(2, virtual_batch_size=2, activation="relu") for _ in range(2)]
    compiled = torch.compile(norms[1], fullgraph=True, backend="aot_eager")
    results = []
    for norm, function in zip(norms, (norms[0], compiled), strict=True):
        x = tensor(*SHAPE, dtype=torch.float32)
        y = function(x, mask=MASK)
        y.square().sum().backward()
        results.append((y, x.grad, norm.weight.grad, *norm.state_dict().values()))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("axis", [1, -1])
def test_the_front_door_takes_tensors(axis):
    x, weight, bias, _ = inputs((4, 2, 3, 5))
    mask = torch.from_numpy(rng(3).random((4, 3, 5)) < 0.5)
    moved = x.movedim(1, axis)
    want = nn.batch_norm(x, *running(), weight, bias, True, mask=mask, virtual_batch_size=2)
    for given in (mask, mask.unsqueeze(axis)):
        y = gpu_bn.batch_norm(
            moved, *running(), weight, bias, True, channel_axis=axis, mask=given, virtual_batch_size=2
        )
        assert torch.equal(y.movedim(axis, 1), want)
        out = torch.empty_like(moved, requires_grad=False)
        with torch.no_grad():
            gpu_bn.batch_norm(
                moved, *running(), weight, bias, True, channel_axis=axis, mask=given, virtual_batch_size=2, out=out
            )
        torch.testing.assert_close(out.movedim(axis, 1), want.detach())


def test_layers():
    mask = torch.ones(4, 3, dtype=torch.bool)
    plain, layer = nn.BatchNorm1d(2), nn.BatchNorm1d(2, virtual_batch_size=2)
    assert repr(layer) == repr(plain)[:-1] + ", virtual_batch_size=2)"
    assert list(layer.state_dict()) == list(plain.state_dict())
    x = tensor(*SHAPE, dtype=torch.float32)
    y = layer(x, mask=mask)
    torch.testing.assert_close(y, torch.cat([plain(x[:2]), plain(x[2:])]))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert int(layer.num_batches_tracked) == 1
    assert layer.eval()(x[:3]).shape == (3, 2, 3)
    assert nn.LazyBatchNorm1d(virtual_batch_size=2)(x).shape == SHAPE
    with pytest.raises(ValueError, match="virtual_batch_size, which torch's layer would lose"):
        nn.revert(torch.nn.Sequential(layer))


def test_renormalising_layer_does_the_same_in_training_as_in_evaluation_in_the_end():
    layer = nn.BatchNorm1d(2, renorm=(1e6, 1e6), momentum=0.0)
    x = tensor(*SHAPE, dtype=torch.float32, grad=False)
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=1e-4, atol=1e-5)
    with nn.no_tracking():
        assert layer.train()(x).shape == SHAPE
    assert torch.equal(layer.running_var, torch.ones(2))


REFUSED = [
    ({"mask": MASK[:3]}, ValueError, "mask should broadcast"),
    ({"mask": MASK.float()}, TypeError, "mask should be one of bool, uint8, got float32"),
    ({"mask": MASK.numpy()}, TypeError, "mask should be a Tensor, got ndarray"),
    ({"virtual_batch_size": 3}, ValueError, "should divide the batch of 4, got 3"),
    ({"renorm": (2.0, 1.0), "training": False}, ValueError, "renorm needs training and running statistics"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_refusals_change_nothing(options, error, message):
    mean, var = running()
    count = torch.tensor(3)
    with pytest.raises(error, match=message):
        functional.batch_norm(tensor(*SHAPE), mean, var, **({"training": True, "num_batches_tracked": count} | options))
    assert torch.equal(mean, running()[0])
    assert torch.equal(var, running()[1])
    assert count == 3


def test_function_transforms_are_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: nn.batch_norm(x, training=True, mask=MASK).sum())(tensor(*SHAPE, grad=False))
