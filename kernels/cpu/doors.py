"""Doors: builtin functions (``METH_FASTCALL``) that run a whole call of torch tensors without any Python code.

A door takes the tensors themselves and reads their addresses, shapes and strides through DLPack's exchange interface.
What equal calls have in common is in a *record*, int64 numbers at an address: ``FIELDS`` fields, then the arguments of
the kernel that are known in advance, then the shape. A door returns 0. It does nothing and returns 1 if a tensor is not
as the record says, if kernels cannot read a vector, or if memory that is written overlaps other memory of the call.
"""

from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import memory
from gpu_bn.kernels.cpu.calls import LINE
from gpu_bn.kernels.cpu.compiler import cold, inlined, kernel
from gpu_bn.kernels.cpu.memory import as_pointer
from gpu_bn.kernels.cpu.scalars import call_kernel
from gpu_bn.kernels.cpu.team import run_phases
from gpu_bn.kernels.cpu.vector import INT32, INT64

FIELDS = 15
(GET_VIEW, NONE, TYPE_WORD, CHANNELS, ADDRESS_MASK, X_BYTES, RESIDUAL_BYTES, RELEASE_GIL, TRAINING, POSITIONS,
 SCRATCH_BYTES, KERNEL, PHASES, GOMP_PARALLEL, THREAD_NUMBER) = range(FIELDS)  # fmt: skip
"""Indices of the fields of a record. ``GET_VIEW`` is the address of DLPack's function that fills a view, ``NONE`` the
address of ``None``, ``ADDRESS_MASK`` the bits that are 0 in an aligned address. ``X_BYTES`` and ``RESIDUAL_BYTES`` are
the bytes from the first element to the end of the last. ``SCRATCH_BYTES`` lie before the statistics or sums that the
caller does not pass. The last two are the addresses of ``GOMP_parallel`` and ``omp_get_thread_num`` of OpenMP."""
DATA, DEVICE, TYPE, SHAPE, STRIDES, OFFSET = range(6)
"""Indices of the int64 words of a view, DLPack's ``DLTensor``."""
CPU = 1
"""The device type of the CPU in DLPack."""


def type_word(rank, code, bits):
    """Return the word ``TYPE`` of a view: the rank in its lower half, the code, bits and lanes of the dtype above."""
    return rank + ((code + (bits << 8) + (1 << 16)) << 32)


SINGLES, DOUBLES, COUNTER = type_word(1, 2, 32), type_word(1, 2, 64), type_word(0, 0, 64)

I, V = types.int64, types.void  # noqa: E741
clear_error = types.ExternalFunction("PyErr_Clear", V())
error_occurred = types.ExternalFunction("PyErr_Occurred", I())
bad_argument = types.ExternalFunction("PyErr_BadArgument", types.int32())
as_float = types.ExternalFunction("PyFloat_AsDouble", types.float64(I))
as_int = types.ExternalFunction("PyLong_AsLongLong", I(I))
from_int = types.ExternalFunction("PyLong_FromLongLong", I(I))
release_gil = types.ExternalFunction("PyEval_SaveThread", I())
acquire_gil = types.ExternalFunction("PyEval_RestoreThread", V(I))


# ---------------------------------------------------------------------------------------------------- reading tensors
def load_word(builder, address, at):
    """Generate the code of :func:`word`."""
    return builder.load(memory.element_pointer(builder, as_pointer(builder, address), at, 8, INT64))


@intrinsic
def word(typing, address, at):
    """Load number ``at`` of the int64 numbers at an address."""
    return I(I, I), lambda context, builder, sig, args: load_word(builder, *args)


@intrinsic(prefer_literal=True)
def words(typing, address, count):
    """Load ``count`` int64 numbers at an address as a tuple."""
    result = types.UniTuple(I, count.literal_value)

    def generate(context, builder, sig, args):
        each = [load_word(builder, args[0], INT64(at)) for at in range(len(result))]
        return context.make_tuple(builder, result, each)

    return result(I, count), generate


@intrinsic
def new_view(typing):
    """Return the address of memory on the stack for a view."""

    def generate(context, builder, sig, args):
        return builder.ptrtoint(cgutils.alloca_once(builder, INT64, 6), INT64)

    return I(), generate


@intrinsic
def cannot_view(typing, get_view, tensor, view):
    """Fill a view of a Python object by DLPack's function at ``get_view``, and return True if that failed."""

    def generate(context, builder, sig, args):
        pointers = [as_pointer(builder, address) for address in args[1:]]
        signature = ir.FunctionType(INT32, [pointer.type for pointer in pointers])
        result = builder.call(builder.inttoptr(args[0], signature.as_pointer()), pointers)
        return builder.icmp_signed("!=", result, INT32(0))

    return types.boolean(I, I, I), generate


@cold
def data_address(record, tensor, view):
    """Return the address of a CPU tensor's first element and fill the view; 0 for ``None``, -1 for any other object."""
    if tensor == word(record, NONE):
        return 0
    if cannot_view(word(record, GET_VIEW), tensor, view):
        clear_error()
        return -1
    return word(view, DATA) + word(view, OFFSET) if word(view, DATA) and word(view, DEVICE) == CPU else -1


@cold
def tensor_address(record, tensor, shape, view):
    """Return the address of an aligned CPU tensor of the record's dtype and shape; 0 for ``None``, -1 for any other."""
    start = data_address(record, tensor, view)
    if start <= 0:
        return start
    if word(view, TYPE) != word(record, TYPE_WORD) or start & word(record, ADDRESS_MASK):
        return -1
    for at in range(word(record, TYPE_WORD) & 0xFFFFFFFF):
        if word(word(view, SHAPE), at) != word(shape, at):
            return -1
    return start


@cold
def vector_address(record, vector, view):
    """Return the tagged address of a contiguous float32 or float64 CPU vector of length C; 0 for ``None``, else -1."""
    start = data_address(record, vector, view)
    if start <= 0:
        return start
    channels, double = word(record, CHANNELS), word(view, TYPE) == DOUBLES
    dense = channels == 1 or word(word(view, STRIDES), 0) == 1
    if not (double or word(view, TYPE) == SINGLES) or word(word(view, SHAPE), 0) != channels or not dense or start & 3:
        return -1
    return start + int(double)


@cold
def counter_address(record, counter, view):
    """Return the address of an int64 CPU tensor of rank 0, the number of batches; 0 for ``None``, -1 for any other."""
    start = data_address(record, counter, view)
    return start if start <= 0 or (word(view, TYPE) == COUNTER and start & 7 == 0) else -1


@cold
def overlap(a, a_bytes, b, b_bytes):
    """Tell whether two ranges of memory share a byte; address 0 stands for an empty range."""
    return a != 0 and b != 0 and a < b + b_bytes and b < a + a_bytes


@cold
def vector_bytes(tagged, channels):
    """Return the bytes of the vector at a tagged address."""
    return channels * (8 if tagged & 1 else 4)


@cold
def outputs_overlap(record, x, residual, weight, bias, mean, var, counter):
    """Tell whether mean, var and counter, which training updates, overlap one another or what the call reads."""
    channels = word(record, CHANNELS)
    for at, one in enumerate((mean, var, counter)):
        a, size = one & -2, 8 if at == 2 else vector_bytes(one, channels)
        if overlap(a, size, x, word(record, X_BYTES)) or overlap(a, size, residual, word(record, RESIDUAL_BYTES)):
            return True
        for other in (weight, bias):
            if overlap(a, size, other & -2, vector_bytes(other, channels)):
                return True
    return (
        overlap(mean & -2, vector_bytes(mean, channels), var & -2, vector_bytes(var, channels))
        or overlap(counter, 8, mean & -2, vector_bytes(mean, channels))
        or overlap(counter, 8, var & -2, vector_bytes(var, channels))
    )


# ------------------------------------------------------------------------------------------------------------- doors
@intrinsic(prefer_literal=True)
def parse_numbers(typing, arguments, count, floats):
    """Convert ``count`` Python numbers to a tuple: number i to float64 if bit i of ``floats`` is 1, else to int64."""
    number_types = [types.float64 if floats.literal_value >> at & 1 else I for at in range(count.literal_value)]
    result = types.BaseTuple.from_types(number_types)

    def generate(context, builder, sig, args):
        each = []
        for at, t in enumerate(number_types):
            convert = as_int if t == I else as_float
            signature = ir.FunctionType(context.get_value_type(t), [INT64])
            callee = cgutils.get_or_insert_function(builder.module, signature, convert.symbol)
            each.append(builder.call(callee, [load_word(builder, args[0], INT64(at))]))
        return context.make_tuple(builder, result, each)

    return result(I, count, floats), generate


@cache
def entry_kernel(parameters, floats):
    """Return the builtin that runs a kernel without the interpreter's lock: it takes its address, then its arguments.

    Bit i of ``floats`` is 1 if parameter i is a float64 and not an int64.
    """

    @kernel
    def door(module, arguments, count):
        if count != parameters + 1:
            bad_argument()
            return 0
        address, given = as_int(word(arguments, 0)), parse_numbers(arguments + 8, parameters, floats)
        if error_occurred():
            return 0
        thread = release_gil()
        call_kernel(address, given)
        acquire_gil(thread)
        return from_int(0)

    return door


@inlined
def run_alone(record, threads, arguments):
    """Run the kernel of the record on the caller's thread."""
    call_kernel(word(record, KERNEL), (word(record, PHASES),) + arguments)


@inlined
def run_on_team(record, threads, arguments):
    """Run the kernel of the record on ``threads`` threads of the caller's OpenMP team."""
    run_phases(
        word(record, GOMP_PARALLEL), word(record, THREAD_NUMBER), threads, word(record, KERNEL), word(record, PHASES),
        arguments,
    )  # fmt: skip


def forward(parallel, heads, shapes, tails):
    """Return the door of forward calls.

    Of the kernel's arguments the record has the first ``heads``, ``shapes`` after the addresses of the tensors, and
    ``tails`` after p. ``parallel``: the threads of a team share the work. The door takes the record, x, residual, y,
    weight, bias, the running mean and variance, the counter, a vector for mean and variance or ``None``, momentum, eps,
    p, the address of scratch memory, and the number of threads.
    """
    run = run_on_team if parallel else run_alone
    fields_bytes, heads_bytes = 8 * FIELDS, 8 * heads

    @kernel
    def door(module, arguments, count):
        record, view = as_int(word(arguments, 0)), new_view()
        known = record + fields_bytes
        shape = known + 8 * (heads + shapes + tails)
        x = tensor_address(record, word(arguments, 1), shape, view)
        residual = tensor_address(record, word(arguments, 2), shape, view)
        y = tensor_address(record, word(arguments, 3), shape, view)
        weight = vector_address(record, word(arguments, 4), view)
        bias = vector_address(record, word(arguments, 5), view)
        mean = vector_address(record, word(arguments, 6), view)
        var = vector_address(record, word(arguments, 7), view)
        counter = counter_address(record, word(arguments, 8), view)
        statistics, scratch = data_address(record, word(arguments, 9), view), as_int(word(arguments, 13))
        if min(x, residual, y, weight, bias, mean, var, counter, statistics) < 0 or x == 0 or y == 0:
            return from_int(1)
        if word(record, TRAINING) and outputs_overlap(record, x, residual, weight, bias, mean, var, counter):
            return from_int(1)
        if statistics == 0:
            statistics = scratch + LINE + word(record, SCRATCH_BYTES)
        momentum, eps = as_float(word(arguments, 10)), as_float(word(arguments, 11))
        p, threads = as_float(word(arguments, 12)), as_int(word(arguments, 14))
        thread = release_gil() if word(record, RELEASE_GIL) else 0
        run(
            record, threads,
            words(known, heads) + (x, residual, y) + words(known + heads_bytes, shapes)
            + (weight, bias, mean, var, counter, statistics, statistics + 8 * word(record, CHANNELS),
               word(record, TRAINING), momentum, eps, p)
            + words(known + heads_bytes + 8 * shapes, tails) + (scratch + LINE, scratch),
        )  # fmt: skip
        if thread:
            acquire_gil(thread)
        return from_int(0)

    return door


def backward(parallel, heads, shapes, tails):
    """Return the door of backward calls; the parameters are those of :func:`forward`.

    The door takes the record, x, residual, dy, dx, dresidual, weight, bias, the gradients of these two, the mean and
    variance in one vector, eps, p, the address of scratch memory, and the number of threads.
    """
    run = run_on_team if parallel else run_alone
    fields_bytes, heads_bytes = 8 * FIELDS, 8 * heads

    @kernel
    def door(module, arguments, count):
        record, view = as_int(word(arguments, 0)), new_view()
        known = record + fields_bytes
        shape = known + 8 * (heads + shapes + tails)
        x = tensor_address(record, word(arguments, 1), shape, view)
        residual = tensor_address(record, word(arguments, 2), shape, view)
        dy = tensor_address(record, word(arguments, 3), shape, view)
        dx = tensor_address(record, word(arguments, 4), shape, view)
        dresidual = tensor_address(record, word(arguments, 5), shape, view)
        weight = vector_address(record, word(arguments, 6), view)
        bias = vector_address(record, word(arguments, 7), view)
        dweight = vector_address(record, word(arguments, 8), view)
        dbias = vector_address(record, word(arguments, 9), view)
        mean, scratch = data_address(record, word(arguments, 10), view), as_int(word(arguments, 13))
        if min(x, residual, dy, dx, dresidual, weight, bias, dweight, dbias, mean) < 0 or min(x, dy, mean) == 0:
            return from_int(1)
        size = 8 * word(record, CHANNELS)
        sums = scratch + LINE + word(record, SCRATCH_BYTES)
        eps, p, threads = as_float(word(arguments, 11)), as_float(word(arguments, 12)), as_int(word(arguments, 14))
        thread = release_gil() if word(record, RELEASE_GIL) else 0
        run(
            record, threads,
            words(known, heads) + (x, residual, dy, dx, dresidual) + words(known + heads_bytes, shapes)
            + (weight, bias, dweight, dbias, mean, mean + size, sums, sums + size, word(record, TRAINING),
               float(word(record, POSITIONS)), eps, p)
            + words(known + heads_bytes + 8 * shapes, tails) + (scratch + LINE, scratch),
        )  # fmt: skip
        if thread:
            acquire_gil(thread)
        return from_int(0)

    return door
