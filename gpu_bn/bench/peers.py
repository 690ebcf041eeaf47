"""Peers: each function builds the call that one of them makes for an operation.

:mod:`gpu_bn.bench.implementations` lists them. A library is imported when a call of it is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from gpu_bn.bench.cases import Case, Operation
from gpu_bn.bench.timing import TimedCall
from gpu_bn.spec import VECTORS
from gpu_bn.testing import Problem

Array = Any
Function = Callable[..., Any]
Build = Callable[..., TimedCall]


def textbook(operation: Operation, problem: Problem) -> TimedCall:
    """Build the call of the formulas, each a line of NumPy, in float32 at least."""
    p, axes, dtype = problem, (0, *range(2, problem.x.ndim)), problem.x.dtype
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


def torch_norm(operation: Operation, problem: Problem, inplace: bool = True) -> Function:
    """Return torch's batch norm with a sum and ReLU behind it, as networks write it."""
    functional: Any = importlib.import_module("torch.nn.functional")
    p = problem

    def norm(x: Array, weight: Array, bias: Array, residual: Array | None = None) -> Array:
        y = functional.batch_norm(
            x, p.running_mean, p.running_var, weight, bias, operation.training, p.momentum, p.eps
        )  # fmt: skip
        if residual is not None:
            y = y.add_(residual) if inplace else y + residual
        return functional.relu(y, inplace=inplace) if operation.relu else y

    return norm


def compiled_norm(operation: Operation, problem: Problem, inplace: bool = True) -> Function:
    """Return the same by torch.compile, for these shapes only."""
    torch: Any = importlib.import_module("torch")
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False  # the backward graph is run again and again
    torch._dynamo.reset()  # each case is a new function: none should be compiled for shapes in general
    result: Function = torch.compile(torch_norm(operation, problem, inplace), dynamic=False)
    return result


def torch_call(make: Callable[[Operation, Problem], Function]) -> Build:
    """Return what builds calls of a function of torch's tensors: ``make(operation, problem)``."""

    def build(operation: Operation, problem: Problem, **_: Any) -> TimedCall:
        torch: Any = importlib.import_module("torch")
        norm, p = make(operation, problem), problem
        tensors = [t for t in (p.x, p.weight, p.bias, p.residual) if t is not None]
        if operation.direction == "eval":
            return _without_grad(lambda: (norm(*tensors),))
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        if operation.direction == "forward":
            return lambda: (norm(*leaves),)
        y = norm(*leaves)
        return lambda: torch.autograd.grad(y, leaves, p.dy, retain_graph=True)

    return build


eager, compiled = torch_call(torch_norm), torch_call(compiled_norm)


def _without_grad(call: TimedCall) -> TimedCall:
    quiet: TimedCall = importlib.import_module("torch").no_grad()(call)
    return quiet


def without_cudnn() -> Any:
    """Make torch use its own kernels only."""
    torch: Any = importlib.import_module("torch")
    return torch.backends.cudnn.flags(enabled=False)


def not_apex(case: Case) -> str:
    """Say why apex does not serve a case: it has kernels for float16 in NHWC only."""
    if case.dtype != "float16" or case.layout != "nhwc" or len(case.shape) != 4:
        return "serves float16, four axes, nhwc"
    return "a sum is fused with ReLU only" if case.operation.residual and not case.operation.relu else ""


def apex(operation: Operation, problem: Problem) -> TimedCall:
    """Build the call of apex.contrib.groupbn, on the tensors as they lie in memory."""
    torch: Any = importlib.import_module("torch")
    groupbn: Any = importlib.import_module("apex.contrib.groupbn.batch_norm")
    p = problem
    norm = groupbn.BatchNorm2d_NHWC(p.x.shape[1], fuse_relu=operation.relu).cuda().train(operation.training)
    for name in VECTORS:
        getattr(norm, name).data.copy_(getattr(p, name))
    norm.eps, norm.momentum = p.eps, p.momentum
    x, dy, residual = (None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in (p.x, p.dy, p.residual))
    inputs = [x] if residual is None else [x, residual]

    def seen(tensor: Array) -> Array:
        return tensor.permute(0, 3, 1, 2)

    if operation.direction == "eval":
        return _without_grad(lambda: (seen(norm(*inputs)),))
    inputs = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    if operation.direction == "forward":
        return lambda: (seen(norm(*inputs)),)
    y = norm(*inputs)
    leaves = [inputs[0], norm.weight, norm.bias, *inputs[1:]]

    def backward() -> tuple[Array, ...]:
        dx, dweight, dbias, *rest = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return (seen(dx), dweight, dbias, *map(seen, rest))

    return backward


def not_cudnn(case: Case) -> str:
    """Say why cuDNN's graphs of batch norm with fusions do not serve a case."""
    if len(case.shape) != 4 or case.dtype == "float64":
        return "serves four axes, not float64"
    return "" if case.operation.training else "evaluation is not compared"


def cudnn(operation: Operation, problem: Problem) -> TimedCall:
    """Build a graph of cuDNN's Python frontend: batch norm, sum, ReLU with a mask; or the gradients of that."""
    graph = _Graph(problem)
    y, mean, rstd, mask = _cudnn_forward(graph, operation, problem)
    if operation.direction == "forward":
        return lambda: graph.execute(y)
    graph.execute()
    return _cudnn_backward(operation, problem, mean, rstd, mask)


class _Graph:
    """Hold a cuDNN graph, its tensors, and their memory."""

    def __init__(self, problem: Problem) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.cudnn: Any = importlib.import_module("cudnn")
        types, kinds = self.cudnn.data_type, self.torch
        self.types = {
            kinds.float16: types.HALF, kinds.bfloat16: types.BFLOAT16, kinds.float32: types.FLOAT,
            kinds.bool: types.BOOLEAN,
        }  # fmt: skip
        self.handle = _cudnn_handle(self.cudnn)
        self.cudnn.set_stream(handle=self.handle, stream=self.torch.cuda.current_stream().cuda_stream)
        self.graph = self.cudnn.pygraph(
            io_data_type=self.types[problem.x.dtype], intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT, handle=self.handle,
        )  # fmt: skip
        self.device = problem.x.device
        self.memory: dict[Any, Array] = {}
        self.workspace: Array = None

    def input(self, tensor: Array) -> Any:
        node = self.graph.tensor_like(tensor)
        self.memory[node] = tensor
        return node

    def output(self, node: Any, tensor: Array) -> Array:
        node.set_output(True).set_data_type(self.types[tensor.dtype])
        self.memory[node] = tensor
        return tensor

    def execute(self, *results: Array) -> tuple[Array, ...]:
        if self.workspace is None:
            modes = self.cudnn.heur_mode
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([modes.A, modes.FALLBACK])
            self.graph.check_support()
            self.graph.build_plans()
            size = self.graph.get_workspace_size()
            self.workspace = self.torch.empty(size, device=self.device, dtype=self.torch.uint8)
        self.graph.execute(self.memory, self.workspace, handle=self.handle)
        return results


@cache
def _cudnn_handle(cudnn: Any) -> Any:
    return cudnn.create_handle()


def _cudnn_forward(graph: _Graph, operation: Operation, p: Problem) -> tuple[Array, Array, Array, Array]:
    torch, bn = graph.torch, graph.graph
    vectors = {n: getattr(p, n).view(1, -1, 1, 1) for n in VECTORS}
    numbers = [graph.input(torch.full((1, 1, 1, 1), number)) for number in (p.eps, p.momentum)]
    running = [vectors["running_mean"], vectors["running_var"]]
    inputs = [graph.input(running[0]), graph.input(running[1])]
    z, mean, rstd, new_mean, new_var = bn.batchnorm(
        name="bn", input=graph.input(p.x), scale=graph.input(vectors["weight"]), bias=graph.input(vectors["bias"]),
        in_running_mean=inputs[0], in_running_var=inputs[1], epsilon=numbers[0], momentum=numbers[1],
    )  # fmt: skip
    saved = [graph.output(node, torch.empty_like(running[0])) for node in (mean, rstd)]
    for node, tensor in zip((new_mean, new_var), running, strict=True):
        graph.output(node, tensor)
    if p.residual is not None:
        z = bn.add(name="add", a=z, b=graph.input(p.residual))
    mask = None
    if operation.relu:
        z = bn.relu(name="relu", input=z)
        positive = bn.cmp_gt(name="mask", input=z, comparison=graph.input(torch.zeros_like(p.x)))
        mask = graph.output(positive, torch.empty_like(p.x, dtype=torch.bool))
    return graph.output(z, torch.empty_like(p.x)), saved[0], saved[1], mask


def _cudnn_backward(operation: Operation, p: Problem, mean: Array, rstd: Array, mask: Array) -> TimedCall:
    graph = _Graph(p)
    torch, bn = graph.torch, graph.graph
    dz, outputs = graph.input(p.dy), {}
    if operation.relu:
        dz = bn.scale(name="drelu", input=dz, scale=graph.input(mask))
        dz.set_data_type(graph.types[p.x.dtype])
        if p.residual is not None:
            outputs["dresidual"] = graph.output(dz, torch.empty_like(p.x))
    weight = graph.torch.as_tensor(p.weight).view(1, -1, 1, 1)
    dx, dweight, dbias = bn.batchnorm_backward(
        name="dbn", grad=dz, input=graph.input(p.x), scale=graph.input(weight), mean=graph.input(mean),
        inv_variance=graph.input(rstd),
    )  # fmt: skip
    outputs["dx"] = graph.output(dx, torch.empty_like(p.x))
    for name, node in (("dweight", dweight), ("dbias", dbias)):
        outputs[name] = graph.output(node, torch.empty_like(weight)).view(-1)
    return lambda: graph.execute(*(outputs[name] for name in operation.outputs))
