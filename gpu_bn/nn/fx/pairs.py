"""Find the pairs of a layer and the normalisation that alone reads its outputs: in the graphs or in a call of a model.

A pair can be folded if nothing else reads the outputs, parameters or buffers of the two.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn.modules import conv, pooling
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn.nn.fx.aliases import module_of
from gpu_bn.nn.fx.forward import is_watched
from gpu_bn.nn.fx.graph import is_layer, is_leaf
from gpu_bn.nn.fx.inspection import is_inspected, report_reads
from gpu_bn.nn.fx.trace import Refused, record_steps

Pairs = list[tuple[Any, Any]]
"""Layers, each with its normalisation."""
Reasons = dict[torch.nn.Module, str]
"""Normalisations, each with the reason why it is in no pair."""
OTHERS = "others read the outputs or parameters of the layer before it, or call one of the two"
INSPECTED = "the model's code asks for its class or attributes"


def traced_pairs(model: torch.nn.Module) -> tuple[Pairs, Reasons]:
    """Find the pairs in the graph of a model. If a module cannot be traced, search the graphs of its children."""
    pairs: Pairs = []
    reasons: Reasons = {}
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(tensor) for module in model.modules() for tensor in _tensors_of(module))
    pending, visited = [model], set()
    while pending:
        module = pending.pop()
        if module in visited:
            continue
        visited.add(module)
        if is_leaf(module):  # a ModuleList is a leaf too
            pending += module.children()
            continue
        inspected: set[torch.nn.Module] = set()
        try:
            with report_reads(list(filter(is_layer, module.modules())), inspected.add):
                graph = record_steps(module, partial(_enters, inspected), run=False).graph
        except Refused as error:
            reasons.update((child, f"{type(module).__name__}: {error}") for child in module.children())
            pending += module.children()
            continue
        for layer, norm, alone in _pairs_in(module, graph):
            once = module is model or names[layer] == names[norm] == 1
            tied = any(owners[id(tensor)] > 1 for each in (layer, norm) for tensor in _tensors_of(each))
            if norm in inspected or not alone or not once or tied:
                reasons[norm] = INSPECTED if norm in inspected else OTHERS
            else:
                pairs.append((layer, norm))
    return pairs, reasons


def _pairs_in(root: torch.nn.Module, graph: Graph) -> Iterator[tuple[Any, Any, bool]]:
    """Yield each layer, the normalisation that reads it in a graph, and whether nothing else there uses the two."""
    calls = Counter(module_of(root, node) for node in graph.nodes)
    read = Counter(id(attrgetter(str(node.target))(root)) for node in graph.nodes if node.op == "get_attr")
    for node in graph.nodes:
        norm = module_of(root, node)
        source = node.args[0] if node.args else node.kwargs.get("input")
        layer: Any = module_of(root, source)
        if norm is None or layer is None or not is_layer(norm):
            continue
        once = calls[layer] == calls[norm] == len(source.users) == [*node.args, *node.kwargs.values()].count(source)
        unread = not any(read[id(tensor)] for each in (layer, norm) for tensor in _tensors_of(each))
        yield layer, norm, once and unread and node.kwargs.get("mask") is None and len(node.args) < 4


def _tensors_of(module: torch.nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module without those of its children."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


VARIANTS = (conv._ConvNd, pooling._AvgPoolNd, pooling._MaxPoolNd)
"""Classes whose subclasses in other libraries compute a padding from the shape of the input: they cannot be traced."""


def _enters(inspected: set[torch.nn.Module], called: torch.nn.Module, *_: Any) -> bool:
    """Tell whether the own steps of a called module become part of the graph. Add inspected normalisations to a set."""
    if is_layer(called) and is_inspected(called, record_steps.__code__):
        inspected.add(called)
    return not (is_leaf(called) or is_watched(called) or (isinstance(called, VARIANTS) and not called._modules))


def observed_pairs(model: torch.nn.Module, inputs: Iterable[Any], options: dict[str, Any]) -> tuple[Pairs, Reasons]:
    """Call a model and find the pairs in this call."""
    watch = _Watch(model)
    try:
        with report_reads(watch.norms, watch.inspect), torch.no_grad(), watch, _DispatchWatch(watch):
            result = model(*inputs, **options)
    finally:
        watch.end()
    for tensor in _tensors(result):
        watch.count_read(tensor)
    del result
    return watch.pairs()


class _Watch(TorchFunctionMode):
    """Record during a call which layer returns a tensor, and who reads it. Tensors are identified by their ids."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()  # of outputs, parameters and buffers, outside layers and normalisations
        self.producers: dict[int, Any] = {}  # the layer that returned a tensor
        self.outputs: dict[Any, list[Tensor]] = {}  # of each layer; kept, or another tensor could get the id of one
        self.inputs: dict[Any, list[Any]] = {}  # of each normalisation; None for one that no layer returned, or masked
        self.depth = 0  # the number of layers and normalisations that are running, one within the other
        self.layers = [module for module in model.modules() if is_leaf(module) and not is_layer(module)]
        self.norms = [module for module in model.modules() if is_layer(module)]
        self.tensors = {id(tensor) for module in model.modules() for tensor in _tensors_of(module)}
        self.inspected: set[torch.nn.Module] = set()
        self.handles: list[Any] = []
        for module in (*self.layers, *self.norms):
            if not isinstance(module, torch.jit.ScriptModule) and (module._parameters or module._buffers):
                self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: Any, arguments: Any, options: Any) -> None:
        if self.depth == 0:
            others = [*arguments, *options.values()]
            if is_layer(module):
                if is_inspected(module, observed_pairs.__code__):
                    self.inspect(module)
                x = arguments[0] if arguments else options.get("input")
                plain = len(arguments) < 4 and options.get("mask") is None
                self.inputs.setdefault(module, []).append(id(x) if plain and id(x) in self.producers else None)
                others = [*arguments[1:], *(value for name, value in options.items() if name != "input")]
            for tensor in _tensors(others):
                self.count_read(tensor)
        self.depth += 1

    def inspect(self, norm: torch.nn.Module) -> None:
        """Note that the model's code inspects a normalisation."""
        if self.depth == 0:
            self.inspected.add(norm)

    def _leave(self, module: Any, _arguments: Any, _options: Any, result: Any) -> None:
        self.depth -= 1
        if self.depth == 0 and isinstance(result, Tensor) and not is_layer(module):
            self.producers[id(result)] = module
            self.outputs.setdefault(module, []).append(result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if self.depth == 0 and not _is_metadata(func):
            for tensor in _tensors((args, kwargs)):
                self.count_read(tensor)
        return func(*args, **(kwargs or {}))

    def count_read(self, tensor: Tensor) -> None:
        """Count a read of a tensor if it is a layer's output, a parameter or a buffer."""
        if id(tensor) in self.producers or id(tensor) in self.tensors:  # a freed tensor's id may become an output's
            self.reads[id(tensor)] += 1

    def pairs(self) -> tuple[Pairs, Reasons]:
        """Find the layers all of whose outputs go into one normalisation, which reads nothing else."""
        found: Pairs = []
        reasons: Reasons = {}
        if any(map(_is_referenced, self.outputs.values())):
            gc.collect()  # frames of the call, which hold tensors, may be in cycles of references
        norm_reads = Counter(source for inputs in self.inputs.values() for source in inputs)
        owners = Counter(id(tensor) for module in (*self.layers, *self.norms) for tensor in _tensors_of(module))
        for norm, inputs in self.inputs.items():
            layers = {self.producers.get(source) for source in inputs}
            layer = layers.pop() if len(layers) == 1 else None
            if layer is None:
                continue
            outputs = [id(tensor) for tensor in self.outputs[layer]]
            tensors = [tensor for each in (layer, norm) for tensor in _tensors_of(each)]
            alone = (
                sorted(outputs) == sorted(inputs)
                and all(norm_reads[output] == 1 and self.reads[output] == 0 for output in outputs)
                and not any(self.reads[id(tensor)] or owners[id(tensor)] > 1 for tensor in tensors)
                and not _is_referenced(self.outputs[layer])
            )
            weight = getattr(layer, "weight", None)
            if norm in self.inspected:
                reasons[norm] = INSPECTED
            elif alone and isinstance(weight, Tensor) and all(y.dim() == weight.dim() for y in self.outputs[layer]):
                found.append((layer, norm))
            else:
                reasons[norm] = OTHERS if not alone else "the outputs before it have other axes"
        reasons.update((norm, "the model did not call it") for norm in self.norms if norm not in self.inputs)
        return found, reasons


def _is_referenced(outputs: list[Tensor]) -> bool:
    """Tell whether anything but the list refers to one of the tensors."""
    return any(sys.getrefcount(tensor) > 3 for tensor in outputs)


class _DispatchWatch(TorchDispatchMode):
    """Count the reads of tensors in scripted code, which calls no Python functions."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if self.watch.depth == 0:
            for tensor in _tensors((args, kwargs)):
                self.watch.count_read(tensor)
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


METADATA = frozenset({
    "size", "dim", "numel", "stride", "is_contiguous", "ndimension", "nelement", "is_floating_point", "element_size",
    "__get__", "__len__", "storage_offset", "is_complex", "is_signed", "get_device", "__repr__", "type",
})  # fmt: skip
"""The names of functions and methods that read no values of a tensor."""


def _is_metadata(func: Any) -> bool:
    """Tell whether a function reads an attribute or the shape of a tensor, but not its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in ("data", "T", "mT", "H", "grad", "real")
    return name in METADATA
