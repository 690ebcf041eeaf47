"""The ``forward`` of a fused module: its own steps, where our layers do the merged sums and activations.

Nothing else about the module and its layers changes. The module's own ``forward`` runs, which is always right, if
something has changed since the module was traced, or if the call has other arguments.
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

from gpu_bn.activations import chosen
from gpu_bn.nn.activated import Activated, has_hooks
from gpu_bn.nn.fx.activations import activate
from gpu_bn.nn.operators.autograd import is_compiling

INTERNAL = frozenset(vars(torch.nn.Module()))
"""The attributes that every module has."""
SIMPLE = (bool, int, float, str)


def normalise(
    norm: Any, x: Tensor, residual: Any, activation: str, parameter: float, in_place: bool, reversed_sum: bool
) -> Tensor:
    """Compute ``activation(norm(x) + residual)``, in one call of the layer if possible; a step of a fused forward."""
    act = chosen(activation, parameter)
    ours = isinstance(norm, Activated) and norm.activation.name == "identity"
    fits = residual is None or (  # a layer neither broadcasts nor widens a dtype, as a sum does
        isinstance(residual, Tensor)
        and (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    )
    if ours and fits:
        return norm(x, residual, act)  # type: ignore[no-any-return]
    z = norm(x)
    if residual is not None:
        z = z.add_(residual) if in_place else residual + z if reversed_sum else z + residual
    return activate(z, act)


class Differs(Exception):
    """A condition does not hold that the graph relies on."""


def expect(condition: Any, value: bool) -> None:
    """Make sure of a condition that a graph relies on; a step of a fused ``forward``, before all layers."""
    if bool(condition) is not value:
        raise Differs


class Steps(NamedTuple):
    """A module's graph, the names of its inputs, the defaults of its other parameters, the modules it goes into."""

    graph: Graph
    names: tuple[str, ...]
    defaults: dict[str, Any]
    entered: list[torch.nn.Module]


class Merge(NamedTuple):
    """A layer of ours, what it also does, and the activations and identities whose work that was."""

    norm: Any
    what: str
    parts: list[torch.nn.Module]


class Seen:
    """A state of some modules: while it lasts, what held in it still does, and to look for it takes less time.

    Args:
        merged: layers, which hooks, a ``forward`` of their own or modules in them would change.
        fixed: other modules, of which modes and attributes matter too, with these.
    """

    def __init__(self, merged: list[Any], fixed: list[tuple[Any, tuple[tuple[str, Any], ...], Any]]) -> None:
        modules = [module for module, _, _ in fixed]
        self.hooks = RemovableHandle.next_id  # the hooks of this process so far
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

    def lasts(self) -> bool:
        """Tell whether the state is the same."""
        if RemovableHandle.next_id != self.hooks or [*map(len, self.dicts)] != self.lengths:
            return False
        try:
            for read, of, before in self.values:
                if not all(map(is_, read(of), before)):
                    return False
        except KeyError:  # an attribute is gone, and there is another
            return False
        return True


class Plan:
    """The steps of a module in one mode, and what must not have changed since they were recorded."""

    seen: Seen | None = None
    """What was there when all conditions last held."""

    def __init__(self, steps: Steps, merges: list[Merge]) -> None:
        code = steps.graph.python_code("self")
        self.source: str | None = code.src
        self.globals = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
        self.names, self.defaults = steps.names, steps.defaults
        self._watch(merges, steps.entered)
        self.function = self._compiled()

    def _watch(self, merges: list[Merge], entered: list[torch.nn.Module]) -> None:
        """Remember what the steps were recorded from. Layers check themselves: only hooks on them matter."""
        parts = dict.fromkeys(part for norm, _, others in merges for part in (norm, *others))
        self.merged: list[Any] = [part for part in parts if isinstance(part, Activated)]
        fixed = [*entered, *(part for part in parts if not isinstance(part, Activated))]
        self.fixed = [(module, _attributes(module), tuple(module._modules.values())) for module in fixed]

    def _compiled(self) -> Callable[..., Any] | None:
        if self.source is None:
            return None
        scope = {"torch": torch, **self.globals}
        exec(self.source, scope)
        return scope["forward"]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("function", "seen")}
        try:
            pickle.dumps((self.globals, self.defaults))
        except Exception:  # a function that cannot be saved: the loaded module runs its own forward
            state.update(source=None, globals={}, defaults={})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.function = self._compiled()

    def inputs(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the inputs in the graph's order, if a call gives nothing else."""
        names, given = self.names, arguments
        if options:
            given += tuple([options.get(name) for name in names[len(arguments) :]])
            for name, value in options.items():
                if name in names[: len(arguments)] or (
                    name not in names and self.defaults.get(name, self) is not value
                ):
                    return None
        if len(given) != len(names):
            return None
        for value in given:  # a generator would take twice as long
            if not isinstance(value, Tensor):
                return None
        return given

    def holds(self, training: bool) -> bool:
        """Tell whether nothing has changed: no hooks, no other modes, attributes or modules."""
        if is_compiling():
            return self._agrees(training)
        if self.seen is not None and self.seen.lasts():
            return True
        agrees = self._agrees(training)
        self.seen = Seen(self.merged, self.fixed) if agrees else None
        return agrees

    def _agrees(self, training: bool) -> bool:
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
    """A module's own text with merged calls, for both modes and any arguments; only its children must not change."""

    def __init__(self, module: torch.nn.Module, source: str, merges: list[Merge]) -> None:
        self.source, self.kind = source, type(module)
        self.globals, self.names, self.defaults = {}, (), {}
        self._watch(merges, [module])
        self.fixed[0] = (module, (), self.fixed[0][2])  # the text reads attributes when it runs
        self.function = self._compiled()

    def _compiled(self) -> Callable[..., Any] | None:
        if self.source is None:
            return None
        made: dict[str, Any] = {}
        exec(self.source, self.kind.forward.__globals__, made)
        function = made["make"](normalise)
        return lambda module, arguments, options: function(module, *arguments, **options)

    def inputs(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        return arguments, options


class Forward:
    """A fused module's ``forward``, with a plan for each mode."""

    def __init__(self, module: torch.nn.Module, plans: dict[bool, Plan]) -> None:
        self.module, self.plans = module, plans

    @property
    def own(self) -> Callable[..., Any]:
        """Return the module's own ``forward``."""
        return type(self.module).forward.__get__(self.module)  # type: ignore[no-any-return]

    @property
    def __func__(self) -> Callable[..., Any]:
        """Return the module's own ``forward`` as a function: who binds it again may bind it to a copy."""
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
            if inputs is not None and plan.holds(training) and plan.function is not None:
                try:
                    return plan.function(module, *inputs)
                except Differs:
                    pass
        return type(module).forward(module, *arguments, **options)


def is_same(found: Any, value: Any) -> bool:
    """Tell whether a value is the one that was recorded; simple ones only have to be equal."""
    return found is value or (type(value) in SIMPLE and type(found) in SIMPLE and found == value)


def is_patched(module: torch.nn.Module) -> bool:
    """Tell whether a module has a ``forward`` of its own, other than a fused one."""
    return not isinstance(vars(module).get("forward"), Forward | None)


def is_watched(module: torch.nn.Module) -> bool:
    """Tell whether hooks, or a ``forward`` of its own, see or change what goes into a module and comes out of it."""
    return is_patched(module) or has_hooks(module)


def _attributes(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in vars(module).items() if name not in INTERNAL and name != "forward")


def own_forwards(model: torch.nn.Module) -> None:
    """Give the modules of a model their own ``forward`` back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Forward):
            del vars(module)["forward"]
        vars(module).pop("_merged", None)
