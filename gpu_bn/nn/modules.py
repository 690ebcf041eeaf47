"""``BatchNorm1d/2d/3d``: torch's layers, with an activation, a residual and a switch that freezes the statistics.

They are subclasses of torch's: parameters, buffers, state_dict, repr and errors are torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from gpu_bn import spec
from gpu_bn.activations import IDENTITY, ROWS, Activation
from gpu_bn.call import Call, Options
from gpu_bn.folding import batch_moments
from gpu_bn.nn import functional
from gpu_bn.nn.fx.activations import activation_of


class _LeafName(str):
    """The name of a module of ours, which tracers take for ``torch.nn``: they call its layers as a whole, as torch's.

    Else they would enter ``forward``, where they would keep the mode of that moment for all time.
    """

    __slots__ = ()

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return "torch.nn" in (prefix if isinstance(prefix, tuple) else (prefix,)) or super().startswith(prefix, *bounds)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str.__str__(self),)


def _part(name: str) -> Any:
    """An attribute of torch's that libraries read where they make another layer of this one, without its activation.

    It is kept under another name too: to the compiler of torch 2.11, ``__dict__[name]`` is the property itself.
    """

    def get(self: Any) -> Any:
        try:
            value = self.__dict__[f"_{name}"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        if not torch.compiler.is_compiling() and not self.activation.is_identity:
            _refuse_to_lose(self, name, sys._getframe(1).f_code)
        return value

    def put(self: torch.nn.Module, value: Any) -> None:
        self.__dict__[name] = self.__dict__[f"_{name}"] = value

    return property(get, put)


def move_parts(module: torch.nn.Module) -> None:
    """Have what a layer's own class has stored, or an older version of ours, where its present class looks for it."""
    values = module.__dict__
    for name in ("eps", "num_features"):
        if not isinstance(module, _Activated):
            values.pop(f"_{name}", None)
        elif name in values:
            values[f"_{name}"] = values[name]


LIBRARIES = str(Path(torch.__file__).parent.parent)
OWN = (str(Path(__file__).parent.parent), str(Path(torch.nn.modules.__file__).parent))
"""Where code is from that reads a layer's attributes to compute what it computes: here, and torch's base classes."""


def _refuse_to_lose(layer: torch.nn.Module, name: str, code: Any) -> None:
    """Raise where a library takes a layer apart that also does an activation, which would be lost without a word."""
    own = code.co_filename.startswith(OWN) and code.co_name != "convert_sync_batchnorm"
    if code.co_filename.startswith(LIBRARIES) and not own and name in code.co_names:  # not whoever looks at everything
        raise RuntimeError(
            f"{code.co_name} would lose the activation {layer.activation!r} of this layer: use gpu_bn.nn's function of "
            "that name, or gpu_bn.nn.fold, or call gpu_bn.nn.revert first"
        )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks see or change what goes into a module and comes out of it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Activated(torch.nn.Module):
    activation: Activation = IDENTITY
    eps: float = _part("eps")
    _eps: float

    def _get_name(self) -> str:
        name = super()._get_name()
        return f"gpu_bn.{name}" if type(self).__module__.startswith("gpu_bn.") else name

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("gpu_bn."):  # a subclass elsewhere is entered, as one of torch's is
            cls.__module__ = _LeafName(cls.__module__)

    def _is_whole(self) -> bool:
        """Whether this layer may do what the modules in it do: timm's layers have some for dropout and activation."""
        act, drop = self._modules.get("act"), self._modules.get("drop")
        if act is None or "_converted_from" not in self.__dict__:
            return True
        watched = any("forward" in vars(each) or has_hooks(each) for each in (act, drop) if each is not None)
        known = (activation_of(act) or IDENTITY) == self.activation and type(drop) in (torch.nn.Identity, type(None))
        return known and not watched

    def _in_parts(self, input: Tensor, residual: Tensor | None, *mask: Tensor | None) -> Any:
        """Normalise, and call these modules for the rest."""
        z = self.forward(input, None, IDENTITY, *mask)
        for name in ("drop", "act"):
            if name == "act" and residual is not None:
                z = z + residual
            module = self._modules.get(name)
            z = z if module is None else module(z)
        return z

    def __setattr__(self, name: str, value: Any) -> None:  # a property would not see modules, which torch keeps apart
        value = Activation.of(value) if name == "activation" else value
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        move_parts(self)


class Fused(_Activated, _BatchNorm):
    """What the layers have beyond torch's.

    Attributes:
        activation: what follows the normalisation, and the residual if the call has one; a name may be set as well.
        frozen: whether the running statistics are used, and not updated, in training too.
        virtual_batch_size, renorm: as in :func:`gpu_bn.batch_norm`; for training.
    """

    num_features: int = _part("num_features")
    frozen: bool = False
    virtual_batch_size: int | None = None
    renorm: tuple[float, float] | None = None
    ranks: ClassVar[tuple[int, ...]] = ()
    own_check: ClassVar[bool] = False
    """Whether a subclass says itself, in torch's ``_check_input_dim``, what inputs it takes."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls._check_input_dim.__module__ != _BatchNorm.__module__:
            cls.own_check, cls.ranks = True, ()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Activation | str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalise.

        Args:
            input: (N, C, ...).
            residual: added before the activation; like ``input``.
            activation: what follows in this call, if it is not the layer's own.
            mask: which positions count, as in :func:`gpu_bn.batch_norm`.
        """
        if activation is None and self._modules and not self._is_whole():
            return self._in_parts(input, residual, mask)  # type: ignore[no-any-return]
        if self.own_check:
            self._check_input_dim(input)
        activation = self.activation if activation is None else Activation.of(activation)
        training = self.training and not self.frozen
        tracked = not training or self.track_running_stats
        try:  # quicker than attributes, which are looked for elsewhere first
            mean, var = self._buffers["running_mean"], self._buffers["running_var"]
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # another kind of attribute, as of torch.nn.utils.parametrize
            mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        running_mean, running_var = (mean, var) if tracked else self._untracked()
        return layer(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training or (running_mean is None and running_var is None),
            self.momentum,
            self._eps,
            residual,
            activation.name,
            activation.parameter,
            self.num_batches_tracked if training and tracked else None,
            self.ranks,
            mask,
            self.virtual_batch_size if training else None,
            self.renorm if training else None,
        )

    def _untracked(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics of a call in training that may not change them: renormalisation reads them."""
        if self.renorm is None or self.running_mean is None or self.running_var is None:
            return None, None
        return self.running_mean.clone(), self.running_var.clone()

    def init_identity_(self, input: Tensor) -> Fused:
        """Make the layer the identity (then its activation) on a batch, in training and in evaluation mode.

        Sets weight = sqrt(var + eps) and bias = mean, and the running statistics to the batch's mean and biased
        variance, so that the layer can be put behind a trained one without changing the network (Ioffe & Szegedy
        2015, section 3).

        Raises:
            ValueError: the layer has no weight or no bias, or another number of channels than the batch.
        """
        if self.weight is None or self.bias is None:
            raise ValueError(f"an identity needs weight and bias, got {self!r}")
        spec.check_vector("weight", self.weight, input.shape[spec.check_axis(input.shape, 1)])
        with torch.no_grad():
            moments = batch_moments(input, self.eps)
            self.weight.copy_((moments.var + self.eps).sqrt())
            self.bias.copy_(moments.mean)
            if self.running_mean is not None and self.running_var is not None:
                self.running_mean.copy_(moments.mean)
                self.running_var.copy_(moments.var)
        return self

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        if not self.activation.is_identity:
            text += f", activation={self.activation!r}"
        if "_merged" in self.__dict__:  # by the module that calls it
            text += f", merged={self._merged!r}"
        for name in ("virtual_batch_size", "renorm"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text + ", frozen=True" * self.frozen

    def reset_parameters(self) -> None:
        """As torch's layers do; those of torch 2.11 expect a bias where there is a weight."""
        if self.weight is None or self.bias is not None or isinstance(self.weight, UninitializedParameter):
            super().reset_parameters()
        else:
            self.reset_running_stats()
            torch.nn.init.ones_(self.weight)

    def _drop_bias(self, bias: bool) -> None:
        """Have no bias unless ``bias``: layers of torch 2.11 do not take the option."""
        if not bias:
            self.register_parameter("bias", None)

    def _set_options(
        self,
        activation: Activation | str | None,
        virtual_batch_size: int | None,
        renorm: tuple[float, float] | None,
    ) -> None:
        self.activation = Activation.of(activation)
        self.virtual_batch_size = virtual_batch_size
        self.renorm = None if renorm is None else spec.check_renorm(renorm, self.track_running_stats)


class _Sized(Fused):
    """A layer that is told its number of channels."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | str | None = None,
        virtual_batch_size: int | None = None,
        renorm: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._drop_bias(bias)
        self._set_options(activation, virtual_batch_size, renorm)


class _Lazy(Fused):
    """A layer that takes its number of channels from its first input."""

    def __init__(
        self,
        *arguments: Any,
        bias: bool = True,
        activation: Activation | str | None = None,
        virtual_batch_size: int | None = None,
        renorm: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._drop_bias(bias)
        self._set_options(activation, virtual_batch_size, renorm)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        biased = self.bias is not None
        if self.affine and not biased:  # torch 2.11 gives weight and bias their size together
            made: Any = UninitializedParameter
            self.bias = made(device=self.weight.device, dtype=self.weight.dtype)
        super().initialize_parameters(input)  # type: ignore[misc]
        self._drop_bias(biased)


class BatchNorm(_Sized):
    """Normalise inputs of any rank from 2 to 5, with torch's parameters and defaults.

    Call it with ``(input, residual=None, activation=None, mask=None)``: ``input`` is (N, C, ...) in float16, bfloat16,
    float32 or float64; ``residual`` is like ``input`` and is added before the activation; ``mask`` says which positions
    count. The result is like ``input``.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; ``None`` averages over all batches so far.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are running statistics; without them, evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers, a float dtype; torch's default unless given.
        bias: whether ``affine`` includes a bias.
        activation: the activation that follows; :func:`gpu_bn.nn.batch_norm` lists the names.
        virtual_batch_size: how many samples are normalised together in training; ``None`` is all.
        renorm: ``(r_max, d_max)`` of batch renormalisation in training, or ``None``.

    Raises:
        ValueError: an input that is not 2-D to 5-D, or an option that does not fit; the error has torch's text where
            torch has one.
        RuntimeError: tensors of different dtypes or devices, as in torch.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm(4, activation="relu")
        >>> layer(torch.randn(8, 4)).shape, layer(torch.randn(8, 4, 5, 5)).min().item()
        (torch.Size([8, 4]), 0.0)

    Source: Ioffe & Szegedy 2015.
    """


class BatchNorm1d(_Sized, torch.nn.BatchNorm1d):
    """Do what ``torch.nn.BatchNorm1d`` does, with ``activation=``, and a residual in the call.

    The input is (N, C) or (N, C, L). The arguments, the call and its errors are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(4, activation="relu")
        >>> x = torch.randn(8, 4, 9)
        >>> layer(x, residual=x).min().item()
        0.0
    """

    ranks = (2, 3)


class BatchNorm2d(_Sized, torch.nn.BatchNorm2d):
    """Do what ``torch.nn.BatchNorm2d`` does, with ``activation=``, and a residual in the call.

    The input is (N, C, H, W). The arguments, the call and its errors are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm2d(4, activation="relu")
        >>> x = torch.randn(8, 4, 5, 5)
        >>> layer(x, residual=x).min().item()
        0.0
    """

    ranks = (4,)


class BatchNorm3d(_Sized, torch.nn.BatchNorm3d):
    """Do what ``torch.nn.BatchNorm3d`` does, with ``activation=``, and a residual in the call.

    The input is (N, C, D, H, W). The arguments, the call and its errors are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm3d(4, activation="relu")
        >>> x = torch.randn(2, 4, 3, 5, 5)
        >>> layer(x, residual=x).min().item()
        0.0
    """

    ranks = (5,)


def require_channels(lazy: Iterable[str]) -> None:
    """Refuse lazy layers, of these names, that have not seen their first input."""
    if names := ", ".join(map(repr, lazy)):
        raise ValueError(f"lazy layers do not know their channels yet: run a batch through {names} first")


class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d):
    """Do what ``torch.nn.LazyBatchNorm1d`` does: the first input, (N, C) or (N, C, L), tells the number of channels.

    The other arguments are those of :class:`BatchNorm`; the layer then becomes a :class:`BatchNorm1d`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.LazyBatchNorm1d(activation="relu")
        >>> y = layer(torch.randn(8, 4, 9))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm1d', 4)
    """

    cls_to_become = BatchNorm1d
    ranks = (2, 3)


class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d):
    """Do what ``torch.nn.LazyBatchNorm2d`` does: the first input, (N, C, H, W), tells the number of channels.

    The other arguments are those of :class:`BatchNorm`; the layer then becomes a :class:`BatchNorm2d`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.LazyBatchNorm2d(activation="relu")
        >>> y = layer(torch.randn(8, 4, 5, 5))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm2d', 4)
    """

    cls_to_become = BatchNorm2d
    ranks = (4,)


class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d):
    """Do what ``torch.nn.LazyBatchNorm3d`` does: the first input, (N, C, D, H, W), tells the number of channels.

    The other arguments are those of :class:`BatchNorm`; the layer then becomes a :class:`BatchNorm3d`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.LazyBatchNorm3d(activation="relu")
        >>> y = layer(torch.randn(2, 4, 3, 5, 5))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm3d', 4)
    """

    cls_to_become = BatchNorm3d
    ranks = (5,)


class FrozenBatchNorm2d(_Activated):
    """Apply fixed statistics and parameters, which are all buffers, as torchvision's ``FrozenBatchNorm2d`` does.

    Call it with ``(input, residual=None, activation=None)``: ``input`` is (N, C, H, W) in float16, bfloat16, float32 or
    float64; ``residual`` is like ``input``. The result is like ``input``.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        activation: the activation that follows; :func:`gpu_bn.nn.batch_norm` lists the names.

    Raises:
        ValueError: an input that is not 4-D, or an unknown activation.
        RuntimeError: tensors of different dtypes or devices, as in torch.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.FrozenBatchNorm2d(4, activation="relu")
        >>> list(layer.parameters()), layer(torch.randn(2, 4, 3, 3)).min().item()
        ([], 0.0)

    Source: ``torchvision.ops.FrozenBatchNorm2d``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, activation: Activation | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.activation = Activation.of(activation)
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(num_features))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(num_features))

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: Activation | str | None = None
    ) -> Tensor:
        """As :meth:`Fused.forward`."""
        if activation is None and self._modules and not self._is_whole():
            return self._in_parts(input, residual)  # type: ignore[no-any-return]
        activation = self.activation if activation is None else Activation.of(activation)
        return layer(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            False,
            0.0,
            self._eps,
            residual,
            activation.name,
            activation.parameter,
            None,
            (4,),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # of a layer that was not frozen
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        text = f"{len(self.weight)}, eps={self.eps}"
        return text if self.activation.is_identity else f"{text}, activation={self.activation!r}"


@torch.fx.wrap
def layer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    parameter: float,
    num_batches_tracked: Tensor | None,
    ranks: tuple[int, ...],
    mask: Tensor | None = None,
    virtual_batch_size: int | None = None,
    renorm: tuple[float, float] | None = None,
) -> Tensor:
    """A layer's call, one node in a traced graph."""
    if ranks and input.dim() not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
    given = Call(input, weight, bias, residual, running_mean, running_var, num_batches_tracked, mask)
    default = ROWS[activation].default
    chosen = default if default.parameter == parameter else Activation(activation, parameter)
    return functional.normalize(given, Options(training, momentum, eps, chosen, 1, virtual_batch_size, renorm))
