"""torch tensors with the CuPy backend, on an emulated GPU that works on the memory of CPU tensors."""

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.cupy_on_emulator import backend_for_tensors

import gpu_bn
from gpu_bn import nn, registry

pytestmark = pytest.mark.compile
SHAPE = (4, 6, 5, 8)


@pytest.fixture
def engine(make_gpu, monkeypatch):
    """Return the backend, which takes CPU tensors and tensors that claim to be on a GPU."""
    return backend_for_tensors(make_gpu(80), monkeypatch)


def arguments(dtype=torch.float32):
    torch.manual_seed(0)
    x = (torch.randn(SHAPE) * 2 + 3).to(dtype)
    return x, torch.zeros(6), torch.ones(6), torch.rand(6) + 0.5, torch.randn(6)


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float16, torch.channels_last), (torch.bfloat16, torch.contiguous_format),
        (torch.float32, torch.channels_last), (torch.float64, torch.contiguous_format),
    ],
    ids=str,
)  # fmt: skip
def test_forward_and_backward(dtype, memory_format, engine):
    x, *vectors = arguments(dtype)
    x = x.to(memory_format=memory_format)
    dy = torch.randn(SHAPE).to(dtype)
    call = {"training": True, "residual": x * 0.5, "activation": "relu"}
    theirs = [vector.clone() for vector in vectors]
    want, want_saved = gpu_bn.batch_norm_forward(x, *theirs, **call)
    got, saved = gpu_bn.batch_norm_forward(x, *vectors, **call, backend=engine)
    assert engine.gpu.launched
    assert engine.gpu.launched_in == {1234}
    assert isinstance(got, torch.Tensor)
    assert (got.dtype, got.stride()) == (dtype, x.stride())
    assert saved.x is x
    grads = gpu_bn.batch_norm_backward(dy, saved, backend=engine)
    others = gpu_bn.batch_norm_backward(dy, want_saved)
    pairs = [(got, want), *zip(vectors, theirs, strict=True), *zip(grads, others, strict=True)]
    for mine, its in pairs:
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its)


class OnTheSecondGpu(torch.Tensor):
    """A CPU tensor that claims to be on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_kernels_run_where_the_tensors_are_on_the_current_stream_there(engine):
    theirs = arguments()
    x, *vectors = (tensor.clone().as_subclass(OnTheSecondGpu) for tensor in theirs)
    got, _ = gpu_bn.batch_norm_forward(x, *vectors, training=True, backend=engine)
    want, _ = gpu_bn.batch_norm_forward(*theirs, training=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(vectors[0].as_subclass(torch.Tensor), theirs[1])  # the running mean
    assert engine.gpu.launched
    assert engine.gpu.launched_on == {1}
    assert engine.gpu.launched_in == {1235}


def test_an_array_for_the_output_is_the_one_returned(engine):
    x, *vectors = arguments()
    out = torch.empty_like(x)
    assert gpu_bn.batch_norm(x, *vectors, out=out, backend=engine) is out
    torch.testing.assert_close(out, gpu_bn.batch_norm(x, *vectors))
    with pytest.raises(ValueError, match="out may not be the input"):
        gpu_bn.batch_norm_forward(x, *vectors, out=x, backend=engine)


def test_masks_and_ghost_batches(engine):
    x, *vectors = arguments()
    theirs = [vector.clone() for vector in vectors]
    call = {"training": True, "mask": torch.rand(4, 1, 5, 8) > 0.3, "virtual_batch_size": 2}
    want, want_saved = gpu_bn.batch_norm_forward(x, *theirs, **call)
    got, saved = gpu_bn.batch_norm_forward(x, *vectors, **call, backend=engine)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(vectors, theirs)
    dx = gpu_bn.batch_norm_backward(got, saved, need="dx", backend=engine).dx
    torch.testing.assert_close(dx, gpu_bn.batch_norm_backward(want, want_saved, need="dx").dx, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_renormalisation(dtype, engine):
    x, *vectors = arguments(dtype)
    vectors = [vectors[0] + 1, vectors[1] * 5, *(vector.to(dtype) for vector in vectors[2:])]
    theirs = [vector.clone() for vector in vectors]
    call = {"training": True, "renorm": (1.2, 0.3), "activation": "relu"}
    want, want_saved = gpu_bn.batch_norm_forward(x, *theirs, **call)
    got, saved = gpu_bn.batch_norm_forward(x, *vectors, **call, backend=engine)
    grads = gpu_bn.batch_norm_backward(got, saved, backend=engine)
    others = gpu_bn.batch_norm_backward(want, want_saved)
    for mine, its in [(got, want), *zip(vectors, theirs, strict=True), *zip(grads[:3], others[:3], strict=True)]:
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=0.02 if dtype is torch.bfloat16 else 1e-4)


def test_asked_for_by_name_it_is_differentiable_once(engine, monkeypatch):
    """A backend that is not the default for a tensor has first derivatives only."""
    monkeypatch.setattr(registry, "select", lambda *_, **__: engine)
    monkeypatch.setattr(registry, "default_name", lambda _: "triton")
    x, running_mean, running_var, weight, bias = arguments()
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    theirs = [running_mean.clone(), running_var.clone()]
    version = running_mean._version
    got = gpu_bn.batch_norm(x, running_mean, running_var, weight, bias, True, activation="silu", backend="cupy")
    want = nn.batch_norm(x, *theirs, weight, bias, True, activation="silu")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close([running_mean, running_var], theirs)
    assert running_mean._version > version
    dy = torch.randn(SHAPE)
    with pytest.raises(NotImplementedError, match="'cupy' has no second derivative"):
        torch.autograd.grad(got, leaves, dy, create_graph=True, retain_graph=True)
    grads = torch.autograd.grad(got, leaves, dy)
    torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, dy))


def test_a_name_may_have_a_backend_for_each_library():
    rows = [row for row in registry.ROWS if row.name == "cupy"]
    assert [row.library for row in rows] == ["cupy", "torch"]
    assert registry.NAMES.count("cupy") == 1
    with pytest.raises(ValueError, match=r"'cupy' serves arrays of type cupy.ndarray or torch.Tensor on cuda"):
        gpu_bn.batch_norm(torch.ones(2, 3), training=True, backend="cupy")


def test_an_unknown_method_is_an_attribute_error(engine):
    assert not hasattr(engine, "prefetch")
    assert hasattr(engine, "forward")
