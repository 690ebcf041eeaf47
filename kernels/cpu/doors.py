"""Whole calls of torch's tensors, as functions that Python calls directly: builtin ones, with ``METH_FASTCALL``.

Such a function takes the tensors themselves and looks at them through DLPack's exchange interface, so that no step of
Python's lies between a call and its kernel. What calls alike have in common is a *record*, int64 words at an address:
``FIELDS``, then the kernel's arguments that are known in advance, then the shape. Where something is not as the record
says, a vector is none that kernels read, or memory that is written is shared, the function does nothing and returns 1,
else 0.
"""

from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import memory
from gpu_bn.kernels.cpu.calls import LINE
from gpu_bn.kernels.cpu.compiler import cold, inlined, kernel
from gpu_bn.kernels.cpu.scalars import at_address, call_kernel
from gpu_bn.kernels.cpu.team import share
from gpu_bn.kernels.cpu.vector import INT32, INT64

FIELDS = ("look", "none", "kind", "channels", "misaligned", "extent", "added_extent", "releases", "trains", "count",
          "scratch", "kernel", "phases", "parallel", "number")  # fmt: skip
(LOOK, NONE, KIND, CHANNELS, MISALIGNED, EXTENT, ADDED_EXTENT, RELEASES, TRAINS, COUNT, SCRATCH, KERNEL, PHASES,
 PARALLEL, NUMBER) = range(len(FIELDS))  # fmt: skip
DATA, DEVICE, TYPE, SHAPE, STRIDES, OFFSET = range(6)
"""The words of a view of DLPack's; ``TYPE`` has the rank in its lower half, in the upper the code, bits and lanes."""
CPU = 1


def kind(rank, code, bits):
    """The word ``TYPE`` of a tensor."""
    return rank + ((code + (bits << 8) + (1 << 16)) << 32)


SINGLES, DOUBLES, COUNTER = kind(1, 2, 32), kind(1, 2, 64), kind(0, 0, 64)

I, V = types.int64, types.void  # noqa: E741
clear_error = types.ExternalFunction("PyErr_Clear", V())
error = types.ExternalFunction("PyErr_Occurred", I())
bad_argument = types.ExternalFunction("PyErr_BadArgument", types.int32())
as_double = types.ExternalFunction("PyFloat_AsDouble", types.float64(I))
as_whole = types.ExternalFunction("PyLong_AsLongLong", I(I))
from_whole = types.ExternalFunction("PyLong_FromLongLong", I(I))
release = types.ExternalFunction("PyEval_SaveThread", I())
take_back = types.ExternalFunction("PyEval_RestoreThread", V(I))


# ----------------------------------------------------------------------------------------------------------- looking
def load_word(builder, address, at):
    return builder.load(memory.place(builder, at_address(builder, address), at, 8, INT64))


@intrinsic
def word(typing, address, at):
    """An int64 at an address."""
    return I(I, I), lambda context, builder, sig, args: load_word(builder, *args)


@intrinsic(prefer_literal=True)
def words(typing, address, count):
    """So many of them, as a tuple."""
    found = types.UniTuple(I, count.literal_value)

    def generate(context, builder, sig, args):
        each = [load_word(builder, args[0], INT64(at)) for at in range(len(found))]
        return context.make_tuple(builder, found, each)

    return found(I, count), generate


@intrinsic
def new_view(typing):
    """Room for a view."""

    def generate(context, builder, sig, args):
        return builder.ptrtoint(cgutils.alloca_once(builder, INT64, 6), INT64)

    return I(), generate


@intrinsic
def fails(typing, look, one, view):
    """Fill a view of an object, and return whether that failed."""

    def generate(context, builder, sig, args):
        pointers = [at_address(builder, address) for address in args[1:]]
        signature = ir.FunctionType(INT32, [pointer.type for pointer in pointers])
        result = builder.call(builder.inttoptr(args[0], signature.as_pointer()), pointers)
        return builder.icmp_signed("!=", result, INT32(0))

    return types.boolean(I, I, I), generate


@cold
def found(record, one, view):
    """Where a tensor in the memory of the CPU begins; 0 for ``None``, -1 for any other."""
    if one == word(record, NONE):
        return 0
    if fails(word(record, LOOK), one, view):
        clear_error()
        return -1
    return word(view, DATA) + word(view, OFFSET) if word(view, DATA) and word(view, DEVICE) == CPU else -1


@cold
def tensor(record, one, shape, view):
    """As ``found``, of a tensor with the record's dtype and shape."""
    start = found(record, one, view)
    if start <= 0:
        return start
    if word(view, TYPE) != word(record, KIND) or start & word(record, MISALIGNED):
        return -1
    for at in range(word(record, KIND) & 0xFFFFFFFF):
        if word(word(view, SHAPE), at) != word(shape, at):
            return -1
    return start


@cold
def vector(record, one, view):
    """As ``found``, but the tagged address, of a dense vector of the channels in float32 or float64."""
    start = found(record, one, view)
    if start <= 0:
        return start
    channels, double = word(record, CHANNELS), word(view, TYPE) == DOUBLES
    dense = channels == 1 or word(word(view, STRIDES), 0) == 1
    if not (double or word(view, TYPE) == SINGLES) or word(word(view, SHAPE), 0) != channels or not dense or start & 3:
        return -1
    return start + int(double)


@cold
def counter_at(record, one, view):
    """As ``found``, of a counter of batches."""
    start = found(record, one, view)
    return start if start <= 0 or (word(view, TYPE) == COUNTER and start & 7 == 0) else -1


@cold
def meet(written, length, read, extent):
    """Whether memory that is written shares a byte with some other."""
    return written != 0 and read != 0 and written < read + extent and read < written + length


@cold
def size(tagged, channels):
    return channels * (8 if tagged & 1 else 4)


@cold
def shared(record, x, residual, weight, bias, mean, var, counter):
    """Whether what training writes shares memory with itself or with what is read."""
    channels = word(record, CHANNELS)
    for at, one in enumerate((mean, var, counter)):
        own, length = one & -2, 8 if at == 2 else size(one, channels)
        if meet(own, length, x, word(record, EXTENT)) or meet(own, length, residual, word(record, ADDED_EXTENT)):
            return True
        for other in (weight, bias):
            if meet(own, length, other & -2, size(other, channels)):
                return True
    return (
        meet(mean & -2, size(mean, channels), var & -2, size(var, channels))
        or meet(counter, 8, mean & -2, size(mean, channels))
        or meet(counter, 8, var & -2, size(var, channels))
    )


# ------------------------------------------------------------------------------------------------------------- doors
@intrinsic(prefer_literal=True)
def numbers(typing, arguments, count, floats):
    """So many numbers of Python's as a tuple; bit ``i`` of ``floats`` says whether number ``i`` is a float64."""
    kinds = [types.float64 if floats.literal_value >> at & 1 else I for at in range(count.literal_value)]
    found = types.BaseTuple.from_types(kinds)

    def generate(context, builder, sig, args):
        each = []
        for at, kind in enumerate(kinds):
            convert = as_whole if kind == I else as_double
            callee = ir.FunctionType(context.get_value_type(kind), [INT64])
            callee = cgutils.get_or_insert_function(builder.module, callee, convert.symbol)
            each.append(builder.call(callee, [load_word(builder, args[0], INT64(at))]))
        return context.make_tuple(builder, found, each)

    return found(I, count, floats), generate


@cache
def plain(how_many, floats):
    """The function of calls by numbers: the kernel's address, then its so many arguments."""

    @kernel
    def door(module, arguments, count):
        if count != how_many + 1:
            bad_argument()
            return 0
        address, given = as_whole(word(arguments, 0)), numbers(arguments + 8, how_many, floats)
        if error():
            return 0
        thread = release()
        call_kernel(address, given)
        take_back(thread)
        return from_whole(0)

    return door


@inlined
def alone(record, most, arguments):
    """Run a kernel on the caller's thread."""
    call_kernel(word(record, KERNEL), (word(record, PHASES),) + arguments)


@inlined
def shared_by(record, most, arguments):
    """Run a kernel on ``most`` threads."""
    share(word(record, PARALLEL), word(record, NUMBER), most, word(record, KERNEL), word(record, PHASES), arguments)


def forward(shares, heads, shapes, cuts):
    """The function of forward calls whose kernel has so many arguments known in advance, in three places.

    ``shares``: whether threads share its work. Its own arguments are the record, x, residual, y, weight, bias, running
    mean and variance, counter, the place of the statistics or ``None``, momentum, eps, the activation's parameter, the
    address of scratch memory, and how many threads there are.
    """
    run = shared_by if shares else alone
    first, second = 8 * len(FIELDS), 8 * heads

    @kernel
    def door(module, arguments, count):
        record, view = as_whole(word(arguments, 0)), new_view()
        known = record + first
        shape = known + 8 * (heads + shapes + cuts)
        x = tensor(record, word(arguments, 1), shape, view)
        residual = tensor(record, word(arguments, 2), shape, view)
        y = tensor(record, word(arguments, 3), shape, view)
        weight, bias = vector(record, word(arguments, 4), view), vector(record, word(arguments, 5), view)
        mean, var = vector(record, word(arguments, 6), view), vector(record, word(arguments, 7), view)
        counter = counter_at(record, word(arguments, 8), view)
        statistics, scratch = found(record, word(arguments, 9), view), as_whole(word(arguments, 13))
        if min(x, residual, y, weight, bias, mean, var, counter, statistics) < 0 or x == 0 or y == 0:
            return from_whole(1)
        if word(record, TRAINS) and shared(record, x, residual, weight, bias, mean, var, counter):
            return from_whole(1)
        if statistics == 0:
            statistics = scratch + LINE + word(record, SCRATCH)
        momentum, eps, p = (
            as_double(word(arguments, 10)), as_double(word(arguments, 11)), as_double(word(arguments, 12)),
        )  # fmt: skip
        threads = as_whole(word(arguments, 14))
        thread = release() if word(record, RELEASES) else 0
        run(
            record, threads,
            words(known, heads) + (x, residual, y) + words(known + second, shapes)
            + (weight, bias, mean, var, counter, statistics, statistics + 8 * word(record, CHANNELS),
               word(record, TRAINS), momentum, eps, p)
            + words(known + second + 8 * shapes, cuts) + (scratch + LINE, scratch),
        )  # fmt: skip
        if thread:
            take_back(thread)
        return from_whole(0)

    return door


def backward(shares, heads, shapes, cuts):
    """As :func:`forward`, of backward calls.

    The arguments are the record, x, residual, dy, dx, dresidual, weight, bias, their gradients, the statistics, eps,
    the activation's parameter, the address of scratch memory, and how many threads there are.
    """
    run = shared_by if shares else alone
    first, second = 8 * len(FIELDS), 8 * heads

    @kernel
    def door(module, arguments, count):
        record, view = as_whole(word(arguments, 0)), new_view()
        known = record + first
        shape = known + 8 * (heads + shapes + cuts)
        x = tensor(record, word(arguments, 1), shape, view)
        residual = tensor(record, word(arguments, 2), shape, view)
        dy = tensor(record, word(arguments, 3), shape, view)
        dx = tensor(record, word(arguments, 4), shape, view)
        dresidual = tensor(record, word(arguments, 5), shape, view)
        weight, bias = vector(record, word(arguments, 6), view), vector(record, word(arguments, 7), view)
        dweight, dbias = vector(record, word(arguments, 8), view), vector(record, word(arguments, 9), view)
        mean, scratch = found(record, word(arguments, 10), view), as_whole(word(arguments, 13))
        if min(x, residual, dy, dx, dresidual, weight, bias, dweight, dbias, mean) < 0 or min(x, dy, mean) == 0:
            return from_whole(1)
        by = 8 * word(record, CHANNELS)
        sums = scratch + LINE + word(record, SCRATCH)
        eps, p = as_double(word(arguments, 11)), as_double(word(arguments, 12))
        threads = as_whole(word(arguments, 14))
        thread = release() if word(record, RELEASES) else 0
        run(
            record, threads,
            words(known, heads) + (x, residual, dy, dx, dresidual) + words(known + second, shapes)
            + (weight, bias, dweight, dbias, mean, mean + by, sums, sums + by, word(record, TRAINS),
               float(word(record, COUNT)), eps, p)
            + words(known + second + 8 * shapes, cuts) + (scratch + LINE, scratch),
        )  # fmt: skip
        if thread:
            take_back(thread)
        return from_whole(0)

    return door
