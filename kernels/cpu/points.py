"""What kernels do with a vector: intrinsics, each of which generates all code that there is between two loops.

An affine map is a tuple of vectors: ``centre``, ``scale`` and ``shift`` of ``z = (x - centre) * scale + shift``, and
to write dx ``slope`` and ``offset`` too. Tensors that there are not are ``None``; ``count`` is how many elements there
are, ``None`` for a whole vector; ``which`` is an activation by its place in ``NAMES``.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import activations, memory
from gpu_bn.kernels.cpu.memory import Tensor, integer, unpacked
from gpu_bn.kernels.cpu.vector import BYTE, INT64, WIDE, Lanes, fma, joined, part, spread, where


def _terms(x, residual, dy, at, count, affine, which, p):
    """x - centre and dz, or both x - centre where there is no dy; 0 in the lanes beyond ``count``."""
    centre, scale, shift = affine[:3]
    d = x.load(at, count, centre) - centre
    if dy is None:
        return d, d
    dz = dy.load(at, count, centre.like(0.0))
    if which == 0:
        return d, dz
    dz = dz.called("arithmetic.fence")  # or else LLVM makes of ReLU a load by a mask, which waits for x
    z = None if residual is None else residual.load(at, count, centre)
    if not activations.NAMES[which].endswith(activations.OF_Y):
        z = fma(d, scale, shift) if z is None else fma(d, scale, shift) + z
    return d, activations.gradient(which, z, dz, spread(x.builder, p, centre.value.type))


def _result(x, residual, dy, at, count, affine, which, p):
    """y, or dx where there is dy; and dz."""
    centre, scale, shift = affine[:3]
    if dy is None:
        z = fma(x.load(at, count, centre) - centre, scale, shift)
        if residual is not None:
            z = z + residual.load(at, count, centre)
        return activations.value(which, z, spread(x.builder, p, centre.value.type)), z
    d, dz = _terms(x, residual, dy, at, count, affine, which, p)
    slope, offset = affine[3:]
    # A slope of 0, of frozen statistics, hides what x is.
    projected = where(slope.compare("==", 0), offset, fma(d, slope, offset))
    return (dz + projected) * scale, dz


def _literal(which):
    return which.literal_value if isinstance(which, types.Literal) else None


@intrinsic(prefer_literal=True)
def sum_vectors(typing, sums, tensors, steps, vectors, count, affine, which, p):
    """Add to the sums, of dz and of dz * (x - centre), those of so many vectors of (x, residual, dy), a step apart.

    A fourth tensor, if it is there, keeps dz.
    """

    def generate(context, builder, sig, args):
        each, step, n, count_, lanes, number = _loop_arguments(builder, sig, args, 1)
        places = [cgutils.alloca_once_value(builder, builder.extract_value(args[0], i)) for i in range(2)]
        with cgutils.for_range(builder, n) as loop:
            x, residual, dy, *kept = _moved(builder, each, step, loop.index)
            d, g = _terms(x, residual, dy, INT64(0), count_, lanes, _literal(which), number)
            if any(kept):
                kept[0].store(INT64(0), count_, g)
            s, q = (Lanes(builder, builder.load(place)) for place in places)
            builder.store((s + g).value, places[0])
            builder.store(fma(d, g, q).value, places[1])
        return context.make_tuple(builder, sums, [builder.load(place) for place in places])

    integers = types.UniTuple(types.int64, len(tensors))
    return sums(sums, tensors, integers, types.int64, integer(count), affine, which, types.float64), generate


@intrinsic(prefer_literal=True)
def sum_rest(typing, sums, tensors, count, affine, which, p):
    """Add to the sums those of ``count`` elements, fewer than a wide vector has, whose affine map is one for all.

    Whole vectors go to the first parts of the sums, what is left to the last, which has no whole one.
    """

    def generate(context, builder, sig, args):
        kinds = sig.args[1]
        each = unpacked(builder, kinds, [builder.extract_value(args[1], i) for i in range(len(kinds))])
        width, lanes = sums[0].lanes // WIDE, unpacked(builder, [affine], [args[3]])[0]
        lanes = [Lanes(builder, part(builder, one.value, 0, width)) for one in lanes]
        places = [
            [cgutils.alloca_once_value(builder, part(builder, one, at, width)) for at in range(WIDE)]
            for one in (builder.extract_value(args[0], i) for i in range(2))
        ]

        def add(at, left, to):
            x, residual, dy, *kept = each
            d, g = _terms(x, residual, dy, at, left, lanes, _literal(which), args[5])
            if any(kept):
                kept[0].store(at, left, g)
            s, q = (Lanes(builder, builder.load(place[to])) for place in places)
            builder.store((s + g).value, places[0][to])
            builder.store(fma(d, g, q).value, places[1][to])

        for at in range(WIDE - 1):
            with builder.if_then(builder.icmp_signed(">=", args[2], INT64((at + 1) * width))):
                add(INT64(at * width), None, at)
        left = builder.and_(args[2], INT64(width - 1))
        with builder.if_then(builder.icmp_signed("!=", left, INT64(0))):
            add(builder.sub(args[2], left), left, WIDE - 1)
        found = [joined(builder, [builder.load(place) for place in one]) for one in places]
        return context.make_tuple(builder, sums, found)

    return sums(sums, tensors, types.int64, affine, which, types.float64), generate


@intrinsic
def plus(typing, sums, more):
    """The sums of two pairs of vectors."""

    def generate(context, builder, sig, args):
        pairs = [[Lanes(builder, builder.extract_value(one, i)) for i in range(2)] for one in args]
        return context.make_tuple(builder, sums, [(a + b).value for a, b in zip(*pairs, strict=True)])

    return sums(sums, sums), generate


@intrinsic(prefer_literal=True)
def write_vectors(typing, tensors, steps, vectors, count, affine, which, p, past):
    """Write what is wanted of y, or dx, and dz, of so many vectors of (x, residual, dy, out, dresidual)."""

    def generate(context, builder, sig, args):
        each, step, n, count_, lanes, number = _loop_arguments(builder, sig, args[:-1], 0)
        with cgutils.for_range(builder, n) as loop:
            *sources, out, dresidual = _moved(builder, each, step, loop.index)
            y, dz = _result(*sources, INT64(0), count_, lanes, _literal(which), number)
            if dresidual is not None:
                dresidual.store(INT64(0), count_, dz)
            if out is not None and count_ is None:
                with builder.if_else(builder.icmp_signed("!=", args[-1], INT64(0))) as (beyond, within):
                    with beyond:
                        out.store(INT64(0), None, y, True)
                    with within:
                        out.store(INT64(0), None, y)
            elif out is not None:
                out.store(INT64(0), count_, y)
        return context.get_dummy_value()

    integers = types.UniTuple(types.int64, 5)
    arguments = (tensors, integers, types.int64, integer(count), affine, which, types.float64, types.int64)
    return types.void(*arguments), generate


def _loop_arguments(builder, sig, args, first):
    """Tensors, steps, how many vectors, elements of each, the affine map, and the activation's parameter."""
    tensors, steps, vectors, count, affine, _, p = args[first : first + 7]
    kinds = sig.args[first]
    each = unpacked(builder, kinds, [builder.extract_value(tensors, i) for i in range(len(kinds))])
    step = [builder.extract_value(steps, i) for i in range(len(kinds))]
    counted = None if isinstance(sig.args[first + 3], types.NoneType) else count
    return each, step, vectors, counted, unpacked(builder, [sig.args[first + 4]], [affine])[0], p


def _moved(builder, tensors, steps, index):
    """The tensors, so many steps further."""
    found = []
    for one, step in zip(tensors, steps, strict=True):
        if one is not None:
            at = memory.place(builder, one.pointer, builder.mul(index, step), one.t.size, BYTE)
            one = Tensor(builder, one.t, at)
        found.append(one)
    return found


@intrinsic(prefer_literal=True)
def result(typing, tensors, at, affine, which, p):
    """(y or dx, dz) of the vector at ``at``."""
    pair = types.UniTuple(affine[0], 2)

    def generate(context, builder, sig, args):
        kinds = sig.args[0]
        each = unpacked(builder, kinds, [builder.extract_value(args[0], i) for i in range(len(kinds))])
        lanes = unpacked(builder, [affine], [args[2]])[0]
        found = _result(*each[:3], args[1], None, lanes, _literal(which), args[4])
        return context.make_tuple(builder, pair, [one.value for one in found])

    return pair(tensors, types.int64, affine, which, types.float64), generate


@intrinsic
def write_pair(typing, tensors, at, pair):
    """Write what :func:`result` has found."""

    def generate(context, builder, sig, args):
        kinds = sig.args[0]
        each = unpacked(builder, kinds, [builder.extract_value(args[0], i) for i in range(len(kinds))])
        for tensor, i in zip(each[3:], range(2), strict=True):
            if tensor is not None:
                tensor.store(args[1], None, Lanes(builder, builder.extract_value(args[2], i)))
        return context.get_dummy_value()

    return types.void(tensors, types.int64, pair), generate
