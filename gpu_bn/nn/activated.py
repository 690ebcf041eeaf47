"""The base class of our layers: torch modules with an activation, which other libraries cannot drop silently."""

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
LAYER_FOLDERS = (str(Path(__file__).parent.parent), str(Path(torch.nn.modules.__file__).parent))
"""The folders of the code that a layer runs itself: this package, and torch's base classes."""


class LeafName(str):
    """The ``__module__`` of our layers: its ``startswith("torch.nn")`` is true, so tracers record a layer as one node.

    Otherwise a tracer would enter ``forward`` and record the present mode, training or evaluation, for good. Exports
    build the name of a layer's class as ``__module__ + ...``; the sum names torch's class, which quantisers look for.
    """

    __slots__ = ()

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return "torch.nn" in (prefix if isinstance(prefix, tuple) else (prefix,)) or super().startswith(prefix, *bounds)

    def __add__(self, rest: str) -> str:
        return torch.nn.modules.batchnorm.__name__ + rest

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str.__str__(self),)


def guarded_property(name: str) -> Any:
    """Return a property for an attribute that libraries read to build a replacement, which would lose the activation.

    The value is stored twice: the compiler of torch 2.11 reads ``__dict__[name]`` instead of the property.
    """

    def get(self: Any) -> Any:
        try:
            value = self.__dict__[f"_{name}"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        if not torch.compiler.is_compiling() and not self.activation.is_identity:
            _refuse_replacement(self, name, sys._getframe(1))
        return value

    def put(self: torch.nn.Module, value: Any) -> None:
        self.__dict__[name] = self.__dict__[f"_{name}"] = value

    return property(get, put)


def store_guarded(module: torch.nn.Module) -> None:
    """Store the guarded attributes where the module's class looks for them, after that class has changed."""
    values = module.__dict__
    for name in ("eps", "num_features"):
        if not isinstance(module, Activated):
            values.pop(f"_{name}", None)
        elif name in values:
            values[f"_{name}"] = values[name]


def _refuse_replacement(layer: torch.nn.Module, name: str, frame: Any) -> None:
    """Raise an error if a library's function reads a layer's attribute to replace it and would lose the activation.

    A function that names the layer's original class also copies its activation module, and is allowed.
    """
    code = frame.f_code
    own = code.co_filename.startswith(LAYER_FOLDERS) and code.co_name != "convert_sync_batchnorm"
    by_name = name in code.co_names  # code that looks at all attributes does not name them
    kept = any(cls.__name__ in code.co_names for cls in component_classes(type(layer))[1:])
    foreign = code.co_filename.startswith(LIBRARIES) and not own and frame.f_locals.get("self") is not layer
    if foreign and by_name and not kept:
        raise RuntimeError(
            f"{code.co_name} would lose the activation {layer.activation!r} of this layer: use gpu_bn.nn's function of "
            "that name, or gpu_bn.nn.fold, or call gpu_bn.nn.revert first"
        )


def has_hooks(module: torch.nn.Module) -> bool:
    """Tell whether a module has forward or backward hooks, which may read or change its inputs and outputs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


JOINT_CLASSES: dict[tuple[type[Any], type[Any]], type[Any]] = {}
"""The class of a converted layer, by our class and the class that the layer had in another library."""


def join_classes(ours: type[Any], theirs: type[Any]) -> type[Any]:
    """Return a subclass of our class and of the class that a converted layer had, so that ``isinstance`` knows both.

    For torch classes it is our class: it already has them as bases, except ``SyncBatchNorm``, which
    DistributedDataParallel refuses on CPUs. If Python cannot combine the two classes, it is our class too.
    """
    if theirs.__module__.startswith("torch."):
        return ours
    if (ours, theirs) not in JOINT_CLASSES:
        own = {"__module__": ours.__module__, "__repr__": torch.nn.Module.__repr__, "components": (ours, theirs)}
        try:
            JOINT_CLASSES[ours, theirs] = type(ours.__name__, (ours, theirs), own)
        except TypeError:  # the bases conflict
            JOINT_CLASSES[ours, theirs] = ours
    return JOINT_CLASSES[ours, theirs]


def component_classes(cls: type[Any]) -> tuple[type[Any], ...]:
    """Return the two classes that :func:`join_classes` joined, ours first; ``(cls,)`` for any other class."""
    return vars(cls).get("components", (cls,))  # type: ignore[no-any-return]


def _empty(*classes: type[Any]) -> Any:
    """Create an empty object of a joint class, for ``pickle`` and ``copy``, which cannot import that class by name."""
    return object.__new__(join_classes(*classes))


class Activated(torch.nn.Module):
    """A layer with an activation."""

    activation: Activation = IDENTITY
    components: ClassVar[tuple[type[torch.nn.Module], ...]]
    eps: float = guarded_property("eps")
    _eps: float

    def _get_name(self) -> str:
        name = super()._get_name()
        return f"gpu_bn.{name}" if type(self).__module__.startswith("gpu_bn.") else name

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("gpu_bn."):  # tracers enter a user's subclass, as they enter a subclass of torch's
            cls.__module__ = LeafName(cls.__module__)

    def replaces_children(self) -> bool:
        """Tell whether the layer's call can replace those of its children, a dropout and an activation in timm."""
        act, drop = self._modules.get("act"), self._modules.get("drop")
        if act is None or "_converted_from" not in self.__dict__:
            return True
        watched = any("forward" in vars(child) or has_hooks(child) for child in (act, drop) if child is not None)
        known = (activation_of(act) or IDENTITY) == self.activation and type(drop) in (torch.nn.Identity, type(None))
        return known and not watched

    def _call_children(self, input: Tensor, residual: Tensor | None, *mask: Tensor | None) -> Any:
        """Normalise, then call the layer's dropout and activation modules."""
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
        reduced: Any = super().__reduce_ex__(protocol)
        classes = component_classes(type(self))
        return reduced if len(classes) == 1 else (_empty, classes, *reduced[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        store_guarded(self)
