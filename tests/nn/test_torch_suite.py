"""Run torch's own tests of its BatchNorm layers on ours: its inputs, references and error inputs."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="torch's internal test modules need the package expecttest"
)

from torch.testing import assert_close
from torch.testing._internal.common_utils import freeze_rng_state

from gpu_bn import nn

OURS = {
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
}
INFOS = [info for info in common_modules.module_db if info.module_cls in OURS]
MODES = [(info, training) for info in INFOS for training in (True, False)]


def samples(info, training, dtype=torch.float64):
    """Yield each of torch's inputs with a layer of gpu_bn and one of torch that have the same state."""
    given = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for sample in given:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        layers = []
        for cls in (OURS[info.module_cls], info.module_cls):
            with freeze_rng_state():
                layers.append(cls(*args, **kwargs).to(dtype).train(training))
        yield sample, *layers


def call(layer, sample):
    args = [copy.deepcopy(a.detach()).requires_grad_() for a in sample.forward_input.args]
    return layer(*args, **sample.forward_input.kwargs), args


def name(value):
    return getattr(getattr(value, "module_cls", value), "__name__", str(value))


def test_all_layers_are_there():
    assert {info.module_cls for info in INFOS} == set(OURS)


@pytest.mark.parametrize(("info", "training"), MODES, ids=name)
def test_forward_and_gradients(info, training):
    count = 0
    for sample, ours, theirs in samples(info, training):
        (y, args), (expected, their_args) = call(ours, sample), call(theirs, sample)
        assert_close(y, expected)
        if sample.reference_fn is not None:
            assert_close(y, sample.reference_fn(ours, list(ours.parameters()), *args))
        for output in (y, expected):
            output.sin().sum().backward()
        assert_close([a.grad for a in args], [a.grad for a in their_args])
        assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
        assert_close(ours.state_dict(), theirs.state_dict())
        assert repr(ours) == f"gpu_bn.{theirs!r}"
        count += 1
    assert count >= 2


@pytest.mark.parametrize(("info", "training"), MODES, ids=name)
def test_gradcheck_and_gradgradcheck(info, training):
    for sample, ours, _ in samples(info, training):
        _, args = call(ours, sample)
        parameters = dict(ours.named_parameters())

        def function(x, *values, layer=ours, names=tuple(parameters)):
            state = {key: value.clone() for key, value in layer.named_buffers()}
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)) | state, (x,))

        given = (args[0], *(p.detach().requires_grad_() for p in parameters.values()))
        assert torch.autograd.gradcheck(function, given, check_undefined_grad=False, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, given, check_undefined_grad=False, fast_mode=True)


@pytest.mark.parametrize(("info", "training"), MODES, ids=name)
def test_pickle_deepcopy_memory_format_and_strides(info, training):
    for sample, ours, _ in samples(info, training):
        for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert torch.equal(call(again, sample)[0], call(copy.deepcopy(ours), sample)[0])
        (x,) = [a.detach() for a in sample.forward_input.args]
        strided = x.repeat_interleave(2, -1)[..., ::2].requires_grad_()
        plain = x.clone().requires_grad_()
        y, expected = copy.deepcopy(ours)(strided), copy.deepcopy(ours)(plain)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y.sin().sum(), strided), torch.autograd.grad(expected.sin().sum(), plain))
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if x.dim() in formats:
            moved = x.to(memory_format=formats[x.dim()]).requires_grad_()
            z = ours(moved)
            assert_close(z, expected)
            assert z.is_contiguous(memory_format=formats[x.dim()])


@pytest.mark.parametrize("info", INFOS, ids=name)
def test_error_inputs(info):
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert errors
    for error in errors:
        args, kwargs = (
            error.module_error_input.constructor_input.args,
            error.module_error_input.constructor_input.kwargs,
        )
        layer = OURS[info.module_cls](*args, **kwargs)
        given = error.module_error_input.forward_input
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*given.args, **given.kwargs)


@pytest.mark.parametrize("info", INFOS, ids=name)
def test_factory_arguments_and_half_precision(info):
    layer = OURS[info.module_cls](3, device="meta", dtype=torch.float64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    for dtype in (torch.bfloat16, torch.float16):
        for sample, ours, theirs in samples(info, True, torch.float32):
            x = sample.forward_input.args[0].detach().to(dtype)
            assert_close(ours(x), theirs(x), rtol=2e-2, atol=2e-2)
