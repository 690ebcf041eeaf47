"""Intrinsics that compute on vectors of the tensors. Each generates the whole body of a kernel's loop.

Common arguments:

- ``affine``: a tuple of vectors: ``centre``, ``scale`` and ``shift`` of ``z = (x - centre) * scale + shift``; to write
  dx also ``slope`` and ``offset`` of ``dx = (dz + slope * (x - centre) + offset) * scale``.
- ``tensors``: pointers to elements, ``None`` for a tensor that the call does not have.
- ``count``: the number of elements in each vector, ``None`` if it is full.
- ``activation``: the index of the activation in ``activations.NAMES``; ``p`` is its parameter.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import activations
from gpu_bn.kernels.cpu.memory import count_type, wrap
from gpu_bn.kernels.cpu.vector import INT64, WIDE, Lanes, concatenate, extract_part, fma, splat, where


def _deviation_and_gradient(x, residual, dy, at, count, affine, activation, p):
    """Return x - centre and dz, or x - centre twice if there is no dy. Lanes from ``count`` on are 0."""
    centre, scale, shift = affine[:3]
    d = x.load(at, count, centre) - centre
    if dy is None:
        return d, d
    dz = dy.load(at, count, centre.broadcast(0.0))
    if activation == 0:
        return d, dz
    dz = dz.intrinsic("arithmetic.fence")  # without it, LLVM makes a masked load for ReLU, which waits for x
    z = None if residual is None else residual.load(at, count, centre)
    if not activations.NAMES[activation].endswith(activations.OF_Y):
        z = fma(d, scale, shift) if z is None else fma(d, scale, shift) + z
    return d, activations.gradient(activation, z, dz, splat(x.builder, p, centre.value.type))


def _outputs(x, residual, dy, at, count, affine, activation, p):
    """Return y and z; if there is dy, dx and dz."""
    centre, scale, shift = affine[:3]
    if dy is None:
        z = fma(x.load(at, count, centre) - centre, scale, shift)
        if residual is not None:
            z = z + residual.load(at, count, centre)
        return activations.value(activation, z, splat(x.builder, p, centre.value.type)), z
    d, dz = _deviation_and_gradient(x, residual, dy, at, count, affine, activation, p)
    slope, offset = affine[3:]
    # With frozen statistics slope is 0, and x must have no influence, even if it is infinite or NaN.
    projected = where(slope.compare("==", 0), offset, fma(d, slope, offset))
    return (dz + projected) * scale, dz


@intrinsic(prefer_literal=True)
def sum_vectors(typing, sums, tensors, steps, vectors, count, affine, activation, p):
    """Add dz and dz * (x - centre) of several vectors to two sums, which are vectors; without dy, x - centre is dz.

    ``tensors`` are x, residual, dy and, if dz is to be stored, the target. Consecutive vectors of a tensor are its step
    apart, in elements.
    """

    def generate(context, builder, sig, args):
        each, step, n, count_, lanes, number = _loop_arguments(builder, sig, args, 1)
        slots = [cgutils.alloca_once_value(builder, builder.extract_value(args[0], i)) for i in range(2)]
        with cgutils.for_range(builder, n) as loop:
            x, residual, dy, *kept = _advance(builder, each, step, loop.index)
            d, g = _deviation_and_gradient(x, residual, dy, INT64(0), count_, lanes, activation.literal_value, number)
            if any(kept):
                kept[0].store(INT64(0), count_, g)
            s, q = (Lanes(builder, builder.load(slot)) for slot in slots)
            builder.store((s + g).value, slots[0])
            builder.store(fma(d, g, q).value, slots[1])
        return context.make_tuple(builder, sums, [builder.load(slot) for slot in slots])

    integers = types.UniTuple(types.int64, len(tensors))
    return sums(sums, tensors, integers, types.int64, count_type(count), affine, activation, types.float64), generate


@intrinsic(prefer_literal=True)
def sum_tail(typing, sums, tensors, count, affine, activation, p):
    """Add what :func:`sum_vectors` adds for ``count`` elements of one channel, fewer than a wide vector has.

    Each full vector is added to its own part of the wide sums, and the elements that are left to the last part.
    """

    def generate(context, builder, sig, args):
        each = _tensors(builder, sig.args[1], args[1])
        width, lanes = sums[0].lanes // WIDE, wrap(builder, [affine], [args[3]])[0]
        lanes = [Lanes(builder, extract_part(builder, one.value, 0, width)) for one in lanes]
        slots = [
            [cgutils.alloca_once_value(builder, extract_part(builder, one, at, width)) for at in range(WIDE)]
            for one in (builder.extract_value(args[0], i) for i in range(2))
        ]

        def add(at, left, to):
            x, residual, dy, *kept = each
            d, g = _deviation_and_gradient(x, residual, dy, at, left, lanes, activation.literal_value, args[5])
            if any(kept):
                kept[0].store(at, left, g)
            s, q = (Lanes(builder, builder.load(slot[to])) for slot in slots)
            builder.store((s + g).value, slots[0][to])
            builder.store(fma(d, g, q).value, slots[1][to])

        for at in range(WIDE - 1):
            with builder.if_then(builder.icmp_signed(">=", args[2], INT64((at + 1) * width))):
                add(INT64(at * width), None, at)
        left = builder.and_(args[2], INT64(width - 1))
        with builder.if_then(builder.icmp_signed("!=", left, INT64(0))):
            add(builder.sub(args[2], left), left, WIDE - 1)
        totals = [concatenate(builder, [builder.load(slot) for slot in one]) for one in slots]
        return context.make_tuple(builder, sums, totals)

    return sums(sums, tensors, types.int64, affine, activation, types.float64), generate


@intrinsic
def add_pairs(typing, sums, more):
    """Add two pairs of vectors."""

    def generate(context, builder, sig, args):
        pairs = [[Lanes(builder, builder.extract_value(one, i)) for i in range(2)] for one in args]
        return context.make_tuple(builder, sums, [(a + b).value for a, b in zip(*pairs, strict=True)])

    return sums(sums, sums), generate


@intrinsic(prefer_literal=True)
def write_vectors(typing, tensors, steps, vectors, count, affine, activation, p, nontemporal):
    """Write y, or dx, to ``out`` and dz to ``dresidual`` for several vectors of (x, residual, dy, out, dresidual)."""

    def generate(context, builder, sig, args):
        each, step, n, count_, lanes, number = _loop_arguments(builder, sig, args[:-1], 0)
        with cgutils.for_range(builder, n) as loop:
            *sources, out, dresidual = _advance(builder, each, step, loop.index)
            y, dz = _outputs(*sources, INT64(0), count_, lanes, activation.literal_value, number)
            if dresidual is not None:
                dresidual.store(INT64(0), count_, dz)
            if out is not None and count_ is None:
                with builder.if_else(builder.icmp_signed("!=", args[-1], INT64(0))) as (uncached, cached):
                    with uncached:
                        out.store(INT64(0), None, y, True)
                    with cached:
                        out.store(INT64(0), None, y)
            elif out is not None:
                out.store(INT64(0), count_, y)
        return context.get_dummy_value()

    integers = types.UniTuple(types.int64, 5)
    arguments = (tensors, integers, types.int64, count_type(count), affine, activation, types.float64, types.int64)
    return types.void(*arguments), generate


def _loop_arguments(builder, sig, args, first):
    """Return tensors, steps, the number of vectors, ``count``, the affine map and p, from argument ``first`` on."""
    tensors, steps, vectors, count, affine, _, p = args[first : first + 7]
    each = _tensors(builder, sig.args[first], tensors)
    step = [builder.extract_value(steps, i) for i in range(len(each))]
    counted = None if isinstance(sig.args[first + 3], types.NoneType) else count
    return each, step, vectors, counted, wrap(builder, [sig.args[first + 4]], [affine])[0], p


def _tensors(builder, tuple_type, pointers):
    """Return a tuple of pointers as a list of :class:`Tensor` and ``None``."""
    return wrap(builder, tuple_type, [builder.extract_value(pointers, i) for i in range(len(tuple_type))])


def _advance(builder, tensors, steps, index):
    """Return the tensors moved by ``index`` of their steps."""
    pairs = zip(tensors, steps, strict=True)
    return [tensor and tensor.advance(builder.mul(index, step)) for tensor, step in pairs]


@intrinsic(prefer_literal=True)
def compute_outputs(typing, tensors, at, affine, activation, p):
    """Return (y, z), or (dx, dz) if there is dy, of the vector from element ``at`` on."""
    pair = types.UniTuple(affine[0], 2)

    def generate(context, builder, sig, args):
        each = _tensors(builder, sig.args[0], args[0])
        lanes = wrap(builder, [affine], [args[2]])[0]
        outputs = _outputs(*each[:3], args[1], None, lanes, activation.literal_value, args[4])
        return context.make_tuple(builder, pair, [one.value for one in outputs])

    return pair(tensors, types.int64, affine, activation, types.float64), generate


@intrinsic
def write_outputs(typing, tensors, at, pair):
    """Write the pair of vectors that :func:`compute_outputs` returned to ``out`` and ``dresidual``."""

    def generate(context, builder, sig, args):
        each = _tensors(builder, sig.args[0], args[0])
        for tensor, i in zip(each[3:], range(2), strict=True):
            if tensor is not None:
                tensor.store(args[1], None, Lanes(builder, builder.extract_value(args[2], i)))
        return context.get_dummy_value()

    return types.void(tensors, types.int64, pair), generate
