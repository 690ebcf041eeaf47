"""What a backend is: the four phases of batch normalisation, and the per-channel values that pass between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from gpu_bn.call import Call
from gpu_bn.plan import LaunchPlan
from gpu_bn.spec import BatchNormSpec

Array = Any
OnPlan = Callable[[LaunchPlan, Sequence[Any]], None]
"""Gets the plan of a call and its launches; these have the ``registers`` of a thread after the first run, if known."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot serve the call; the message says why."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of each channel's distribution.

    Attributes:
        count: how many positions each channel has, of a ghost batch if there are several; where that is known on the
            device only (with a mask, or over ranks) an array of the backend's library, (groups,) float64.
        mean: (groups * C,), ordered (ghost batch, channel), in the backend's accumulation dtype.
        var: like ``mean``, biased.
        wide: whether squares of the input leave the range of its dtype, so that a wider one is needed throughout.
    """

    count: Any
    mean: Array
    var: Array
    wide: bool = False

    def parts(self, groups: int) -> Iterator[Moments]:
        """Return those of each ghost batch."""
        channels = self.mean.shape[0] // groups
        for group in range(groups):
            count = self.count if isinstance(self.count, int) else self.count[group : group + 1]
            at = slice(group * channels, (group + 1) * channels)
            yield Moments(count, self.mean[at], self.var[at], self.wide)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a forward call keeps for its backward call.

    ``x`` and ``residual`` are the caller's arrays, not copies: they must not be written to in between. All else
    has C elements and is a copy, so later changes of the parameters or of the running statistics do no harm.
    ``z`` is not kept; it is computed again, with the same roundings.

    Attributes:
        x: the input.
        residual: the residual, if an activation needs it for its gradient.
        moments: the statistics used, of the batch or the running ones.
        weight, bias: (C,) in the accumulation dtype, or ``None``.
        weight_dtype, bias_dtype: what the parameters came in and their gradients go out in.
        has_residual: whether the forward call had a residual.
        spec: the call's options.
        mask: what decides the activation's gradient, kept in place of the residual: one bit an element, whose layout
            the backend knows that made it, or ``y`` itself (autograd on a CPU). A ``count`` of the statistics above the
            input's own is that of all ranks.
        valid: bool, dense, of x's shape but one channel: which positions count; ``None`` for all.
        renorm: (C,) each: batch renormalisation's ``r`` and ``d``, which ``weight`` and ``bias`` include.
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
    renorm: tuple[Array, Array] | None = None

    @staticmethod
    def of_call(call: Call, spec: BatchNormSpec, moments: Moments, weight: Array | None, bias: Array | None) -> Saved:
        """Collect what the backward call of a call needs that used these statistics, weight and bias."""
        residual = None if spec.activation.is_identity else call.residual
        weight_dtype, bias_dtype = (None if one is None else one.dtype for one in (call.weight, call.bias))
        rest = (weight_dtype, bias_dtype, call.residual is not None, spec, None, call.valid)
        return Saved(call.x, residual, moments, weight, bias, *rest)

    @property
    def positions(self) -> Any:
        """How many positions the backward sums are divided by: the count, but at least 1."""
        count = self.moments.count
        return count if isinstance(count, int) else count.clip(1.0, None)

    def parts(self) -> Iterator[tuple[slice, Saved]]:
        """Return where each ghost batch lies along axis 0, and what a call of its own would have kept."""
        size, spec = self.x.shape[0] // self.spec.groups, replace(self.spec, groups=1)
        for group, moments in enumerate(self.moments.parts(self.spec.groups)):
            at = slice(group * size, (group + 1) * size)
            residual, valid = (None if array is None else array[at] for array in (self.residual, self.valid))
            yield at, replace(self, x=self.x[at], residual=residual, moments=moments, spec=spec, valid=valid)

    @property
    def mean(self) -> Array:
        """(groups * C,) the mean used, in the accumulation dtype."""
        return self.moments.mean

    @property
    def rstd(self) -> Array:
        """(groups * C,) 1 / sqrt(var + eps), in the accumulation dtype."""
        return 1.0 / (self.moments.var + self.spec.eps) ** 0.5


class Grads(NamedTuple):
    """Hold the gradients of one call; those not asked for, or of arguments that were not given, are ``None``.

    Attributes:
        dx: like the input.
        dweight: (C,), in the weight's dtype.
        dbias: (C,), in the bias's dtype.
        dresidual: like the input.
    """

    dx: Array | None = None
    dweight: Array | None = None
    dbias: Array | None = None
    dresidual: Array | None = None


class Sums(NamedTuple):
    """The two reductions of the backward pass, (groups * C,) each in the accumulation dtype."""

    dz: Array
    dz_xhat: Array


class Backend(Protocol):
    """The phases. Arrays are the backend's own library's; arguments have been checked by :mod:`gpu_bn.spec`.

    A backend may also fuse the phases of a call: :class:`FusedBackend`. ``valid`` is as in :class:`Saved`;
    ``groups`` is the number of ghost batches, equal parts of axis 0 with statistics and sums of their own.
    """

    name: str

    def vector(self, array: Array) -> Array:
        """Return a copy of a per-channel vector in the accumulation dtype."""

    def cast(self, vector: Array, dtype: Any) -> Array:
        """Return a per-channel vector in another dtype."""

    def empty_like(self, x: Array) -> Array:
        """Return an array of ``x``'s shape, dtype and memory format."""

    def copy(self, array: Array, like: Array) -> Array:
        """Copy an array, in the memory format of another of its shape and dtype."""

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        """Raise ``ValueError`` if writing ``out`` overwrites input not yet read or, unless ``in_place``, any input."""

    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        """Return mean and biased variance of each channel; zeros where there is nothing."""

    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        """Move the running statistics towards ``moments``, in place; the variance with Bessel's correction.

        Ghost batches one after the other; those with no positions leave the statistics as they are.
        """

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        """Write ``y`` to ``out``; 0 where a position is not valid, as all outputs are."""

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        """Sum ``dz`` and ``dz * xhat`` over each channel, and write ``dz`` to the array given, if any."""

    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        """Write ``dx`` to ``out``; ``sums`` is ``None`` for frozen statistics."""


class FusedBackend(Protocol):
    """A backend that does all phases of a call in as few launches as it can. Neither method sees empty inputs."""

    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Array, Saved]:
        """Return ``y`` and what the backward call needs; write the running statistics last.

        ``y`` is ``call.out`` if that is given. ``call.counter`` is the caller's to increment. ``keep`` says whether a
        backward call may follow: without one, an evaluation keeps nothing that costs memory.
        """

    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        """Compute the gradients that ``need`` names; the others are ``None``."""
