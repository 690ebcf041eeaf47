"""What a backend is: the four phases of batch normalisation, and the per-channel values that pass between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gpu_bn.spec import BatchNormSpec

Array = Any


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot serve the call; the message says why."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of each channel's distribution.

    Attributes:
        count: how many positions each channel has.
        mean: (C,), in the backend's accumulation dtype.
        var: (C,), biased, in the same dtype.
        wide: whether squares of the input leave the range of its dtype, so that a wider one is needed throughout.
    """

    count: int
    mean: Array
    var: Array
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """What a forward call keeps for its backward call.

    ``x`` and ``residual`` are the caller's arrays, not copies: they must not be written to in between. All else is
    of C elements and a copy, so that later changes of the parameters or of the running statistics do no harm.
    ``z`` is not kept; it is computed again, with the same roundings.

    Attributes:
        x: the input.
        residual: the residual, if an activation needs it for its gradient.
        moments: the statistics used, of the batch or the running ones.
        weight, bias: (C,) in the accumulation dtype, or ``None``.
        weight_dtype, bias_dtype: what the parameters came in and their gradients go out in.
        has_residual: whether the forward call had a residual.
        spec: the call's options.
        mask: one bit an element that decides the activation's gradient, kept in place of the residual; the backend
            that made it knows its layout. A ``count`` of the statistics above the input's own is that of all ranks.
    """

    x: Array
    residual: Array | None
    moments: Moments
    weight: Array | None
    bias: Array | None
    weight_dtype: Any
    bias_dtype: Any
    has_residual: bool
    spec: BatchNormSpec
    mask: Array | None = None
    valid: Array | None = None

    @property
    def mean(self) -> Array:
        """(C,) the mean used, in the accumulation dtype."""
        return self.moments.mean

    @property
    def rstd(self) -> Array:
        """(C,) 1 / sqrt(var + eps), in the accumulation dtype."""
        return 1.0 / (self.moments.var + self.spec.eps) ** 0.5


class Sums(NamedTuple):
    """The two reductions of the backward pass, (C,) each in the accumulation dtype."""

    dz: Array
    dz_xhat: Array


class Backend(Protocol):
    """The phases. Arrays are the backend's own library's; arguments have been checked by :mod:`gpu_bn.spec`.

    A backend may also fuse the phases of a call, as a :class:`Fused` one does.
    """

    name: str

    def vector(self, array: Array) -> Array:
        """A copy of a per-channel vector in the accumulation dtype."""

    def cast(self, vector: Array, dtype: Any) -> Array:
        """A per-channel vector in another dtype."""

    def empty_like(self, x: Array) -> Array:
        """An array of ``x``'s shape, dtype and memory format."""

    def copy(self, array: Array, like: Array) -> Array:
        """A copy of an array, in the memory format of another of its shape and dtype."""

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        """Raise ``ValueError`` if writing ``out`` overwrites input not yet read or, unless ``in_place``, any input."""

    def stats(self, x: Array, axis: int) -> Moments:
        """Mean and biased variance of each channel; zeros for an empty ``x``."""

    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        """Move the running statistics towards ``moments``, in place; the variance with Bessel's correction."""

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        """Write ``y`` to ``out``."""

    def keeps_dz(self, saved: Saved) -> bool:
        """Whether ``dz``, stored in the input's dtype, is exact enough to compute ``dx`` from."""

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        """Sum ``dz`` and ``dz * xhat`` over each channel, and write ``dz`` to the array given, if any."""

    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array, dz: Array | None) -> None:
        """Write ``dx`` to ``out``.

        ``sums`` is ``None`` for frozen statistics; ``dz``, if given, holds what ``backward_reduce`` wrote, and may
        be ``out``.
        """


class Fused(Protocol):
    """A backend that does all phases of a call in as few launches as it can. Neither method sees empty inputs."""

    def forward(
        self,
        x: Array,
        spec: BatchNormSpec,
        running_mean: Array | None,
        running_var: Array | None,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        out: Array | None,
    ) -> tuple[Array, Saved]:
        """``y``, in ``out`` if it is given, and what the backward call needs; updates the running statistics."""

    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> tuple[Array | None, ...]:
        """``dx, dweight, dbias, dresidual``, each ``None`` unless ``need`` names it."""
