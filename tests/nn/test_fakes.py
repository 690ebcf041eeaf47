"""Test that fake operators, which compilers call, match the real ones: for CPU tensors and for GPUs."""

from itertools import cycle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, RecordingBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from gpu_bn.nn.operators import library
from gpu_bn.plan import DEVICES


def misalign(x):
    """Copy a tensor to an address that is a multiple of an element's size, but not of 16 bytes."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.as_strided(x.shape, x.stride()).copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "misaligned": misalign,
    "misaligned channels_last": lambda x: misalign(x.to(memory_format=torch.channels_last)),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "gaps": lambda x: torch.cat((x, x), 1)[:, ::2],
    "every second, channels_last": lambda x: torch.cat((x, x), 3).to(memory_format=torch.channels_last)[..., ::2],
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :1].expand_as(x),
    "one value": lambda x: x[:1, :1, :1, :1].expand_as(x),
}
SHAPES = [(4, 8, 4, 4), (4, 3, 5, 7), (2, 16, 7, 7), (4, 1, 2, 4), (4, 8, 1, 1), (0, 3, 2, 2), (4, 5, 4, 2)]
ACTIVATIONS = [("silu", True), ("relu", True), ("identity", True), ("leaky_relu", False), ("relu6", True)]
EXTENSIONS = {
    "plain": (False, 1, []),
    "mask": (True, 1, []),
    "ghost batches": (False, 2, []),
    "mask in ghost batches": (True, 2, []),
    "renorm": (False, 1, [1.5, 0.5]),
}


def make_tensors(shape, dtype, layout, residual):
    make, generator = LAYOUTS[layout], torch.Generator().manual_seed(0)
    x, rest, dy = (make(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3))
    return x, rest if residual else None, dy


def make_vectors(channels):
    return torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)


def make_calls(shape, dtype, layout, activation, residual, extension):
    """Yield each operator with arguments. Those of ``backward`` contain the results of ``train`` or ``infer``."""
    masked, groups, renorm = EXTENSIONS[extension]
    x, rest, dy = make_tensors(shape, dtype, layout, residual)
    weight, bias = make_vectors(shape[1])
    valid = misalign(torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)) if masked else None
    forward = (x, weight, bias, rest)
    options = (1e-5, activation, 0.1)
    train = (*forward, *make_vectors(shape[1]), torch.tensor(3), None, *options, valid, groups, renorm)
    yield library.train, train
    pairs = [(True, library.train(*train), (valid, groups, bool(renorm)))]
    if extension == "plain":
        infer = (*forward, *make_vectors(shape[1]), *options)
        yield library.infer, infer
        pairs.append((False, library.infer(*infer), (None, 1, False)))
    for batch_stats, (_, statistics, mask), (valid, groups, limited) in pairs:
        kept = None if mask.numel() else rest
        for need in ([True] * 3 + [residual], [False, True, False, residual]):
            yield library.backward, (dy, *forward[:3], kept, valid, statistics, mask, torch.float32, batch_stats,
                                      *options, groups, limited, need)  # fmt: skip


def describe(result):
    return result.shape, result.stride() if result.numel() else None, result.dtype, result.device


def require_fake_equals_real(operator, arguments, expect_mask=None):
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        fake = operator(*given)
    assert [describe(result) for result in fake] == [describe(result) for result in real], operator
    memory = [value.untyped_storage().data_ptr() for value in (*arguments, *real)
              if isinstance(value, torch.Tensor) and value.numel()]  # fmt: skip
    inputs = sum(isinstance(value, torch.Tensor) and value.numel() > 0 for value in arguments)
    outputs = memory[inputs:]
    assert len(set(outputs)) == len(outputs), "two outputs share memory"
    assert not set(outputs) & set(memory[:inputs]), "an output is in an argument's memory"
    assert all(result.data_ptr() % 16 == 0 for result in real), "inductor asserts that outputs are aligned"
    if expect_mask is not None:
        assert (real[2].numel() > 0) == expect_mask


@pytest.fixture(params=["torch", "a100"])
def engine(request, monkeypatch):
    """Select the backend of CPU tensors, or a Triton backend that plans and allocates but records launches instead."""
    if request.param == "torch":
        return None
    backend = RecordingBackend(DEVICES[request.param])
    monkeypatch.setattr(library.registry, "backend_for", lambda *_: backend)
    return backend


@pytest.mark.parametrize("extension", [
    "plain", "mask in ghost batches",
    *[pytest.param(name, marks=pytest.mark.slow) for name in ("mask", "ghost batches", "renorm")],
])  # fmt: skip
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.one_in(3)
def test_fakes_say_what_operators_return(engine, layout, extension):
    cases = list(zip(SHAPES, cycle((torch.float32, torch.float16)), cycle(ACTIVATIONS), strict=False))
    cases += [(shape, torch.float16, ("relu", True)) for shape in SHAPES]
    cases = cases[list(LAYOUTS).index(layout) % 2 :: 2]
    for shape, dtype, (activation, residual) in cases:
        for operator, arguments in make_calls(shape, dtype, layout, activation, residual, extension):
            require_fake_equals_real(operator, arguments)
    if engine is not None:
        assert engine.launches or extension == "renorm"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("engine", ["a100"], indirect=True)
@pytest.mark.parametrize(("shape", "dtype", "layout", "length"), [
    ((4, 8, 4, 4), torch.float32, "contiguous", 128),
    ((4, 8, 4, 4), torch.float32, "misaligned", 128),
    ((4, 8, 4, 4), torch.float16, "misaligned", 64),
    ((4, 8, 3, 3), torch.float16, "channels_last", 36),
    ((4, 8, 3, 3), torch.float16, "misaligned channels_last", 36),
    ((4, 8, 3, 3), torch.float16, "contiguous", 0),
    ((4, 8, 4, 4), torch.float64, "contiguous", 256),
])  # fmt: skip
def test_the_masks_length_depends_on_no_address(shape, dtype, layout, length):
    x, rest, _ = make_tensors(shape, dtype, layout, True)
    for activation in ("relu", "relu6", "leaky_relu"):
        mask = library.train(x, None, None, rest, None, None, None, None, 1e-5, activation, 0.1)[2]
        assert mask.shape == (length,)
    assert library.train(x, None, None, rest, None, None, None, None, 1e-5, "silu", 0.0)[2].shape == (0,)


@pytest.mark.parametrize(
    "layout",
    [
        "misaligned channels_last",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("contiguous", "expanded batch")),
    ],
)
def test_masks_are_right_wherever_tensors_begin(layout, device, compile_triton, monkeypatch):
    """Gradients computed from sign bits on the emulated device equal those of the backend of CPU tensors."""
    for extension in ("plain", "mask in ghost batches"):
        found = []
        for backend in (EmulatedBackend(device, compile_triton, 80), None):
            if backend is not None:
                monkeypatch.setattr(library.registry, "backend_for", lambda *_, backend=backend: backend)
            operators = list(make_calls((4, 8, 2, 4), torch.float32, layout, "relu", True, extension))
            found.append([operator(*arguments) for operator, arguments in operators])
            monkeypatch.undo()
        assert found[0][0][2].numel() == 64
        for (operator, _), triton, cpu in zip(operators, *found, strict=True):
            picked = slice(None) if operator is library.backward else slice(1)
            for mine, theirs in zip(triton[picked], cpu[picked], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "misaligned channels_last"])
def test_opcheck_on_an_emulated_device(layout, device, compile_triton, monkeypatch):
    backend = EmulatedBackend(device, compile_triton, 80)
    monkeypatch.setattr(library.registry, "backend_for", lambda *_: backend)
    for operator, arguments in list(make_calls((2, 3, 2, 4), torch.float32, layout, "relu", True, "plain"))[:3]:
        given = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        results = opcheck(operator, tuple(given), test_utils=("test_schema", "test_faketensor"))
        assert set(results.values()) == {"SUCCESS"}
