"""An array that is written may not share memory with another: every pair of arguments, four kinds of overlap."""

import numpy as np
import pytest
from support import rng

import gpu_bn
from gpu_bn import aliasing

SHAPE, CHANNELS = (5, 4, 6), 4
SIZES = {"out": SHAPE, "input": SHAPE, "residual": SHAPE, "mask": (5, 1, 6)}
ARGUMENTS = ["out", "running_mean", "running_var", "input", "weight", "bias", "residual", "mask"]
PAIRS = [
    (one, other)
    for at, one in enumerate(ARGUMENTS[:3])
    for other in ARGUMENTS[at + 1 :]
    if (one, other) not in [("out", "input"), ("out", "residual")]  # api/test_out.py tests these
]
KINDS = ["same start", "last element", "inside", "interlocked"]
"""How the second array lies in the memory of the first."""


def shape_of(name):
    return SIZES.get(name, (CHANNELS,))


def overlapping(one, other, kind, own=lambda array: array):
    """Return a buffer and two arguments that are views of it, with at least one element in common."""
    buffer = own(np.linspace(0.5, 2, 2000, dtype=np.float32))
    sizes = [int(np.prod(shape_of(name))) for name in (one, other)]
    first = buffer[800 : 800 + sizes[0]].reshape(shape_of(one))
    flat = buffer.view(np.uint8)[::4] if other == "mask" else buffer
    start, step = {
        "same start": (800, 1),
        "last element": (800 + sizes[0] - 1, 1),
        "inside": (800 + sizes[0] // 2, -1),
        "interlocked": (800 + sizes[0] - 1, -3),
    }[kind]
    second = flat[start:][: sizes[1]] if step == 1 else flat[start::step][: sizes[1]]
    return buffer, first, second.reshape(shape_of(other))


def arguments(**given):
    """Return the arrays of a call: those given, and new ones for the other arguments."""
    own = {name: rng().uniform(0.5, 2, shape_of(name)).astype(np.float32) for name in ARGUMENTS}
    own["mask"] = np.ones(shape_of("mask"), np.uint8)
    return own | given


def call(x, running_mean, running_var, weight, bias, **options):
    return gpu_bn.batch_norm(x, running_mean, running_var, weight, bias, True, activation="relu", **options)


def run(arrays, convert=lambda array: array, **options):
    arrays = {name: convert(array) for name, array in arrays.items()}
    vectors = [arrays.pop(name) for name in ("input", "running_mean", "running_var", "weight", "bias")]
    return call(*vectors, **arrays, **options)


LIBRARIES = ["numpy", "cpu", "torch"]
"""Two backends for NumPy arrays, and torch tensors on the CPU."""


def converter(library):
    if library != "torch":
        return lambda array: array
    torch = pytest.importorskip("torch")

    def convert(array):  # torch has no negative strides: reverse such axes, so that the tensor has the same elements
        if any(stride < 0 for stride in array.strides):
            array = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
        return torch.from_numpy(array)

    return convert


def options_of(library):
    return {} if library == "torch" else {"backend": library}


def require_refused(one, other, kind, convert, own=lambda array: array, **options):
    """Require that a call with two overlapping arrays raises and changes nothing."""
    buffer, first, second = overlapping(one, other, kind, own)
    arrays = {name: own(array) for name, array in arguments().items()}
    arrays |= {one: first, other: second}
    assert np.shares_memory(first, second)
    before, others = buffer.copy(), {name: array.copy() for name, array in arrays.items()}
    with pytest.raises(ValueError, match="may not share memory with") as caught:
        run(arrays, convert, **options)
    assert one in str(caught.value)
    assert other in str(caught.value)
    assert np.array_equal(buffer, before)
    assert all(np.array_equal(array, others[name]) for name, array in arrays.items())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_written_arrays_share_no_memory(one, other, kind, library):
    convert, options = converter(library), options_of(library)
    run(
        arguments(), convert, **options
    )  # the next call has this signature, so that the remembered path is checked, too
    require_refused(one, other, kind, convert, **options)


def ways(torch):
    """Return four calls with torch tensors: plain, with autograd, in a ``torch.func`` transform, by the operator."""
    from gpu_bn import nn

    def function(x, *vectors, **options):
        return nn.batch_norm(x, *vectors, True, activation="relu", **options)

    def differentiated(x, *vectors, **options):
        return function(x.detach().requires_grad_(), *vectors, **options)

    def transformed(x, *vectors, mask, **options):  # for the bias: a transformed tensor has no address
        del mask
        mean, var, weight, _ = vectors
        return torch.func.grad(lambda bias: function(x, mean, var, weight, bias, **options).sum())(torch.ones(4))

    def operator(x, mean, var, weight, bias, *, residual, mask):
        del mask
        return torch.ops.gpu_bn.train(x, weight, bias, residual, mean, var, None, 0.1, 1e-5, "relu", 0.0)

    return {"function": function, "differentiated": differentiated, "transformed": transformed, "operator": operator}


@pytest.mark.parametrize("way", ["function", "differentiated", "transformed", "operator"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_statistics_of_torchs_front_share_no_memory(way, masked):
    torch, convert = pytest.importorskip("torch"), converter("torch")
    call = ways(torch)[way]
    if masked and way in ("transformed", "operator"):
        pytest.skip("a mask is no argument of this call")
    for one, other in PAIRS:
        if one == "out" or (other == "mask" and not masked) or (way == "transformed" and other == "bias"):
            continue
        for kind in KINDS:
            buffer, first, second = overlapping(one, other, kind)
            tensors = {name: convert(array) for name, array in (arguments() | {one: first, other: second}).items()}
            del tensors["out"]
            tensors["mask"] = tensors["mask"][:, 0] if masked else None
            before = buffer.copy()
            vectors = [tensors.pop(name) for name in ("input", "running_mean", "running_var", "weight", "bias")]
            with pytest.raises(ValueError, match=r"may not share memory with|must be two tensors"):
                call(*vectors, **tensors)
            assert np.array_equal(buffer, before)


@pytest.mark.compile
def test_written_arrays_share_no_memory_on_an_emulated_gpu(make_gpu):
    """A valid call of the CuPy backend runs; then each pair of overlapping arguments is refused."""
    gpu = make_gpu(80)
    run({name: gpu.asarray(array) for name, array in arguments().items()})
    for one, other in PAIRS:
        for kind in KINDS:
            require_refused(one, other, kind, lambda array: array, gpu.asarray)


@pytest.mark.compile
def test_written_tensors_share_no_memory_on_an_emulated_gpu(compile_triton, device):
    """The Triton backend refuses each pair of overlapping arguments."""
    pytest.importorskip("torch")
    from support.triton_backends import EmulatedBackend

    backend, convert = EmulatedBackend(device, compile_triton), converter("torch")
    run(arguments(), convert, backend=backend)
    for one, other in PAIRS:
        for kind in KINDS:
            require_refused(one, other, kind, convert, backend=backend)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["out", "running_mean", "running_var"])
@pytest.mark.parametrize("kind", ["repeated", "overlapping windows"])
def test_written_arrays_do_not_overlap_themselves(name, kind, library):
    shape = shape_of(name)
    strides = (2,) if len(shape) == 1 else (4 * 23, 4 * 6, 4)
    if kind == "repeated":
        strides = (0, *[4] * (len(shape) - 1))
    memory = np.zeros(4000, np.float32)
    array = np.lib.stride_tricks.as_strided(memory, shape, strides)
    if library == "torch" and 2 in strides:
        pytest.skip("torch's strides are whole elements")
    if library == "torch":
        torch = pytest.importorskip("torch")
        whole = torch.from_numpy(memory)
        tensor = whole.as_strided(shape, [stride // 4 for stride in strides])
        given = {key: torch.from_numpy(value) for key, value in arguments().items()} | {name: tensor}
    else:
        given = arguments(**{name: array})
    with pytest.raises(ValueError, match=f"{name} is written to, but some of its elements share memory"):
        run(given, **options_of(library))
    assert not memory.any()


@pytest.mark.parametrize("library", LIBRARIES)
def test_neighbours_in_one_buffer_are_allowed(library):
    """Interleaved arrays, whose ranges of addresses overlap but whose elements do not, are accepted."""
    buffer = np.ones(2 * 4 * CHANNELS, np.float32)
    vectors = {name: buffer[at::8] for at, name in enumerate(ARGUMENTS) if shape_of(name) == (CHANNELS,)}
    assert len(vectors) == 4
    tensors = np.ones((*SHAPE, 2), np.float32)
    arrays = arguments(**vectors, out=tensors[..., 0], input=tensors[..., 1])
    expected = arguments(**{name: array.copy() for name, array in vectors.items()}, input=np.ones(SHAPE, np.float32))
    run(arrays, converter(library), **options_of(library))
    run(expected, converter(library), **options_of(library))
    assert all(np.array_equal(arrays[name], expected[name]) for name in ARGUMENTS)


def test_one_array_is_not_both_statistics():
    both = np.ones(CHANNELS, np.float32)
    layer = gpu_bn.BatchNorm(CHANNELS)
    layer.running_mean = layer.running_var = both
    with pytest.raises(ValueError, match="running_mean is written to, so it may not share memory with running_var"):
        layer(arguments()["input"])
    assert layer.num_batches_tracked == 0
    assert (both == 1).all()


def test_parameters_that_are_only_read_may_be_one_array():
    x, both = arguments()["input"], np.ones(CHANNELS, np.float32)
    y = gpu_bn.batch_norm(x, both, both, both, both)
    assert np.array_equal(y, gpu_bn.batch_norm(x, *(both.copy() for _ in range(4))))
    assert gpu_bn.batch_norm(x, training=True, residual=x).shape == x.shape


@pytest.mark.parametrize("seed", range(300))
def test_whether_an_array_overlaps_itself_is_told_exactly(seed):
    random = rng(seed)
    shape = random.integers(1, 5, random.integers(1, 4))
    strides = random.integers(-12, 13, len(shape))
    offsets = sum(
        np.arange(size).reshape([-1 if axis == at else 1 for axis in range(len(shape))]) * stride
        for at, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
    start = -int(offsets.min())
    memory = np.zeros(200, np.int32)
    array = np.lib.stride_tricks.as_strided(memory[start:], shape, 4 * strides)
    elements = (start + offsets).ravel()
    assert aliasing.overlaps_itself(array) == (len(set(elements.tolist())) < array.size)


def test_arrays_too_hard_to_tell_apart_are_refused(monkeypatch):
    monkeypatch.setattr(aliasing, "LIMIT", 1)
    memory = np.zeros(100_000, np.int8)
    one = np.lib.stride_tricks.as_strided(memory, (3, 4, 5, 6), (1001, 503, 211, 97))
    other = np.lib.stride_tricks.as_strided(memory[1:], (3, 4, 5, 6), (997, 509, 223, 89))
    assert aliasing.overlaps(one, other)
