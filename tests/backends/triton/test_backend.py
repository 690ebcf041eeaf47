"""The Triton backend on emulated devices: launches, arguments, and the phases of a call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import Device

import gpu_bn
from gpu_bn.call import Call
from gpu_bn.testing import ADAPTERS, Case, check
from gpu_bn.testing.cases import build

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn.backends.protocol import Moments
from gpu_bn.backends.triton import programs
from gpu_bn.plan import DEVICES

pytestmark = pytest.mark.compile


@pytest.fixture
def backend(compile_triton, device):
    return EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))


def test_launches(backend):
    """Each direction takes one launch; backward with frozen statistics two, if parameters have gradients."""
    x, dy, _, vectors = tensors((4, 3, 5))
    for options, need, launches in (
        ({"training": True}, None, (1, 1)),
        ({"training": False}, {"dx"}, (1, 1)),
        ({"training": False}, None, (1, 2)),
        ({"training": True}, {"dweight"}, (1, 1)),
    ):
        backend.steps.clear()
        _, saved = gpu_bn.batch_norm_forward(x, *vectors, backend=backend, **options)
        forward = len(backend.steps)
        gpu_bn.batch_norm_backward(dy, saved, need=need, backend=backend)
        assert (forward, len(backend.steps) - forward) == launches, options


def test_alike_calls_share_their_steps(backend):
    x, dy, _, vectors = tensors((4, 3, 5))
    for _ in range(2):
        _, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True, backend=backend)
        gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    first, second = backend.steps[:2], backend.steps[2:]
    assert all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "need", [{"dx"}, {"dbias"}, {"dresidual"}, {"dx", "dresidual"}, {"dweight", "dresidual"}], ids=sorted
)
@pytest.mark.parametrize("tier", ["split", pytest.param("cta", marks=pytest.mark.slow)])
def test_gradients_that_are_asked_for_are_as_with_all(tier, need, compile_triton, device):
    x, dy, residual, vectors = tensors((9, 3, 32, 32))
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    _, saved = gpu_bn.batch_norm_forward(
        x, *vectors, training=True, activation="relu", residual=residual, backend=backend
    )
    everything = gpu_bn.batch_norm_backward(dy, saved, backend=backend)._asdict()
    some = gpu_bn.batch_norm_backward(dy, saved, need=need, backend=backend)._asdict()
    assert {name for name, gradient in some.items() if gradient is not None} == need
    for name in need:
        torch.testing.assert_close(some[name], everything[name], rtol=1e-6, atol=1e-6)


def test_frozen_gradients_without_those_of_the_parameters(compile_triton, device):
    x, dy, residual, vectors = tensors((4, 3, 5, 8))
    backend = EmulatedBackend(device, compile_triton, 80)
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, activation="silu", residual=residual, backend=backend)
    everything = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    some = gpu_bn.batch_norm_backward(dy, saved, need={"dx", "dresidual"}, backend=backend)
    assert torch.equal(some.dx, everything.dx)
    assert torch.equal(some.dresidual, everything.dresidual)


def test_momentum_may_be_a_number_on_the_device(backend):
    x, _, _, vectors = tensors((4, 3, 5))
    spec = gpu_bn.spec.BatchNormSpec(1, True, 0.3, 1e-5, gpu_bn.activations.Activation.of(None))
    results = []
    for momentum in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        running = [vector.clone() for vector in vectors[:2]]
        backend.forward(Call(x, None, None, None, *running), replace(spec, momentum=momentum))
        results.append(running)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], vectors[0])


def test_running_statistics_of_any_stride_are_updated_in_place(backend):
    x, _, _, vectors = tensors((4, 3, 5))
    apart = torch.zeros(2, 3, 2)
    apart[0, :, 0], apart[1, :, 0] = vectors[0], vectors[1]
    gpu_bn.batch_norm(x, *vectors, training=True, backend=backend)
    gpu_bn.batch_norm(x, apart[0, :, 0], apart[1, :, 0], *vectors[2:], training=True, backend=backend)
    assert torch.equal(apart[0, :, 0], vectors[0])
    assert torch.equal(apart[1, :, 0], vectors[1])
    assert (apart[..., 1] == 0).all()


@pytest.mark.parametrize("momentum", [0.1, 1.0, torch.tensor(0.3)], ids=["0.1", "1", "on the device"])
@pytest.mark.parametrize("masked", [False, True])
def test_ghost_batches_update_running_statistics_in_order(masked, momentum, backend):
    """The update is that of one call for each ghost batch, but the number of operations does not grow with them."""
    operations = []
    for groups in (2, 32):
        counts = torch.tensor([5.0, 0.0, 1.0, 7.0] * 8, dtype=torch.float64)[:groups] if masked else 5
        mean, var = torch.randn(groups * 3, dtype=torch.float64), torch.rand(groups * 3, dtype=torch.float64)
        running = [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
        wanted = [vector.clone() for vector in running]
        with CountOperations() as count:
            backend.update_running(Moments(counts, mean, var), *running, momentum)
        for part in Moments(counts, mean, var).parts(groups):
            backend.update_running(part, *wanted, momentum)
        assert all(torch.allclose(*pair, rtol=1e-13) for pair in zip(running, wanted, strict=True))
        operations.append(count.number)
    assert operations[0] == operations[1]


class CountOperations(TorchDispatchMode):
    """Count the torch operations that run while it is active."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tier", ["split", "cta"])
def test_the_output_may_be_the_input(tier, compile_triton, device):
    x, _, residual, vectors = tensors((9, 3, 32, 32))
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    options = {"training": True, "activation": "relu", "residual": residual, "backend": backend}
    want = gpu_bn.batch_norm(x, *[v.clone() for v in vectors], **options)
    got = gpu_bn.batch_norm(x, *[v.clone() for v in vectors], out=x, **options)
    assert got is x
    assert torch.equal(got, want)


def test_overlapping_outputs_are_refused(backend):
    whole, _, _, vectors = tensors((8, 3, 5))
    x = whole[:4]
    with pytest.raises(ValueError, match="out may not be the input or overlap it"):
        gpu_bn.batch_norm_forward(x, *vectors, training=True, out=x, backend=backend)
    with pytest.raises(ValueError, match="should be the input itself or share no memory"):
        gpu_bn.batch_norm(x, *vectors, training=True, out=whole[1:5], backend=backend)
    apart = whole[..., :4]
    gpu_bn.batch_norm(apart[..., ::2], *vectors, training=True, out=apart[..., 1::2], backend=backend)
    assert backend.steps


class Phases:
    """A backend without the methods that fuse the phases."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        if name in ("forward", "backward"):
            raise AttributeError(name)
        return getattr(self._backend, name)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 7, 111), activation="relu", residual=True),
        Case((4, 8, 5, 6), "float16", "channels_last", activation="silu", residual=True),
        Case((4, 6, 5), activation="gelu", mode="eval"),
        Case((4, 6, 5), dy_layout="sliced"),
    ],
    ids=str,
)
@pytest.mark.one_in(2)
def test_the_phases_one_by_one(case, compile_triton, device):
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))
    assert check(case, Phases(backend))
    assert len(backend.steps) >= 3


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 2, 5000), activation="relu"),
        pytest.param(Case((3000, 24), "float16", activation="relu", residual=True), marks=pytest.mark.slow),
        pytest.param(Case((5, 2, 5000), mask="random", activation="relu"), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, pytest.param(89, marks=pytest.mark.slow)])
def test_long_shares_are_summed_in_chains(case, arch, compile_triton, device, monkeypatch):
    """Shares of several chains are summed right; chains are shortened, so that small tensors have several."""
    monkeypatch.setattr(programs, "CHAIN", 2)
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=1, arch=arch), tier="split")
    check(case, backend)
    for step in backend.steps:
        names = [parameter.name for parameter in step.kernel.params]
        constants = dict(zip(names[-len(step.tail) :], step.tail, strict=True))
        assert constants.get("CHAIN", 2) == 2
    assert any(step.kernel.__name__ == "bn_backward_reduce_kernel" for step in backend.steps)


@pytest.mark.parametrize("activation", ["relu6", pytest.param("leaky_relu", marks=pytest.mark.slow)])
def test_gradients_at_the_kinks_of_activations(activation, compile_triton, device):
    case = Case((4, 6, 5), activation=activation, affine="kinks")
    check(case, EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4)))


@pytest.mark.parametrize("arch", [80, 89])
def test_nan_stays_in_its_channel(arch, compile_triton):
    problem = build(Case((40, 24), activation="relu", residual=True))
    results = []
    for poison in (None, np.nan, np.inf):
        x = problem.x.copy()
        if poison is not None:
            x[3, 5] = poison
        planned = replace(DEVICES["a100"], sms=4, arch=arch)
        backend = EmulatedBackend(Device(), compile_triton, 80, planned, tier="split")
        tensor, dy = (ADAPTERS["triton"].to_backend(array) for array in (x, problem.dy))
        y, saved = gpu_bn.batch_norm_forward(tensor, None, None, training=True, activation="relu", backend=backend)
        dx = gpu_bn.batch_norm_backward(dy, saved, backend=backend).dx
        results.append((y, dx, saved.mean, saved.moments.var))
    others = [channel for channel in range(24) if channel != 5]
    for poisoned in results[1:]:
        for clean, got in zip(results[0], poisoned, strict=True):
            assert torch.equal(clean[..., others], got[..., others])
            assert not got[..., 5].isfinite().all()
