"""Whole calls, for all dtypes and activations: what is particular to these are kernels that come as addresses.

A call has phases, bits of ``phases``: ``START``, ``SUM`` and ``FINISH`` make the statistics, or the sums of a backward
call; ``WRITE`` writes tensors, ``END`` per-channel results, last. In ``SUM`` and ``WRITE`` parts are claimed from a
counter each, so that several threads may run them at the same time; the parts depend on shapes alone. A ``fused`` call
does the first four in ``SUM``, group after group of channels, so that the second pass finds a group in the cache.

All arguments are addresses, counts of elements, and numbers. Addresses of parameters' vectors are tagged.
"""

import math

from gpu_bn.kernels.cpu.compiler import cold
from gpu_bn.kernels.cpu.scalars import elements, number, parameter, put_number, put_parameter, rounded
from gpu_bn.kernels.cpu.vector import FLOAT32

START, SUM, FINISH, WRITE, END = 1, 2, 4, 8, 16
TRUSTED = 4.0
SMALLEST, LARGEST = 1e-30, 1e37
"""As for channels."""


# ------------------------------------------------------------------------------------------------ per-channel numbers
@cold
def affine(mean, var, eps, weight, bias, double, at):
    """A channel's centre, scale and shift, z = (x - centre) * scale + shift; 1 / sd; and mean less centre."""
    m = number(mean, at)
    rstd = 1.0 / math.sqrt(number(var, at) + eps)
    centre = m if double else rounded(elements(0, FLOAT32), m)
    scale = rstd * parameter(weight, at) if weight else rstd
    shift = (centre - m) * scale
    if bias:
        shift += parameter(bias, at)
    return centre, scale, shift, rstd, m - centre


@cold
def slopes(rstd, rest, dz, dz_xhat, count):
    """dx = scale * (dz + slope * (x - centre) + offset)."""
    slope = -rstd * dz_xhat / count
    return slope, -dz / count - slope * rest


@cold
def move(running_mean, running_var, mean, var, channels, count, momentum):
    """Move the running statistics."""
    bessel = count / max(count - 1.0, 1.0)
    for at in range(channels):
        old_mean = parameter(running_mean, at)
        old_var = parameter(running_var, at)
        new_mean = (1.0 - momentum) * old_mean + momentum * number(mean, at)
        new_var = (1.0 - momentum) * old_var + momentum * (number(var, at) * bessel)
        put_parameter(running_mean, at, new_mean)
        put_parameter(running_var, at, new_var)


@cold
def copy_running(running_mean, running_var, mean, var, channels):
    for at in range(channels):
        put_number(mean, at, parameter(running_mean, at))
        put_number(var, at, parameter(running_var, at))


@cold
def part(at, runs, length, runs_each, length_each):
    """The runs, from and how many, and the elements of each, from and how many, of a part of a channel."""
    pieces = (length + length_each - 1) // length_each
    run, first = at // pieces * runs_each, at % pieces * length_each
    return run, min(runs_each, runs - run), first, min(length_each, length - first)
