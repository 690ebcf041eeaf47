"""The interface of a backend: the four phases of batch normalisation, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from gpu_bn.call import Call
from gpu_bn.plan import LaunchPlan
from gpu_bn.spec import BatchNormSpec

Array = Any
OnPlan = Callable[[LaunchPlan, Sequence[Any]], None]
"""A function that receives a call's plan and its launches.

After the first run a launch has the attribute ``registers``: how many a thread uses, if that is known.
"""


class BackendUnavailableError(RuntimeError):
    """Raised when the requested backend cannot serve the call; the message says why."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of each channel.

    Attributes:
        count: the number of positions of each channel, in one ghost batch if there are several. Where only the device
            knows it (with a mask, or over ranks) it is an array of the backend's library, (groups,) float64.
        mean: (groups * C,), ordered (ghost batch, channel), in the backend's accumulation dtype.
        var: like ``mean``; the biased variance.
        wide: whether squares of the input leave the range of its dtype, so that all phases need a wider one.
    """

    count: Any
    mean: Array
    var: Array
    wide: bool = False

    def parts(self, groups: int) -> Iterator[Moments]:
        """Yield the moments of each ghost batch."""
        channels = self.mean.shape[0] // groups
        for group in range(groups):
            count = self.count if isinstance(self.count, int) else self.count[group : group + 1]
            at = slice(group * channels, (group + 1) * channels)
            yield Moments(count, self.mean[at], self.var[at], self.wide)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a forward call keeps for its backward call.

    ``x`` and ``residual`` are the caller's arrays, not copies: they must not be written to in between. The
    per-channel vectors are copies, so later changes of the parameters or of the running statistics do no harm.
    ``z`` is not kept; it is computed again, with the same roundings.

    Attributes:
        x: the input.
        residual: the residual, if an activation needs it for its gradient.
        moments: the statistics used, of the batch or the running ones.
        weight, bias: (C,) in the accumulation dtype, or ``None``.
        weight_dtype, bias_dtype: the dtypes of the parameters and of their gradients.
        has_residual: whether the forward call had a residual.
        spec: the call's options.
        mask: kept instead of the residual to decide the activation's gradient: one sign bit for each element, in a
            layout that only the backend which made it knows, or ``y`` itself (autograd on a CPU).
        valid: which positions count, a contiguous bool array of x's shape with one channel; ``None`` for all.
        renorm: ``r`` and ``d`` of batch renormalisation, (C,) each; ``weight`` and ``bias`` include them.
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
    def from_call(call: Call, spec: BatchNormSpec, moments: Moments, weight: Array | None, bias: Array | None) -> Saved:
        """Collect what the backward call needs, given the statistics, weight and bias that the forward call used."""
        residual = None if spec.activation.is_identity else call.residual
        weight_dtype, bias_dtype = (None if one is None else one.dtype for one in (call.weight, call.bias))
        rest = (weight_dtype, bias_dtype, call.residual is not None, spec, None, call.valid)
        return Saved(call.x, residual, moments, weight, bias, *rest)

    @property
    def positions(self) -> Any:
        """The number of positions that divides the backward sums: the count, but at least 1."""
        count = self.moments.count
        return count if isinstance(count, int) else count.clip(1.0, None)

    def parts(self) -> Iterator[tuple[slice, Saved]]:
        """Yield each ghost batch's slice of axis 0 and what a separate call on it would have kept."""
        size, spec = self.x.shape[0] // self.spec.groups, replace(self.spec, groups=1)
        for group, moments in enumerate(self.moments.parts(self.spec.groups)):
            at = slice(group * size, (group + 1) * size)
            residual, valid = (None if array is None else array[at] for array in (self.residual, self.valid))
            yield at, replace(self, x=self.x[at], residual=residual, moments=moments, spec=spec, valid=valid)

    @property
    def mean(self) -> Array:
        """The mean used, (groups * C,) in the accumulation dtype."""
        return self.moments.mean

    @property
    def rstd(self) -> Array:
        """1 / sqrt(var + eps), (groups * C,) in the accumulation dtype."""
        return 1.0 / (self.moments.var + self.spec.eps) ** 0.5


class Grads(NamedTuple):
    """The gradients of one call; ``None`` for those not requested and for arguments that were not given.

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
    """The phases of a call. All arrays belong to the backend's library; :mod:`gpu_bn.spec` has checked the arguments.

    A backend may also fuse the phases of a call: see :class:`FusedBackend`. ``valid`` is described at :class:`Saved`.
    ``groups`` is the number of ghost batches: equal parts of axis 0, each with separate statistics and sums.
    """

    name: str

    def vector(self, array: Array) -> Array:
        """Return a copy of a per-channel vector in the accumulation dtype."""

    def cast(self, vector: Array, dtype: Any) -> Array:
        """Return a per-channel vector in another dtype."""

    def empty_like(self, x: Array) -> Array:
        """Return an array of ``x``'s shape, dtype and memory format."""

    def copy(self, array: Array, like: Array) -> Array:
        """Return a copy of an array with the memory format of ``like``, which has its shape and dtype."""

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        """Raise ``ValueError`` if writing ``out`` overwrites input not yet read or, unless ``in_place``, any input."""

    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        """Return the mean and biased variance of each channel; zeros where no position counts."""

    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        """Update the running statistics from ``moments``, in place; the variance with Bessel's correction.

        Ghost batches update them one after the other; one without positions leaves them as they are.
        """

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        """Write ``y`` to ``out``. Like all outputs, it is 0 at positions that are not valid."""

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        """Return the sums of ``dz`` and ``dz * xhat`` over each channel; write ``dz`` too if it is an array."""

    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        """Write ``dx`` to ``out``; ``sums`` is ``None`` for frozen statistics."""


class FusedBackend(Protocol):
    """A backend that does all phases of a call in as few launches as it can. Its methods never get empty inputs."""

    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Array, Saved]:
        """Return ``y`` and what the backward call needs; write the running statistics last.

        ``y`` is ``call.out`` if that is given. The caller increments ``call.counter``. ``keep`` tells whether a
        backward call may follow; if not, an evaluation keeps nothing that costs memory.
        """

    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        """Compute the gradients that ``need`` names; the others are ``None``."""
