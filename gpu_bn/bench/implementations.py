"""The implementations that are timed: our backends and their peers, each a row in :data:`IMPLEMENTATIONS`.

To add a peer, add a row. Its ``build(operation, problem)`` gets a problem in the arrays of the library, and returns the
call to time. The call returns the outputs in the order of ``operation.outputs``. ``build`` of our backends also takes a
``tier`` to force and an ``on_plan`` (:data:`gpu_bn.backends.protocol.OnPlan`). ``build`` is what imports the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import numpy as np

from gpu_bn import registry
from gpu_bn.backends.protocol import OnPlan
from gpu_bn.bench.cases import Case, Operation
from gpu_bn.bench.timing import TimedCall
from gpu_bn.functional import batch_norm, batch_norm_backward, batch_norm_forward
from gpu_bn.spec import VECTORS
from gpu_bn.testing import Problem

Array = Any
Function = Callable[..., Any]
Build = Callable[..., TimedCall]


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        device: ``cpu`` or ``cuda``.
        adapter: the key of :data:`gpu_bn.testing.ADAPTERS` that makes its arrays.
        modules: the modules that it needs, or ``this or that`` where one of two is enough.
        ours: whether it must meet the oracle's tolerances, and the command fails with it.
        refuses: returns why it does not serve a case; empty if it does.
        default: whether it is timed without being asked for by name.
    """

    name: str
    device: str
    adapter: str
    build: Build
    modules: tuple[str, ...] = ()
    ours: bool = False
    refuses: Callable[[Case], str] = lambda _: ""
    default: bool = True

    def forced(self, tier: str) -> Implementation:
        """Return this implementation with a forced tier, which is added to the name."""
        return replace(self, name=f"{self.name} {tier}", build=partial(self.build, tier=tier))

    @property
    def missing(self) -> str:
        """The modules that are not installed, in words."""
        return ", ".join(names for names in self.modules if not any(map(_installed, names.split(" or "))))


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except Exception:  # the parent package, which the search imports, is missing or fails
        return False


def backend_calls(make_backend: Callable[[str | None, OnPlan | None], Any]) -> Build:
    """Return the ``build`` of one of our backends; ``make_backend(tier, on_plan)`` returns the backend."""

    def build(operation: Operation, p: Problem, tier: str | None = None, on_plan: OnPlan | None = None) -> TimedCall:
        backend = make_backend(tier, on_plan)
        fused: dict[str, Any] = {"residual": p.residual, "activation": "relu" if operation.relu else None}
        arguments = (p.x, p.running_mean, p.running_var, p.weight, p.bias, operation.training, p.momentum, p.eps)
        if operation.direction == "eval":
            return lambda: (batch_norm(*arguments, **fused, backend=backend),)
        if operation.direction == "forward":
            return lambda: batch_norm_forward(*arguments, **fused, backend=backend)
        _, saved = batch_norm_forward(*arguments, **fused, backend=backend)
        return lambda: batch_norm_backward(p.dy, saved, backend=backend)

    return build


def gpu_backend_calls(name: str) -> Build:
    """Return the ``build`` of one of our GPU backends, which is loaded when a call is built."""
    return backend_calls(lambda tier, on_plan: cast(Any, type(registry.load(name)))(tier=tier, on_plan=on_plan))


# -------------------------------------------------------------------------------------------------------- NumPy
def textbook(operation: Operation, p: Problem) -> TimedCall:
    """Build a call that computes the formulas with one NumPy expression each, in float32 or wider."""
    axes, dtype = (0, *range(2, p.x.ndim)), p.x.dtype
    wide = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    count = p.x.size // p.x.shape[1]

    def column(vector: Array) -> Array:
        return vector.astype(wide).reshape(-1, *[1] * (p.x.ndim - 2))

    def forward() -> tuple[Array, Array, Array]:
        x = p.x.astype(wide, copy=False)
        if operation.training:
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        else:
            mean, var = column(p.running_mean), column(p.running_var)
        rstd = 1 / np.sqrt(var + wide.type(p.eps))
        xhat = (x - mean) * rstd
        z = column(p.weight) * xhat + column(p.bias)
        z = z if p.residual is None else z + p.residual.astype(wide, copy=False)
        y = np.maximum(z, 0) if operation.relu else z
        return y.astype(dtype, copy=False), xhat, rstd

    def backward() -> tuple[Array, ...]:
        dy = p.dy.astype(wide, copy=False)
        dz = np.where(y > 0, dy, 0) if operation.relu else dy
        dbias, dweight = dz.sum(axes), (dz * xhat).sum(axes)
        inner = dz - column(dbias) / count - xhat * column(dweight) / count
        dx = (column(p.weight) * rstd * inner).astype(dtype, copy=False)
        return (dx, dweight, dbias, *([] if p.residual is None else [dz.astype(dtype, copy=False)]))

    if operation.direction != "backward":
        return lambda: forward()[:1]
    y, xhat, rstd = forward()
    return backward


# -------------------------------------------------------------------------------------------------------- torch
def torch_norm(operation: Operation, p: Problem, inplace: bool = True) -> Function:
    """Return ``norm(x, weight, bias, residual)``: batch norm in torch, then the sum and ReLU, as networks write it."""
    functional: Any = import_module("torch.nn.functional")

    def norm(x: Array, weight: Array, bias: Array, residual: Array | None = None) -> Array:
        y = functional.batch_norm(
            x, p.running_mean, p.running_var, weight, bias, operation.training, p.momentum, p.eps
        )  # fmt: skip
        if residual is not None:
            y = y.add_(residual) if inplace else y + residual
        return functional.relu(y, inplace=inplace) if operation.relu else y

    return norm


def compiled_norm(operation: Operation, problem: Problem, inplace: bool = True) -> Function:
    """Return the function of :func:`torch_norm`, compiled by torch.compile for these shapes only."""
    torch: Any = import_module("torch")
    config: Any = import_module("torch._functorch.config")
    config.donated_buffer = False  # the backward graph runs more than once
    torch._dynamo.reset()  # else a later case might be compiled for dynamic shapes
    return cast(Function, torch.compile(torch_norm(operation, problem, inplace), dynamic=False))


def torch_call(make: Callable[[Operation, Problem], Function]) -> Build:
    """Return the ``build`` of a function of torch tensors, which ``make(operation, problem)`` returns."""

    def build(operation: Operation, p: Problem, **_: Any) -> TimedCall:
        tensors = [tensor for tensor in (p.x, p.weight, p.bias, p.residual) if tensor is not None]
        return _differentiated(operation, make(operation, p), tensors, p.dy)

    return build


eager, compiled = torch_call(torch_norm), torch_call(compiled_norm)


def _differentiated(operation: Operation, norm: Function, tensors: list[Array], dy: Array) -> TimedCall:
    """Build an operation's call of ``norm(*tensors)``; autograd differentiates it with respect to each tensor."""
    torch: Any = import_module("torch")
    if operation.direction == "eval":
        return cast(TimedCall, torch.no_grad()(lambda: (norm(*tensors),)))
    leaves = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in tensors]
    if operation.direction == "forward":
        return lambda: (norm(*leaves),)
    y = norm(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def without_cudnn(build: Build) -> Build:
    """Return a ``build`` whose calls are built and made with cuDNN switched off, so that torch uses its own kernels."""

    def build_without(operation: Operation, problem: Problem) -> TimedCall:
        off: Any = import_module("torch").backends.cudnn.flags(enabled=False)
        return cast(TimedCall, off(off(build)(operation, problem)))

    return build_without


# --------------------------------------------------------------------------------------------------------- apex
def apex_refuses(case: Case) -> str:
    """Return why apex does not serve a case; empty if it does. It has kernels for float16 in NHWC only."""
    if case.dtype != "float16" or case.layout != "nhwc" or len(case.shape) != 4:
        return "serves float16, four axes, nhwc"
    return "a sum is fused with ReLU only" if case.operation.residual and not case.operation.relu else ""


def apex(operation: Operation, p: Problem) -> TimedCall:
    """Build a call of apex.contrib.groupbn. Its tensors have channels as the last axis of the shape."""
    groupbn: Any = import_module("apex.contrib.groupbn.batch_norm")
    layer = groupbn.BatchNorm2d_NHWC(p.x.shape[1], fuse_relu=operation.relu).cuda().train(operation.training)
    for name in VECTORS:
        getattr(layer, name).data.copy_(getattr(p, name))
    layer.eps, layer.momentum = p.eps, p.momentum
    given = [tensor for tensor in (p.dy, p.x, p.residual) if tensor is not None]
    dy, x, *residual = (tensor.permute(0, 2, 3, 1).contiguous() for tensor in given)
    tensors = [x, layer.weight, layer.bias, *residual]  # autograd differentiates with respect to all of them
    call = _differentiated(operation, lambda x, _weight, _bias, *residual: layer(x, *residual), tensors, dy)
    return lambda: tuple(array.permute(0, 3, 1, 2) if array.ndim == 4 else array for array in call())


# ------------------------------------------------------------------------------------------------------- cuDNN
def cudnn_refuses(case: Case) -> str:
    """Return why the graph API of cuDNN does not serve a case; empty if it does."""
    if len(case.shape) != 4 or case.dtype == "float64":
        return "serves four axes, not float64"
    return "" if case.operation.training else "evaluation is not compared"


def cudnn(operation: Operation, p: Problem) -> TimedCall:
    """Build a call of a graph in cuDNN's frontend: batch norm, residual and ReLU with a mask, or its gradients."""
    graph = _Graph(p.x.device)
    torch, nodes, given = graph.torch, graph.nodes, graph.input
    running_mean, running_var, weight, bias = (getattr(p, name).view(1, -1, 1, 1) for name in VECTORS)
    eps, momentum = (given(torch.full((1, 1, 1, 1), number)) for number in (p.eps, p.momentum))
    z, mean, rstd, new_mean, new_var = nodes.batchnorm(
        name="bn", input=given(p.x), scale=given(weight), bias=given(bias), in_running_mean=given(running_mean),
        in_running_var=given(running_var), epsilon=eps, momentum=momentum,
    )  # fmt: skip
    graph.output(new_mean, running_mean)
    graph.output(new_var, running_var)
    if p.residual is not None:
        z = nodes.add(name="add", a=z, b=given(p.residual))
    mask = None
    if operation.relu:
        z = nodes.relu(name="relu", input=z)
        positive = nodes.cmp_gt(name="mask", input=z, comparison=given(torch.zeros_like(p.x)))
        mask = graph.output(positive, torch.empty_like(p.x, dtype=torch.bool))
    mean, rstd = (graph.output(node, torch.empty_like(weight)) for node in (mean, rstd))
    y = graph.output(z, torch.empty_like(p.x))
    if operation.direction == "forward":
        return lambda: graph.run(y)
    graph.run()
    return _cudnn_backward(operation, p, mean, rstd, mask)


def _cudnn_backward(operation: Operation, p: Problem, mean: Array, rstd: Array, mask: Array) -> TimedCall:
    """Build a call of a graph of the gradients, from what the forward graph has written."""
    graph = _Graph(p.x.device)
    empty, given = graph.torch.empty_like, graph.input
    parameter: Array = p.weight
    weight, dz, residuals = parameter.view(1, -1, 1, 1), given(p.dy), []
    if operation.relu:
        dz = graph.nodes.scale(name="drelu", input=dz, scale=given(mask))
        dz.set_data_type(p.x.dtype)
        residuals = [] if p.residual is None else [graph.output(dz, empty(p.x))]
    dx, *vectors = graph.nodes.batchnorm_backward(
        name="dbn", grad=dz, input=given(p.x), scale=given(weight), mean=given(mean), inv_variance=given(rstd)
    )
    gradients = [graph.output(node, empty(weight)).view(-1) for node in vectors]
    outputs = [graph.output(dx, empty(p.x)), *gradients, *residuals]
    return lambda: graph.run(*outputs)


class _Graph:
    """A cuDNN graph, its tensors and their memory."""

    def __init__(self, device: Any) -> None:
        self.torch: Any = import_module("torch")
        self.cudnn: Any = import_module("cudnn")
        self.handle, kind = _cudnn_handle(self.cudnn), self.cudnn.data_type.FLOAT
        self.cudnn.set_stream(handle=self.handle, stream=self.torch.cuda.current_stream().cuda_stream)
        self.nodes = self.cudnn.pygraph(intermediate_data_type=kind, compute_data_type=kind, handle=self.handle)
        self.device, self.memory, self.workspace = device, dict[Any, Array](), None

    def input(self, tensor: Array) -> Any:
        node = self.nodes.tensor_like(tensor)
        self.memory[node] = tensor
        return node

    def output(self, node: Any, tensor: Array) -> Array:
        node.set_output(True).set_data_type(tensor.dtype)
        self.memory[node] = tensor
        return tensor

    def run(self, *results: Array) -> tuple[Array, ...]:
        """Run the graph, compile it before the first run, and return ``results``, the memory of outputs."""
        if self.workspace is None:
            self.nodes.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
            size = self.nodes.get_workspace_size()
            self.workspace = self.torch.empty(size, device=self.device, dtype=self.torch.uint8)
        self.nodes.execute(self.memory, self.workspace, handle=self.handle)
        return results


_cudnn_handle = cache(lambda cudnn: cudnn.create_handle())


# --------------------------------------------------------------------------------------------------------- table
IMPLEMENTATIONS = [
    Implementation("gpu_bn cpu", "cpu", "numpy", backend_calls(lambda *_: registry.load("cpu")), ("numba",), ours=True),
    Implementation("gpu_bn numpy", "cpu", "numpy", backend_calls(lambda *_: registry.load("numpy")), ours=True),
    Implementation("torch CPU", "cpu", "torch", eager, ("torch",)),
    Implementation("textbook NumPy", "cpu", "numpy", textbook),
    Implementation("torch.compile CPU", "cpu", "torch", compiled, ("torch",), default=False),
    Implementation("gpu_bn triton", "cuda", "triton", gpu_backend_calls("triton"), ("torch", "triton"), ours=True),
    Implementation("gpu_bn cupy", "cuda", "cupy", gpu_backend_calls("cupy"), ("cupy",), ours=True),
    Implementation("torch cuDNN", "cuda", "triton", eager, ("torch",)),
    Implementation("torch native", "cuda", "triton", without_cudnn(eager), ("torch",)),
    Implementation("torch.compile", "cuda", "triton", compiled, ("torch", "triton")),
    Implementation("apex", "cuda", "triton", apex, ("torch", "apex.contrib.groupbn.bnp or bnp"), refuses=apex_refuses),
    Implementation("cuDNN frontend", "cuda", "triton", cudnn, ("torch", "cudnn"), refuses=cudnn_refuses),
]
"""All implementations. ``torch cuDNN`` is torch with its defaults: torch decides for each call whether to use cuDNN."""


def by_name(name: str) -> Implementation:
    """Return the implementation of a name."""
    return next(each for each in IMPLEMENTATIONS if each.name == name)


def choose(device: str, names: list[str] | None, torch_sees_it: bool = True) -> tuple[list[Implementation], list[str]]:
    """Choose our implementations for a device and the peers with these names; ``None`` stands for the default peers.

    Return those that can run here, and a line for each that cannot; raise ``ValueError`` for an unknown peer. If torch
    does not see the GPU, no implementation that needs torch can run, because torch would use the CPU.
    """
    on_device = [each for each in IMPLEMENTATIONS if each.device == device]
    known = [each.name for each in on_device if not each.ours]
    for name in names or []:
        if name not in known:
            raise ValueError(f"unknown peer {name!r}, expected some of {', '.join(known)}")
    wanted = [each for each in on_device if each.ours or (each.default if names is None else each.name in names)]
    unseen = [] if torch_sees_it else [each for each in wanted if "torch" in each.modules]
    why_not = {each.name: "torch does not see the GPU" for each in unseen}
    why_not |= {each.name: f"not installed: {each.missing}" for each in wanted if each.missing}
    return [each for each in wanted if each.name not in why_not], [f"{name}: {why}" for name, why in why_not.items()]
