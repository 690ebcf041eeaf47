"""Run a case on a backend and compare every quantity with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gpu_bn.activations import Activation
from gpu_bn.backends.layout import memory_order
from gpu_bn.backends.protocol import Backend
from gpu_bn.functional import batch_norm_backward, batch_norm_forward
from gpu_bn.spec import VECTORS
from gpu_bn.testing.cases import Case, build
from gpu_bn.testing.oracle import Problem, oracle
from gpu_bn.testing.tolerance import tolerance, ulp

Array = Any


class Adapter(NamedTuple):
    """The functions that convert arrays to those of a backend and back."""

    to_backend: Callable[[Array], Array]
    to_numpy: Callable[[Array], Array]


def _to_torch(array: Array) -> Array:
    """Return a torch tensor in the memory of an array; copy it if torch cannot use its memory."""
    odd = any(stride < 0 or stride % array.itemsize for stride in array.strides) or not array.flags.aligned
    return _torch_cpu().as_tensor(array.copy("K") if odd or not array.flags.writeable else array)


def _torch_cpu() -> Any:
    return import_module("gpu_bn.backends.torch_cpu")


def _to_triton(array: Array) -> Array:
    """Return a tensor, on the GPU if there is one, with the values of an array and its strides, made positive."""
    import torch

    base = array[tuple(slice(None) if stride else slice(1) for stride in array.strides)]  # no repeated elements
    if any(stride < 0 for stride in base.strides) or not base.flags.writeable:
        base = base.copy(order="K")
    bits = base.view(np.int16) if str(array.dtype) == "bfloat16" else base
    tensor = torch.from_numpy(bits)
    tensor = tensor.view(torch.bfloat16) if bits is not base else tensor
    tensor = tensor.to("cuda") if torch.cuda.is_available() else tensor
    return tensor.expand(array.shape)


def _from_triton(tensor: Array) -> Array:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _from_cupy(array: Array) -> Array:
    """Copy a CuPy array to NumPy with the same order of axes in memory, which its method ``get`` does not keep."""
    order = memory_order(array.shape, array.strides)
    return array.transpose(order).get().transpose(np.argsort(order))


ADAPTERS: dict[str, Adapter] = {
    "numpy": Adapter(lambda array: array, lambda array: array),
    "cpu": Adapter(lambda array: array, lambda array: array),
    "cupy": Adapter(lambda array: import_module("gpu_bn.backends.cupy.backend").from_host(array), _from_cupy),
    "torch": Adapter(_to_torch, lambda tensor: _torch_cpu().as_array(tensor)),
    "triton": Adapter(_to_triton, _from_triton),
}
"""The adapters by the name of the backend. ``to_backend`` keeps shape, dtype and, if the library allows it, strides."""

TENSORS = ("x", "dy", "residual", "mask")
OPTIONS = ("virtual_batch_size", "renorm")
RUNNING = ("running_mean", "running_var")


def check(case: Case | Problem, backend: Backend | str = "numpy") -> dict[str, float]:
    """Run a case forward and backward and compare all results with the oracle.

    Args:
        case: a :class:`Case`, or a :class:`Problem` with any arrays.
        backend: a name in :data:`ADAPTERS`, or a backend object with such a name.

    Returns:
        For each quantity, the largest error as a share of the error allowed.

    Raises:
        AssertionError: an error exceeds the one allowed, a dtype, shape or memory format is wrong, or an argument was
            written to. The message names the case, the quantity and the element.
    """
    problem = build(case) if isinstance(case, Case) else case
    title = (
        f"{case if isinstance(case, Case) else 'problem'} on {backend if isinstance(backend, str) else backend.name}"
    )
    results = run(problem, backend, title)
    for name in ("y", "dx", "dresidual"):
        if name in results:
            _assert_same_format(f"{title}: {name}", results[name], problem.x)
    for name, parameter in (("dweight", problem.weight), ("dbias", problem.bias)):
        if parameter is not None:
            dtype = results[name].dtype
            assert dtype == parameter.dtype, f"{title}: {name} has dtype {dtype}, expected {parameter.dtype}"
    truth = oracle(problem)
    allowed = tolerance(problem, truth)
    return {
        name: compare(f"{title}: {name}", result, getattr(truth, name), allowed[name])
        for name, result in results.items()
    }


def compare(title: str, got: Array, exact: Array, allowed: Array) -> float:
    """Return the largest error of ``got``, as a share of ``allowed`` plus one ulp of the rounded exact value.

    Raises:
        AssertionError: the share exceeds 1, or the shapes differ. The message names the worst element.
    """
    assert got.shape == exact.shape, f"{title} has shape {got.shape}, expected {exact.shape}"
    if got.size == 0:
        return 0.0
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float64).astype(got.dtype).astype(np.float64)
        value = got.astype(np.float64)
        bound = np.broadcast_to(allowed + ulp(rounded, str(got.dtype)), exact.shape)
        share = np.abs(value - rounded) / bound
        same = (value == rounded) | (np.isnan(value) & np.isnan(rounded))
        share = np.where(same, 0, np.where(np.isnan(share), np.inf, share))
    worst = np.unravel_index(np.argmax(share), share.shape)
    index = tuple(map(int, worst))
    assert share[worst] <= 1, (
        f"{title}{list(index)}: expected {float(exact[worst]):.9g}, got {float(value[worst]):.9g}, "
        f"allowed {float(bound[worst]):.3g}, {int((share > 1).sum())} of {share.size} elements wrong"
    )
    return float(share[worst])


def run(problem: Problem, backend: Backend | str = "numpy", title: str = "problem") -> dict[str, Array]:
    """Call the public API for a problem and return the results as NumPy arrays by name.

    Raises:
        AssertionError: the call has written to an argument other than the running statistics in training.
    """
    adapter = ADAPTERS[backend if isinstance(backend, str) else backend.name]
    arguments = {name: getattr(problem, name) for name in TENSORS + VECTORS if getattr(problem, name) is not None}
    # Vectors are copied: the call updates the running statistics.
    sent = {name: adapter.to_backend(array.copy() if name in VECTORS else array) for name, array in arguments.items()}
    before = {name: array.tobytes() for name, array in arguments.items()}
    options = {name: getattr(problem, name) for name in OPTIONS if getattr(problem, name) is not None}
    if "mask" in sent:
        options["mask"] = sent["mask"]
    arrays: dict[str, Any] = {name: sent.get(name) for name in ("x", *VECTORS, "residual")}
    y, saved = batch_norm_forward(
        **arrays, training=problem.training, momentum=problem.momentum, eps=problem.eps,
        activation=Activation(*problem.activation), channel_axis=problem.channel_axis, backend=backend, **options,
    )  # fmt: skip
    grads = batch_norm_backward(sent["dy"], saved, backend=backend)
    writable = RUNNING if problem.training else ()
    for name, array in sent.items():
        same = name in writable or adapter.to_numpy(array).tobytes() == before[name]
        assert same, f"{title}: {name} was written to"
    got = {"y": y, "mean": saved.mean, "rstd": saved.rstd}
    got |= {name: sent[name] for name in RUNNING if name in sent}
    got |= {name: gradient for name, gradient in grads._asdict().items() if gradient is not None}
    return {name: adapter.to_numpy(array) for name, array in got.items()}


def _assert_same_format(title: str, array: Array, x: Array) -> None:
    """Require that an array has the shape, dtype and memory format of x; of a broadcast x any memory format will do."""
    assert array.shape == x.shape, f"{title} has shape {array.shape}, expected {x.shape}"
    assert array.dtype == x.dtype, f"{title} has dtype {array.dtype}, expected {x.dtype}"
    if x.size and all(stride or size == 1 for stride, size in zip(x.strides, x.shape, strict=True)):
        order, expected = (
            sorted((axis for axis in range(x.ndim) if x.shape[axis] > 1), key=lambda axis: -abs(strides[axis]))
            for strides in (array.strides, x.strides)
        )
        assert order == expected, f"{title}: the axes lie in memory as {order}, the input's as {expected}"
