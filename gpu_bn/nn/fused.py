"""The base class of our layers with running statistics, and the function that all layers call."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from gpu_bn import spec
from gpu_bn.activations import Activation, make_activation
from gpu_bn.call import Call, Options
from gpu_bn.folding import batch_moments
from gpu_bn.nn import functional
from gpu_bn.nn.activated import Activated, guarded_property
from gpu_bn.nn.operators import plain_calls
from gpu_bn.nn.running import untracked_statistics


class Fused(Activated, _BatchNorm):
    """torch's ``_BatchNorm`` with an activation, a residual, a mask and frozen statistics.

    Attributes:
        activation: the activation that is applied last, after the residual is added; it may be set to a name.
        frozen: whether the running statistics are used, and not updated, in training too.
        virtual_batch_size, renorm: options of training, described in :func:`gpu_bn.batch_norm`.
    """

    num_features: int = guarded_property("num_features")
    frozen: bool = False
    virtual_batch_size: int | None = None
    renorm: tuple[float, float] | None = None
    ranks: ClassVar[tuple[int, ...]] = ()
    """The ranks of the inputs that the layer accepts; ``()`` accepts all from 2 to 5."""
    overrides_check: ClassVar[bool] = False
    """Whether the class overrides torch's ``_check_input_dim``, which then replaces the check of ``ranks``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls._check_input_dim.__module__ != _BatchNorm.__module__:
            cls.overrides_check, cls.ranks = True, ()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Activation | str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalise, add the residual, and apply the activation.

        Args:
            input: (N, C, ...).
            residual: added before the activation; it has ``input``'s shape and dtype.
            activation: replaces the layer's activation in this call.
            mask: which positions count, as in :func:`gpu_bn.batch_norm`.
        """
        if activation is None and self._modules and not self.replaces_children():
            return self._call_children(input, residual, mask)  # type: ignore[no-any-return]
        if self.overrides_check:
            self._check_input_dim(input)
        if activation is None:
            activation = self.activation
        elif type(activation) is not Activation:
            activation = Activation.of(activation)
        training = self.training and not self.frozen
        tracked = not training or self.track_running_stats
        try:  # faster than attributes, which torch.nn.Module finds only after Python's own lookup fails
            buffers, parameters = self._buffers, self._parameters
            mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # something replaced a parameter, as torch.nn.utils.parametrize does
            mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
            counter = self.num_batches_tracked if training and tracked else None
        running_mean, running_var = (mean, var) if tracked else untracked_statistics(mean, var, self.renorm)
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
            counter if training and tracked else None,
            self.ranks,
            mask,
            self.virtual_batch_size if training else None,
            self.renorm if training else None,
        )

    def init_identity_(self, input: Tensor) -> Fused:
        """Initialise the layer so that its normalisation is the identity on a batch, in training and evaluation.

        Set weight = sqrt(var + eps) and bias = mean, and the running statistics to the batch's mean and biased
        variance. The layer can then be put behind a trained one without changing the network (Ioffe & Szegedy 2015,
        section 3).

        Raises:
            ValueError: the layer has no weight or no bias, or its number of channels differs from the batch's.
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
        if "_merged" in self.__dict__:  # set by convert(fuse=True)
            text += f", merged={self._merged!r}"
        for name in ("virtual_batch_size", "renorm"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text + ", frozen=True" * self.frozen

    def reset_parameters(self) -> None:
        """Reset the running statistics, weight and bias; torch 2.11 cannot reset a layer with a weight and no bias."""
        if self.weight is None or self.bias is not None or isinstance(self.weight, UninitializedParameter):
            super().reset_parameters()
        else:
            self.reset_running_stats()
            torch.nn.init.ones_(self.weight)

    def _drop_bias(self, bias: bool) -> None:
        """Remove the layer's bias if ``bias`` is false: layers of torch 2.11 do not have this option."""
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
    """Compute a layer's output; a traced graph records this call as one node."""
    if ranks and input.dim() not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
    tensors = input, weight, bias, residual, running_mean, running_var, num_batches_tracked
    if mask is None and virtual_batch_size is None and renorm is None:
        y = plain_calls.forward(tensors, training, momentum, eps, activation, parameter)
        if y is not None:
            return y
    options = Options(training, momentum, eps, make_activation(activation, parameter), 1, virtual_batch_size, renorm)
    return functional.general_batch_norm(Call(*tensors, mask), options)
