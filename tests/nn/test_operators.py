"""Test the operators and the functional form: memory formats, autograd, backends for GPUs, and gpu_bn.batch_norm."""

import copy
import dataclasses

import pytest

import gpu_bn
from gpu_bn.activations import IDENTITY

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.operator_cases import reference, train_some
from support.tensors import inputs, running, tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn import nn
from gpu_bn.nn import functional
from gpu_bn.nn.operators import (
    library,
)

pytestmark = pytest.mark.usefixtures("forget_compilations")


# ------------------------------------------------------------------------------------------------------ behaviour
@pytest.mark.parametrize(
    ("shape", "memory_format"), [((4, 6, 5, 7), torch.channels_last), ((2, 6, 3, 4, 5), torch.channels_last_3d)]
)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_memory_format_of_outputs_and_gradients(shape, memory_format, activation):
    x, weight, bias, residual = (t.detach() for t in inputs(shape, torch.float32))
    x = x.to(memory_format=memory_format).requires_grad_()
    residual.requires_grad_()
    y = nn.batch_norm(x, None, None, weight, bias, True, residual=residual, activation=activation)
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.ones(shape))
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)
    assert dresidual.shape == residual.shape


@pytest.mark.parametrize("arrange", [
    lambda g: g.transpose(0, 2).contiguous().transpose(0, 2),
    lambda g: g[:1, :1, :1].expand_as(g),
    lambda g: torch.cat([g, g], 1)[:, ::2],
])  # fmt: skip
def test_gradients_of_any_strides(arrange):
    x, twin = tensor(4, 3, 5), tensor(4, 3, 5)
    dy = arrange(tensor(4, 3, 5, seed=4, grad=False))
    assert dy.shape == x.shape
    assert not dy.is_contiguous()
    nn.batch_norm(x, training=True, activation="relu").backward(dy)
    reference(twin, None, None, None, None, True, activation="relu").backward(dy)
    assert_close(x.grad, twin.grad)


def test_autocast_leaves_dtypes_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert model[1](x[:, :1].expand(-1, 4, -1, -1)).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_empty_batches_stay_in_the_graph():
    layer = nn.BatchNorm1d(3, activation="relu")
    x = torch.empty(0, 3, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    assert (layer.num_batches_tracked, layer.running_var.tolist()) == (1, [1.0] * 3)
    assert nn.batch_norm(torch.empty(2, 0, 3), training=True).shape == (2, 0, 3)


def test_statistics_changed_after_an_evaluation_do_not_change_its_gradient():
    layer, x = nn.BatchNorm1d(3), tensor(6, 3, dtype=torch.float32)
    expected = torch.autograd.grad(layer.eval()(x).square().sum(), x)[0]
    y = layer(x).square().sum()
    layer.train()(x + 100)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_what_is_overwritten_before_the_backward_pass_is_noticed():
    x = tensor(6, 3)
    copied = x * 1
    y = nn.batch_norm(copied, training=True)
    copied.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    mean, var = running(3)
    before = mean._version
    nn.batch_norm(x, mean, var, training=True)
    assert mean._version > before


def test_checkpointing_can_leave_statistics_alone():
    from torch.utils.checkpoint import checkpoint

    plain, twice, once = (nn.BatchNorm1d(3) for _ in range(3))
    gradients = []
    for layer, options in ((plain, None), (twice, {}), (once, {"context_fn": nn.checkpoint_contexts})):
        x = tensor(6, 3, dtype=torch.float32)
        y = layer(x) if options is None else checkpoint(layer, x, use_reentrant=False, **options)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert [layer.num_batches_tracked.item() for layer in (plain, twice, once)] == [1, 2, 1]
    assert torch.equal(plain.running_mean, once.running_mean)
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.usefixtures("process_group")
def test_two_forwards_before_one_backward_in_ddp():
    layer = nn.BatchNorm1d(3)
    model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
    x, other = tensor(6, 3, dtype=torch.float32), tensor(5, 3, dtype=torch.float32, seed=1)
    for module in (layer, model):
        (module(x).square().sum() + module(other).square().sum()).backward()
    assert_close(model.module.weight.grad, layer.weight.grad)
    assert torch.equal(model.module.running_mean, layer.running_mean)


def test_runs_under_the_deterministic_flag_and_gives_the_same_bits():
    def run():
        return train_some(nn.BatchNorm2d(16, activation="gelu"), tensor(8, 16, 20, 20, dtype=torch.float32, grad=False))

    before = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_and_saved_tensors_on_the_cpu():
    layer, x = nn.BatchNorm1d(3), tensor(6, 3, dtype=torch.float32)
    with torch.inference_mode():
        y = copy.deepcopy(layer)(x)
    assert torch.equal(y, layer(x))
    with torch.autograd.graph.save_on_cpu():
        z = layer(x).square().sum()
    z.backward()
    assert x.grad is not None


# ------------------------------------------------------------------------------------------ a backend like one of a GPU
class Elsewhere:
    """A CPU backend that acts like one on a GPU: momentum is a tensor, and a mask is saved instead of the residual."""

    name = "elsewhere"
    keeps_bits = True

    def __init__(self):
        self.cpu = library.registry.load("torch")
        self.momenta, self.residuals = [], []

    def __getattr__(self, name):
        return getattr(self.cpu, name)

    def forward(self, x, spec, *arguments):
        self.momenta.append(spec.momentum)
        spec = dataclasses.replace(spec, momentum=float(spec.momentum))
        y, saved = self.cpu.forward(x, spec, *arguments)
        if spec.activation.name == "relu" and saved.has_residual:
            saved = dataclasses.replace(saved, mask=(y > 0).to(torch.uint8).flatten(), residual=None)
        return y, saved

    def backward(self, dy, saved, need):
        self.residuals.append(saved.residual)
        if saved.mask is not None:
            dy = dy * saved.mask.view(dy.shape)
            saved = dataclasses.replace(saved, mask=None, spec=dataclasses.replace(saved.spec, activation=IDENTITY))
        return self.cpu.backward(dy, saved, need)


@pytest.fixture
def elsewhere(monkeypatch):
    pytest.importorskip("numba", reason="the backend that stands for one elsewhere needs Numba", exc_type=ImportError)
    backend = Elsewhere()
    monkeypatch.setattr(library.registry, "backend_for", lambda *_: backend)
    return backend


def test_cumulative_momentum_is_computed_where_the_counter_is(monkeypatch, elsewhere):
    """The momentum is computed on the device of the counter, so the host never reads a counter on a GPU."""
    counter, seen = torch.tensor(4, device="meta"), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    aten = torch.ops.aten  # each operation is a launch on a GPU
    for at, operations in ((None, [aten.add, aten.reciprocal]), (counter / 8, [aten._to_copy])):
        with Watch():
            weight = library.batch_weight(None, at, counter)
        assert (weight.dtype, weight.device) == (torch.float64, counter.device)
        assert seen == operations
        seen.clear()
    assert library.batch_weight(None, None, torch.tensor(4)) == 0.2
    monkeypatch.setattr(library, "batch_weight", lambda _, __, counter: (counter + 1).double().reciprocal())
    layer, plain = nn.BatchNorm1d(3, momentum=None), torch.nn.BatchNorm1d(3, momentum=None)
    for seed in range(3):
        x = tensor(6, 3, dtype=torch.float32, seed=seed)
        layer(x)
        plain(x)
    assert [m.item() for m in elsewhere.momenta] == pytest.approx([1, 1 / 2, 1 / 3])
    assert_close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_serves_in_place_of_the_residual(elsewhere, training):
    x, weight, bias, residual = inputs()

    def call(*given):
        x, weight, bias, residual = given
        mean, var = running()
        return nn.batch_norm(x, mean, var, weight, bias, training, residual=residual, activation="relu")

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias, residual))
    assert set(elsewhere.residuals) == {None}


def test_modes_and_subclasses_see_the_operator():
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    x = tensor(6, 3)
    with Watch():
        nn.batch_norm(x, training=True).sum().backward()
    assert {"gpu_bn.train.default", "gpu_bn.backward.default"} <= seen
    two = x.detach()
    negated = torch._neg_view(two)
    assert_close(nn.batch_norm(negated, training=True), nn.batch_norm(-two, training=True))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = nn.BatchNorm1d(3)(mode.from_tensor(x))
    assert type(fake) is torch._subclasses.FakeTensor


# ------------------------------------------------------------------------------------------------- gpu_bn.batch_norm
def test_the_front_door_differentiates_tensors():
    x, weight, bias, residual = inputs((4, 5, 3), torch.float64)
    for axis in (1, -1, 0):
        size = x.shape[axis]
        vectors = [v.detach()[:1].expand(size).clone().requires_grad_() for v in (weight, bias)]
        y = gpu_bn.batch_norm(
            x, None, None, *vectors, training=True, residual=residual, activation="relu", channel_axis=axis
        )
        expected = reference(x.movedim(axis, 1), None, None, *vectors, True, residual.movedim(axis, 1), "relu")
        assert_close(y, expected.movedim(1, axis))
        for ours, theirs in zip(*(torch.autograd.grad(v.square().sum(), (x, *vectors, residual)) for v in
                                  (y, expected)), strict=True):  # fmt: skip
            assert_close(ours, theirs)
    out = torch.empty(4, 5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        gpu_bn.batch_norm(x, training=True, out=out)
    with torch.no_grad():
        assert gpu_bn.batch_norm(x, training=True, out=out) is out
        assert torch.equal(out, gpu_bn.batch_norm(x, training=True))
    assert_close(gpu_bn.identity_affine(x.detach())[1], x.detach().mean((0, 2)))


def test_importing_the_package_and_arrays_do_not_import_torch():
    from support.fresh import loaded_after

    loaded = loaded_after("import gpu_bn.nn as nn, torch; nn.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).sum().backward()")
    assert "torch" in loaded
    assert "torch._dynamo" not in loaded  # importing it takes longer than importing torch
    loaded = loaded_after("import gpu_bn, numpy; gpu_bn.batch_norm(numpy.ones((4, 3)), training=True)")
    assert not {"torch", "gpu_bn.nn"} & loaded
    code = "import torch, gpu_bn; gpu_bn.batch_norm(torch.ones(4, 3), training=True)"
    assert "gpu_bn.nn.functional" in loaded_after(code)


def test_functional_is_where_layers_call():
    assert functional.batch_norm is nn.batch_norm
