"""The base class of our layers: torch's modules with an activation, which other libraries do not lose unnoticed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn.fx.activations import activation_of

LIBRARIES = str(Path(torch.__file__).parent.parent)
"""The folder of all installed libraries."""
OWN = (str(Path(__file__).parent.parent), str(Path(torch.nn.modules.__file__).parent))
"""The folders of code that a layer runs itself: this package, and torch's base classes."""


class LeafName(str):
    """The name of a module of ours, which tracers take for ``torch.nn``: they call its layers as a whole, as torch's.

    Otherwise they would enter ``forward`` and record the mode of that moment for good. Exports name a module's class by
    a sum of names: there it is torch's class, which quantisers look for.
    """

    __slots__ = ()

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return "torch.nn" in (prefix if isinstance(prefix, tuple) else (prefix,)) or super().startswith(prefix, *bounds)

    def __add__(self, rest: str) -> str:
        return torch.nn.modules.batchnorm.__name__ + rest

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str.__str__(self),)


def guarded(name: str) -> Any:
    """Define an attribute of torch's that libraries read to make another layer, which would lose the activation.

    The value is stored twice: the compiler of torch 2.11 takes ``__dict__[name]`` for the property itself.
    """

    def get(self: Any) -> Any:
        try:
            value = self.__dict__[f"_{name}"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        if not torch.compiler.is_compiling() and not self.activation.is_identity:
            _refuse_to_lose(self, name, sys._getframe(1))
        return value

    def put(self: torch.nn.Module, value: Any) -> None:
        self.__dict__[name] = self.__dict__[f"_{name}"] = value

    return property(get, put)


def store_guarded(module: torch.nn.Module) -> None:
    """Store guarded attributes where the module's present class looks for them; another class may have set them."""
    values = module.__dict__
    for name in ("eps", "num_features"):
        if not isinstance(module, Activated):
            values.pop(f"_{name}", None)
        elif name in values:
            values[f"_{name}"] = values[name]


def _refuse_to_lose(layer: torch.nn.Module, name: str, frame: Any) -> None:
    """Raise where a library reads a layer's attribute to replace the layer, and would lose its activation.

    Code that names the class which the layer had before takes its activation's module along.
    """
    code = frame.f_code
    own = code.co_filename.startswith(OWN) and code.co_name != "convert_sync_batchnorm"
    by_name = name in code.co_names  # not by code that looks at all attributes
    kept = any(kind.__name__ in code.co_names for kind in joined_by(type(layer))[1:])
    foreign = code.co_filename.startswith(LIBRARIES) and not own and frame.f_locals.get("self") is not layer
    if foreign and by_name and not kept:
        raise RuntimeError(
            f"{code.co_name} would lose the activation {layer.activation!r} of this layer: use gpu_bn.nn's function of "
            "that name, or gpu_bn.nn.fold, or call gpu_bn.nn.revert first"
        )


def has_hooks(module: torch.nn.Module) -> bool:
    """Tell whether hooks see or change what goes into a module and comes out of it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


JOINED: dict[tuple[type[Any], type[Any]], type[Any]] = {}
"""The classes of converted layers that are from other libraries."""


def joined(ours: type[Any], theirs: type[Any]) -> type[Any]:
    """Make the class of a converted layer: ours, and by ``isinstance`` also the one that it had in its library.

    torch's own classes are bases of ours; but DistributedDataParallel refuses its ``SyncBatchNorm`` on CPUs.
    """
    if theirs.__module__.startswith("torch."):
        return ours
    if (ours, theirs) not in JOINED:
        own = {"__module__": ours.__module__, "__repr__": torch.nn.Module.__repr__, "joins": (ours, theirs)}
        try:
            JOINED[ours, theirs] = type(ours.__name__, (ours, theirs), own)
        except TypeError:  # the two have bases that do not go together
            JOINED[ours, theirs] = ours
    return JOINED[ours, theirs]


def joined_by(kind: type[Any]) -> tuple[type[Any], ...]:
    """Return our class and the other that a class joins, or the class alone."""
    return vars(kind).get("joins", (kind,))  # type: ignore[no-any-return]


def _empty(*classes: type[Any]) -> Any:
    """Make an object of a joined class, for ``pickle`` and ``copy``, which know classes by their names."""
    return object.__new__(joined(*classes))


class Activated(torch.nn.Module):
    """A layer with an activation."""

    activation: Activation = IDENTITY
    joins: ClassVar[tuple[type[torch.nn.Module], ...]]
    eps: float = guarded("eps")
    _eps: float

    def _get_name(self) -> str:
        name = super()._get_name()
        return f"gpu_bn.{name}" if type(self).__module__.startswith("gpu_bn.") else name

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("gpu_bn."):  # tracers enter a user's subclass, as they enter one of torch's layers
            cls.__module__ = LeafName(cls.__module__)

    def replaces_children(self) -> bool:
        """Tell whether a call of this layer does its modules' work: timm's layers hold a dropout and an activation."""
        act, drop = self._modules.get("act"), self._modules.get("drop")
        if act is None or "_converted_from" not in self.__dict__:
            return True
        watched = any("forward" in vars(each) or has_hooks(each) for each in (act, drop) if each is not None)
        known = (activation_of(act) or IDENTITY) == self.activation and type(drop) in (torch.nn.Identity, type(None))
        return known and not watched

    def _call_children(self, input: Tensor, residual: Tensor | None, *mask: Tensor | None) -> Any:
        """Normalise, then call the layer's modules for the rest."""
        z = self.forward(input, None, IDENTITY, *mask)
        for name in ("drop", "act"):
            if name == "act" and residual is not None:
                z = z + residual
            module = self._modules.get(name)
            z = z if module is None else module(z)
        return z

    def __setattr__(self, name: str, value: Any) -> None:  # a property would hide modules, which torch stores elsewhere
        value = Activation.of(value) if name == "activation" else value
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        classes = joined_by(type(self))
        return made if len(classes) == 1 else (_empty, classes, *made[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        store_guarded(self)
