"""Draw arrays of every layout with hypothesis."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def random_views(draw, shape, dtype):
    """Draw an array of a shape with permuted axes, steps of either sign, offsets, and possibly a broadcast axis."""
    rank = len(shape)
    order = draw(st.permutations(range(rank)))
    steps = [draw(st.sampled_from([1, 1, -1, 2, -3])) for _ in shape]
    offsets = [draw(st.integers(0, 2)) for _ in shape]
    repeated = draw(st.sets(st.integers(0, rank - 1), max_size=1))
    sizes = [1 if axis in repeated else size for axis, size in enumerate(shape)]
    extents = [(size - 1) * abs(step) + 1 + offset for size, step, offset in zip(sizes, steps, offsets, strict=True)]
    base = np.random.default_rng(draw(st.integers(0, 99))).standard_normal([extents[axis] for axis in order])
    view = base.astype(dtype).transpose(np.argsort(order))
    view = view[tuple(slice(offset, None) for offset in offsets)]
    view = view[tuple(slice(None, None, step) for step in steps)]
    assert view.shape == tuple(sizes)
    return np.broadcast_to(view, shape)
