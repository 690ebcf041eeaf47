"""The ``forward`` of a fused module. It runs the module's steps, but layers also do the merged sums and activations.

Nothing else about the module and its layers changes. If something has changed since the module was traced, or if a
call has other arguments, the original ``forward`` of the module runs instead, which is always right.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from inspect import signature
from operator import is_, itemgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from gpu_bn.activations import make_activation
from gpu_bn.nn.activated import Activated, has_hooks
from gpu_bn.nn.fx.activations import activate
from gpu_bn.nn.operators.autograd import is_compiling

INTERNAL = frozenset(vars(torch.nn.Module()))
"""The attributes that every module has."""
SIMPLE = (bool, int, float, str)
"""The types whose values are compared by ``==``; all others are compared by ``is``."""


def normalise(
    norm: Any, x: Tensor, residual: Any, activation: str, parameter: float, in_place: bool, reversed_sum: bool
) -> Tensor:
    """Compute ``activation(norm(x) + residual)``, in one call of the layer if possible.

    Traced graphs call this function. ``reversed_sum`` computes ``residual + norm(x)``, and ``in_place`` adds into the
    output of the layer, as the module's code did.
    """
    act = make_activation(activation, parameter)
    ours = isinstance(norm, Activated) and norm.activation.name == "identity"
    fits = residual is None or (  # unlike a sum, a layer neither broadcasts nor promotes dtypes
        isinstance(residual, Tensor)
        and (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    )
    if ours and fits:
        return norm(x, residual, act)  # type: ignore[no-any-return]
    z = norm(x)
    if residual is not None:
        z = z.add_(residual) if in_place else residual + z if reversed_sum else z + residual
    return activate(z, act)


class ConditionError(Exception):
    """Raised within a fused ``forward`` if a condition that its graph relies on does not hold."""


def expect(condition: Any, value: bool) -> None:
    """Raise :class:`ConditionError` if a condition differs from ``value``. Graphs call it before all layers."""
    if bool(condition) is not value:
        raise ConditionError


class Steps(NamedTuple):
    """The recorded steps of a module: a graph, the names of its inputs, and the defaults of the other parameters.

    ``fixed`` lists the modules that must not change: those whose own steps are in the graph, and others.
    """

    graph: Graph
    names: tuple[str, ...]
    defaults: dict[str, Any]
    fixed: list[torch.nn.Module]


class Merge(NamedTuple):
    """A merge of ``what``, such as ``"sum, relu"``, into the layer ``norm``; ``parts`` are no longer called."""

    norm: Any
    what: str
    parts: list[torch.nn.Module]


class Snapshot:
    """The state of some modules, which is compared faster than all conditions of a plan are checked.

    Args:
        merged: the layers. Hooks, a replaced ``forward`` or modules in them would change what they compute.
        fixed: the other modules, each with its attributes and its children. Their modes matter as well.
    """

    def __init__(self, merged: list[Any], fixed: list[tuple[Any, tuple[tuple[str, Any], ...], Any]]) -> None:
        modules = [module for module, _, _ in fixed]
        self.hooks = RemovableHandle.next_id  # it grows with each hook that this process registers
        self.dicts = [*map(vars, (*merged, *modules)), *[module._modules for module in (*merged, *modules)]]
        self.lengths = [*map(len, self.dicts)]
        self.values: list[tuple[Callable[[Any], Any], Any, tuple[Any, ...]]] = []
        for module, attributes, children in fixed:
            own = vars(module)
            names = [*dict(attributes), *(["forward"] if "forward" in own else [])]
            read = itemgetter("training", "_modules", *names)
            self.values.append((read, own, read(own)))
            if children:
                self.values.append((dict.values, module._modules, children))

    def is_current(self) -> bool:
        """Tell whether the modules are still in this state."""
        if RemovableHandle.next_id != self.hooks or [*map(len, self.dicts)] != self.lengths:
            return False
        try:
            for read, owner, before in self.values:
                if not all(map(is_, read(owner), before)):
                    return False
        except KeyError:  # another attribute has replaced one
            return False
        return True


class Plan:
    """The compiled steps of a module in one mode, and the conditions under which they are still right."""

    snapshot: Snapshot | None = None
    """The state in which all conditions last held."""

    def __init__(self, steps: Steps, merges: list[Merge]) -> None:
        code = steps.graph.python_code("self")
        self.source: str | None = code.src
        self.globals = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
        self.names, self.defaults = steps.names, steps.defaults
        self._record_modules(merges, steps.fixed)
        self.function = self._compiled()

    def _record_modules(self, merges: list[Merge], modules: list[torch.nn.Module]) -> None:
        """Record the modules that the steps depend on, and the attributes and children of those that are not layers."""
        parts = dict.fromkeys(part for norm, _, others in merges for part in (norm, *others))
        self.merged: list[Any] = [part for part in parts if isinstance(part, Activated)]
        fixed = [*modules, *(part for part in parts if not isinstance(part, Activated))]
        self.fixed = [(module, _attributes(module), tuple(module._modules.values())) for module in fixed]

    def _compiled(self) -> Callable[..., Any] | None:
        if self.source is None:
            return None
        scope = {"torch": torch, **self.globals}
        exec(self.source, scope)
        return scope["forward"]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("function", "snapshot")}
        try:
            pickle.dumps((self.globals, self.defaults))
        except Exception:  # a function that cannot be pickled: the loaded module runs its original forward
            state.update(source=None, globals={}, defaults={})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.function = self._compiled()

    def inputs(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the tensors of a call in the order of the graph's inputs; ``None`` if the call has other arguments."""
        names, inputs = self.names, arguments
        if options:
            inputs += tuple([options.get(name) for name in names[len(arguments) :]])
            for name, value in options.items():
                if name in names[: len(arguments)] or (
                    name not in names and self.defaults.get(name, self) is not value
                ):
                    return None
        if len(inputs) != len(names):
            return None
        for value in inputs:  # a generator would take twice as long
            if not isinstance(value, Tensor):
                return None
        return inputs

    def is_valid(self, training: bool) -> bool:
        """Tell whether nothing has changed: no hooks, modes, attributes or modules."""
        if is_compiling():
            return self._conditions_hold(training)
        if self.snapshot is not None and self.snapshot.is_current():
            return True
        valid = self._conditions_hold(training)
        self.snapshot = Snapshot(self.merged, self.fixed) if valid else None
        return valid

    def _conditions_hold(self, training: bool) -> bool:
        if torch_module._has_any_global_hook():
            return False
        for module in self.merged:
            if has_hooks(module) or "forward" in vars(module) or (module._modules and not module.replaces_children()):
                return False
        for module, attributes, children in self.fixed:
            now = vars(module)
            if now["training"] is not training or tuple(now["_modules"].values()) != children:
                return False
            for name, value in attributes:
                if not is_same(now.get(name, now), value):
                    return False
            if module is not self.fixed[0][0] and is_watched(module):
                return False
        return True


class TextPlan(Plan):
    """A module's source text with merged calls, for both modes and any arguments. Only the children must not change."""

    def __init__(self, module: torch.nn.Module, source: str, merges: list[Merge]) -> None:
        self.source, self.kind = source, type(module)
        self.globals, self.names, self.defaults = {}, (), {}
        self._record_modules(merges, [module])
        self.fixed[0] = (module, (), self.fixed[0][2])  # the text reads attributes when it runs
        self.function = self._compiled()

    def _compiled(self) -> Callable[..., Any] | None:
        if self.source is None:
            return None
        scope: dict[str, Any] = {}
        exec(self.source, self.kind.forward.__globals__, scope)
        function = scope["make"](normalise)
        return lambda module, arguments, options: function(module, *arguments, **options)

    def inputs(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        return arguments, options


class Forward:
    """A fused module's ``forward``, with a plan for each mode."""

    def __init__(self, module: torch.nn.Module, plans: dict[bool, Plan]) -> None:
        self.module, self.plans = module, plans

    @property
    def own(self) -> Callable[..., Any]:
        """The module's original ``forward``."""
        return type(self.module).forward.__get__(self.module)  # type: ignore[no-any-return]

    @property
    def __func__(self) -> Callable[..., Any]:
        """The module's original ``forward`` as a function, for code that binds it to another module, such as a copy."""
        return type(self.module).forward

    @property
    def __signature__(self) -> Any:
        return signature(self.own)

    @property
    def __code__(self) -> Any:
        return self.own.__code__

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module = self.module
        training = module.training
        plan = self.plans.get(training)
        if plan is not None:
            inputs = plan.inputs(arguments, options)
            if inputs is not None and plan.is_valid(training) and plan.function is not None:
                try:
                    return plan.function(module, *inputs)
                except ConditionError:
                    pass
        return type(module).forward(module, *arguments, **options)


def is_same(value: Any, recorded: Any) -> bool:
    """Tell whether a value is the recorded object, or equals it if both have one of the :data:`SIMPLE` types."""
    return value is recorded or (type(recorded) in SIMPLE and type(value) in SIMPLE and value == recorded)


def is_patched(module: torch.nn.Module) -> bool:
    """Tell whether a module has a ``forward`` as an instance attribute, other than a fused one."""
    return not isinstance(vars(module).get("forward"), Forward | None)


def is_watched(module: torch.nn.Module) -> bool:
    """Tell whether hooks or a patched ``forward`` may see or change the inputs and outputs of a module."""
    return is_patched(module) or has_hooks(module)


def _attributes(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in vars(module).items() if name not in INTERNAL and name != "forward")


def restore_forwards(model: torch.nn.Module) -> None:
    """Remove the fused ``forward`` of each module in a model, so that the original one runs again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Forward):
            del vars(module)["forward"]
        vars(module).pop("_merged", None)
