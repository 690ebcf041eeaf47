"""The ``forward`` that a fused module has: its own steps, with the merged ones done by our layers.

Neither the module nor its layers change otherwise. Wherever something has changed since the module was traced, or the
call is of another kind, the module's own ``forward`` runs, which is always right.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn.modules import module as torch_module

from gpu_bn.activations import Activation
from gpu_bn.nn.activated import has_hooks
from gpu_bn.nn.fused import Fused
from gpu_bn.nn.fx.activations import activate
from gpu_bn.nn.modules import FrozenBatchNorm2d

INTERNAL = frozenset(vars(torch.nn.Module()))
"""The attributes that every module has."""
SIMPLE = (bool, int, float, str)
LAYERS = (Fused, FrozenBatchNorm2d)


def normalise(
    norm: Any, x: Tensor, residual: Any, activation: str, parameter: float, in_place: bool, reversed_sum: bool
) -> Tensor:
    """``activation(norm(x) + residual)``, in one call of the layer if it can be; a step of a fused ``forward``."""
    chosen = Activation(activation, parameter)
    ours = isinstance(norm, LAYERS) and norm.activation.is_identity
    if ours and (residual is None or _alike(x, residual)):
        return norm(x, residual, chosen)  # type: ignore[no-any-return]
    z = norm(x)
    if residual is not None:
        z = z.add_(residual) if in_place else residual + z if reversed_sum else z + residual
    return activate(z, chosen)


class Differs(Exception):
    """A condition is not what it was taken for."""


def expect(condition: Any, value: bool) -> None:
    """A step of a fused ``forward``, before all layers: make sure of a condition that its graph takes for given."""
    if bool(condition) is not value:
        raise Differs


def _alike(x: Tensor, residual: Any) -> bool:
    """Whether a layer of ours takes the residual: it broadcasts nothing, and a sum of two dtypes has the wider one."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


class Plan:
    """What a module does in one mode, and what must not have changed for that.

    Args:
        graph: its steps.
        names: its inputs, all tensors, in the order of the graph's.
        defaults: the values that its other parameters had.
        entered: it, and the modules whose own steps are in the graph.
        merged: layers, activations and identities that the graph calls in another way or not at all.
    """

    def __init__(
        self,
        graph: Graph,
        names: tuple[str, ...],
        defaults: dict[str, Any],
        entered: Iterable[torch.nn.Module],
        merged: Iterable[torch.nn.Module],
    ) -> None:
        code = graph.python_code("self")
        self.source: str | None = code.src
        self.globals = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
        self.names, self.defaults = names, defaults
        self._watch(merged, *entered)
        self.function = self._compiled()

    def _watch(self, merged: Iterable[torch.nn.Module], *entered: torch.nn.Module) -> None:
        """Remember what the steps were taken from: of layers, which see to themselves, hooks alone can change them."""
        parts = list(merged)
        self.merged: list[Any] = [part for part in parts if isinstance(part, LAYERS)]
        fixed = (*entered, *(part for part in parts if not isinstance(part, LAYERS)))
        self.fixed = [(module, _attributes(module), tuple(module._modules.values())) for module in fixed]

    def _compiled(self) -> Callable[..., Any] | None:
        if self.source is None:
            return None
        scope = {"torch": torch, **self.globals}
        exec(self.source, scope)
        return scope["forward"]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "function"}
        try:
            pickle.dumps((self.globals, self.defaults))
        except Exception:  # a function that cannot be saved; the module's own forward can
            state.update(source=None, globals={}, defaults={})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.function = self._compiled()

    def inputs(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Any] | None:
        """The inputs in the graph's order, if a call gives these alone."""
        if len(arguments) > len(self.names):
            return None
        given = list(arguments)
        if options:
            given += [options.get(name) for name in self.names[len(arguments) :]]
            for name, value in options.items():
                if name in self.names[: len(arguments)]:
                    return None
                if name not in self.names and (name not in self.defaults or self.defaults[name] is not value):
                    return None
        if len(given) != len(self.names) or not all(isinstance(value, Tensor) for value in given):
            return None
        return given

    def holds(self, training: bool) -> bool:
        """Whether nothing has changed: no hooks, no other modes, attributes or modules."""
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
                found = now.get(name, now)
                if found is not value and not (type(value) in SIMPLE and type(found) in SIMPLE and found == value):
                    return False
        return not any(has_hooks(module) or is_patched(module) for module, _, _ in self.fixed[1:])


class TextPlan(Plan):
    """A module's own text with merged calls, for both modes and any arguments; its own children are what is fixed."""

    def __init__(self, module: torch.nn.Module, source: str, merged: Iterable[torch.nn.Module]) -> None:
        self.source, self.kind = source, type(module)
        self.globals, self.names, self.defaults = {}, (), {}
        self._watch(merged, module)
        self.fixed[0] = (module, (), self.fixed[0][2])  # the text reads attributes when it runs
        self.function = self._compiled()

    def _compiled(self) -> Callable[..., Any] | None:
        if self.source is None:
            return None
        made: dict[str, Any] = {}
        exec(self.source, self.kind.forward.__globals__, made)
        function = made["make"](normalise)
        return lambda module, arguments, options: function(module, *arguments, **options)

    def inputs(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
        return [arguments, options]


class Forward:
    """A fused module's ``forward``, with a plan for each mode."""

    def __init__(self, module: torch.nn.Module, plans: dict[bool, Plan]) -> None:
        self.module, self.plans = module, plans

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self.own)

    @property
    def __code__(self) -> Any:
        return self.own.__code__

    @property
    def own(self) -> Callable[..., Any]:
        """The module's own ``forward``."""
        return type(self.module).forward.__get__(self.module)  # type: ignore[no-any-return]

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


def is_patched(module: torch.nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, other than a fused one."""
    return not isinstance(vars(module).get("forward"), Forward | None)


def _attributes(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in vars(module).items() if name not in INTERNAL and name != "forward")


def own_forwards(model: torch.nn.Module) -> None:
    """Give the modules of a model their own ``forward`` back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Forward):
            del vars(module)["forward"]
        vars(module).pop("_merged", None)
