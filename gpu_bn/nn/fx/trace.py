"""Record the steps of one module in one mode by ``torch.fx``, or give the reason why they cannot be recorded.

A module is refused if a graph could not reproduce it: if it depends on more than its input tensors, runs a part of
its code in a context such as ``no_grad``, draws random numbers, or changes its attributes.
"""

from __future__ import annotations

import ast
import linecache
import operator
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import Parameter, signature
from itertools import islice
from traceback import clear_frames
from typing import Any

import numpy as np
import torch
from torch.fx import Node, Proxy
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._python_dispatch import _disable_current_modes

from gpu_bn.nn.fx.aliases import may_overwrite
from gpu_bn.nn.fx.forward import Steps, expect
from gpu_bn.nn.fx.inspection import callers, module_name, runs_model_code
from gpu_bn.nn.fx.reads import MAX_VALUES, Unchanged, class_attribute_read, modules_read, reachable_code

REQUIRED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
DEVICES = ("cpu", "cuda")
RANDOM = ("drop", "rand", "normal", "bernoulli", "poisson", "binomial", "multinomial", "rrelu", "attention")
"""Parts of the names of functions that draw random numbers."""
CONTAINERS = (tuple, list, dict, torch.Size, immutable_list, immutable_dict)
"""The types of containers that a graph can build. It can build named tuples as well."""


class Refused(Exception):
    """Raised if the steps of a module cannot be recorded. The message gives the reason."""


def record_steps(
    module: torch.nn.Module, enters: Callable[[torch.nn.Module, Any, Any], bool], *, run: bool = True
) -> Steps:
    """Record the original ``forward`` of a module, and those of called modules for which ``enters`` returns ``True``.

    ``enters`` is called with the module, its arguments and its options. If the steps will ``run``, they also check that
    the values they depend on have not changed. The module is left as it was, even if its steps are refused.

    Raises:
        Refused: the steps cannot be recorded.
    """
    parameters = list(signature(type(module).forward).parameters.values())[1:]
    names = tuple(each.name for each in parameters if each.kind in REQUIRED and each.default is Parameter.empty)
    if any(each.kind is Parameter.KEYWORD_ONLY and each.default is Parameter.empty for each in parameters):
        raise Refused("it has arguments that are given by name only")
    defaults = {each.name: each.default for each in parameters if each.name not in names and each.kind not in VARIADIC}
    tracer = _Tracer(names, enters, run)
    before, randomness, changed = _copy_attributes(module), _random_state(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(module)
            fixed = tracer.fixed_modules() if run else [module, *tracer.entered]
    except Exception as error:
        clear_frames(error.__traceback__)  # a frame may refer to a checkpoint's generator, whose hooks live as long
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"it cannot be traced: {lines[0][:200]}") from error
    finally:
        if randomness != _random_state():
            changed = "draws random numbers"
            random.setstate(randomness[1])
            torch.set_rng_state(torch.tensor(list(randomness[0]), dtype=torch.uint8, device="cpu"))
        if _restore(before):
            changed = "changes its attributes"
    if changed:
        raise Refused(f"it {changed}")
    return Steps(graph, names, defaults, fixed)


class _Tracer(torch.fx.Tracer):
    """A tracer that refuses a module whose steps a graph cannot reproduce."""

    proxy_buffer_attributes = True  # otherwise the graph would contain the present values of buffers

    def __init__(self, names: tuple[str, ...], enters: Callable[[torch.nn.Module, Any, Any], bool], run: bool) -> None:
        super().__init__()
        self.names, self.enters, self.run = names, enters, run
        self.entered: dict[torch.nn.Module, None] = {}  # the modules whose steps are part of the graph, in order
        self.codes: dict[Any, dict[str, Any]] = {}  # the code of the model that has run, with its globals
        self.context = _context()  # must be the same for all steps

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        del is_module, concrete_args
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.names)]

    def proxy(self, node: Node) -> Proxy:
        return _ValueProxy(node, self)

    def create_node(self, kind: str, target: Any, *rest: Any, **options: Any) -> Node:
        if _context() != self.context or _is_inside_block():
            raise Refused("a part of it runs under no_grad, autocast, checkpoint, or another with or try")
        self.codes.update(
            (frame.f_code, frame.f_globals) for frame in callers(_Tracer.trace.__code__) if runs_model_code(frame)
        )
        return super().create_node(kind, target, *rest, **options)

    def fixed_modules(self) -> list[torch.nn.Module]:
        """Return the modules that must not change. Add a step that checks other values that the graph depends on."""
        entered = [self.root, *self.entered]
        codes = reachable_code(self.codes, entered)
        modules = [*entered, *modules_read(self.root, self.graph, entered, codes)]
        if name := class_attribute_read(modules, codes):
            raise Refused(f"what it does may depend on {name!r} of its class")
        unchanged = Unchanged(modules, codes)
        if len(unchanged) > MAX_VALUES:
            raise Refused("it reads containers of many values")
        if unchanged.held:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                self.graph.call_function(unchanged)
        return modules

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, Proxy):
            known = any(a is tensor for tensor in (*self.root.parameters(), *self.root.buffers()))
            if not known and a not in self.tensor_attrs:
                raise Refused("it makes tensors, which a graph would keep")
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (super().create_arg(list(a.items())),), {})
        if isinstance(a, (tuple, list, dict)) and type(a) not in CONTAINERS and not hasattr(a, "_fields"):
            raise Refused(f"it makes a {type(a).__name__}, which a graph would turn into a plain container")
        return super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        """Assume that two values are equal, and add a step that checks it. Models compare numbers of channels."""
        node = obj.node
        if node.op != "call_function" or node.target not in (operator.eq, operator.ne):
            raise Refused("what it does depends on a value")
        if any(each.op == "call_module" for each in self.graph.nodes):
            raise Refused("what it does depends on a value, after modules were called")
        if self.run and any(may_overwrite(self.root, each) or _is_random(each) for each in self.graph.nodes):
            raise Refused("what it does depends on a value, after something was overwritten or drawn")
        self.create_node("call_function", expect, (node, node.target is operator.eq), {})
        return node.target is operator.eq

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.enters(m, args, kwargs):
            self.entered[m] = None
            return forward(*args, **kwargs)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _ValueProxy(Proxy):
    """A proxy for which ``isinstance(value, Tensor)`` is true or, if its value may be no tensor, raises ``Refused``."""

    def _class(self) -> Any:
        if not _is_isinstance_call(sys._getframe(1)):
            return _ValueProxy
        if not _is_tensor(self):
            raise Refused("what it does depends on the kind of a value")
        return torch.Tensor

    __class__ = property(_class)


def _is_isinstance_call(frame: Any) -> bool:
    """Tell whether a frame is at ``isinstance(...)`` in a model's code; C++ code would use a proxy as a real tensor."""
    line, _, column, _ = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    if not runs_model_code(frame) or line is None or column is None:
        return False
    text = linecache.getline(frame.f_code.co_filename, line).encode()
    return text[column:].startswith(b"isinstance(")


def _is_tensor(value: Any) -> bool:
    """Tell whether a value is an input, or the result of a torch function or of a module that returns one tensor."""
    node = value.node
    if node.op != "call_module":
        from_torch = str(getattr(node.target, "__module__", "")).startswith("torch")
        return node.op == "placeholder" or (node.op == "call_function" and from_torch)
    module = value.tracer.root.get_submodule(node.target)
    several = (torch.nn.RNNBase, torch.nn.MultiheadAttention, torch.nn.AdaptiveLogSoftmaxWithLoss)
    one = not isinstance(module, several) and not getattr(module, "return_indices", False)
    return type(module).__module__.startswith("torch.nn") and one


def _context() -> tuple[Any, ...]:
    """Return the global state of torch that operations depend on."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in DEVICES),
        *(torch.get_autocast_dtype(device) for device in DEVICES),
        None if hooks is None else hooks(False),
    )


def _is_random(node: Node) -> bool:
    """Tell whether a function or method may draw random numbers."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(part in name for part in RANDOM)


def _is_inside_block() -> bool:
    """Tell whether a model's code is running inside ``with`` or ``try``, or in a checkpoint."""
    for frame in callers(_Tracer.trace.__code__):
        if module_name(frame) == "torch.utils.checkpoint":
            return True
        text = linecache.getlines(frame.f_code.co_filename) if runs_model_code(frame) else ""
        if text and frame.f_lineno in _block_lines("".join(text)):
            return True
    return False


@lru_cache(16)
def _block_lines(text: str) -> set[int]:
    """Return the numbers of the lines of a file that are inside ``with``, or inside ``try`` with handlers."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return set()
    blocks = [
        node.body for node in nodes if isinstance(node, ast.With) or (isinstance(node, ast.Try) and node.handlers)
    ]
    return {line for body in blocks for line in range(body[0].lineno, (body[-1].end_lineno or 0) + 1)}


def _random_state() -> tuple[bytes, Any, bytes]:
    """Return the states of the random number generators of torch, Python and NumPy."""
    with _disable_current_modes():  # the state is a tensor, whose values a mode for fake tensors refuses to read
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state()).encode()  # noqa: NPY002


def _copy_attributes(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Return the attribute dicts of a model's modules, and the containers in them, each with a copy."""
    attributes = [vars(module) for module in model.modules()]
    containers = [value for each in attributes for value in each.values() if isinstance(value, (list, dict, set))]
    return [(container, container.copy()) for container in (*attributes, *containers)]


def _restore(copies: list[tuple[Any, Any]]) -> bool:
    """Restore containers that differ from their copies. Tell whether there was one."""
    changed = [(value, copy) for value, copy in copies if len(value) != len(copy) or not _same_items(value, copy)]
    for value, copy in changed:
        value.clear()
        value.extend(copy) if isinstance(value, list) else value.update(copy)
    return bool(changed)


def _same_items(value: Any, copy: Any) -> bool:
    """Tell whether two containers of the same length hold the same objects in the same order."""
    if isinstance(value, dict):
        return list(value) == list(copy) and all(value[name] is copy[name] for name in copy)
    return all(a is b for a, b in zip(value, copy, strict=True))


@contextmanager
def in_mode(modules: Iterable[torch.nn.Module], training: bool) -> Iterator[None]:
    """Set modules to one mode within this context, without ``train``, which a model may override."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode
