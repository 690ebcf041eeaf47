"""List bugs to plant in the Triton kernels, and the message that must report each."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_bn.backends.triton import programs
from gpu_bn.plan import DEVICES
from gpu_bn.testing import Case

PLAIN = Case((5, 3, 37), activation="relu")
LONG = Case((3, 2, 2732), activation="relu", residual=True)
LARGE_MEAN = Case((12, 8, 10, 11), mean=1e4, std=1.0)
COLUMNS = Case((70, 24), "float16", activation="relu", residual=True)
CHAINS = Case((5, 2, 5000), activation="relu")
WITHOUT_WEIGHT = Case((5, 3, 37), activation="relu", affine="none")
SLOPED = Case((4, 6, 16, 2), "float16", activation="leaky_relu", residual=True)
FROZEN = Case((4, 6, 5, 7), mode="eval", mean=1e4, std=1.0, param_dtype="float64")
KINKS = Case((4, 6, 5), activation="relu6", affine="kinks")
MASKED = Case((5, 3, 36), mask="random", activation="relu")
RAGGED = Case((8, 3, 27), activation="relu")
HUGE = Case((3, 2, 2052), mean=1e18, std=1e18)
TINY = Case((3, 2, 111), mean=1e-22, std=1e-22, eps=1e-50)


@dataclass(frozen=True)
class Bug:
    """A bug: a part of a file and its replacement, the call that reveals it, and a part of the message.

    ``more`` are further replacements. ``arch`` and ``sms`` are the architecture and the multiprocessors to plan for: on
    86 and later, except 90 and 100, a separate launch merges the partial results of blocks; a GPU with few
    multiprocessors has longer shares.
    """

    name: str
    file: str
    right: str
    wrong: str
    noticed: str
    case: Case = LONG
    tier: str = "split"
    more: tuple[tuple[str, str], ...] = ()
    chain: int = programs.CHAIN
    arch: int = 80
    sms: int = DEVICES["a100"].sms


ACCESSES, PER_CHANNEL, STATISTICS, SUMS, FORWARD, BACKWARD, ACTIVATIONS = (
    f"{name}.py" for name in ("accesses", "per_channel", "statistics", "sums", "forward", "backward", "activations")
)
BUGS = [
    Bug(
        "mask of the tail dropped",
        ACCESSES,
        "known = (position < last)[:, None]",
        "known = (position < position + 1)[:, None]",
        "out of bounds",
        PLAIN,
        "cta",
    ),
    Bug(
        "mask of the channels dropped",
        ACCESSES,
        "tl.arange(0, L.LANES * L.VEC) // L.VEC < strip.row)",
        "tl.arange(0, L.LANES * L.VEC) // L.VEC < strip.row + L.LANES)",
        "out of bounds",
        COLUMNS,
        "cta",
    ),
    Bug(
        "mask dropped in the backward sums",
        BACKWARD,
        "tl.where(tile.counted, dz, 0.0)",
        "tl.where(tile.known, dz, 0.0)",
        "dx[",
        MASKED,
    ),
    Bug(
        "last position of a share forgotten",
        ACCESSES,
        "tl.minimum(first + share, strip.positions)",
        "tl.minimum(first + share - 1, strip.positions)",
        "y[",
    ),
    Bug(
        "last block not merged",
        STATISTICS,
        "apart = block_results(partials, 0, i, channels, L) - base",
        "apart = tl.where(i < partials.blocks - 1, block_results(partials, 0, i, channels, L) - base, -base)",
        "y[",
    ),
    Bug(
        "sums of the last block not merged",
        STATISTICS,
        "sums_dz += block_results(partials, 0, i, channels, L)",
        "sums_dz += tl.where(i < partials.blocks - 1, block_results(partials, 0, i, channels, L), 0.0)",
        "dx[",
    ),
    Bug("spread between blocks forgotten", STATISTICS, "tl.fma(apart, apart, variances)", "variances", "y["),
    Bug(
        "sums of raw numbers",
        STATISTICS,
        'return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)',
        "return mean * 0.0",
        "y[",
        LARGE_MEAN,
        "split",
        (("(apart * apart > TRUSTED_SHIFT * spread)", "(apart != apart)"),),
    ),
    Bug(
        "overflow not noticed",
        STATISTICS,
        "overflow = whole &",
        "overflow = (whole == 0) & whole &",
        "y[",
        HUGE,
    ),
    Bug(
        "underflow not noticed",
        STATISTICS,
        "underflow = whole &",
        "underflow = (whole == 0) & whole &",
        "y[",
        TINY,
    ),
    Bug(
        "mean rounded to float32",
        STATISTICS,
        "rest = values.mean - centre.to(tl.float64)",
        "rest = values.mean * 0.0",
        "y[",
        LARGE_MEAN,
    ),
    Bug(
        "biased running variance",
        FORWARD,
        "moved(old.var, var * running.bessel, running.momentum)",
        "moved(old.var, var, running.momentum)",
        "running_var[",
    ),
    Bug(
        "running statistics unordered",
        FORWARD,
        "    tl.debug_barrier()\n    keep_running",
        "    keep_running",
        "data race",
    ),
    Bug("all blocks write the running statistics", FORWARD, "if block == 0:", "if block >= 0:", "data race"),
    Bug(
        "bias forgotten in the sign",
        BACKWARD,
        "load_wide(bias, channel, 0.0)",
        "load_wide(None, channel, 0.0)",
        "dx[",
        PLAIN,
        "cta",
    ),
    Bug(
        "bits in the wrong order",
        ACCESSES,
        ">> tl.arange(0, L.VEC)[None, None, :]",
        ">> (L.VEC - 1 - tl.arange(0, L.VEC))[None, None, :]",
        "dx[",
    ),
    Bug(
        "dx without the mean's term",
        BACKWARD,
        "offset = -sum_dz * inverse_count - slope * affine.rest",
        "offset = -slope * affine.rest",
        "dx[",
    ),
    Bug(
        "dx without the projection",
        BACKWARD,
        "slope = -sum_dz_xhat * affine.rstd * inverse_count",
        "slope = sum_dz_xhat * 0.0",
        "dx[",
    ),
    Bug(
        "dweight without rstd",
        BACKWARD,
        "dz_xhat_c = (product_c - affine.rest * dz_c) * affine.rstd",
        "dz_xhat_c = product_c - affine.rest * dz_c",
        "dx[",
    ),
    Bug(
        "no shift in the table",
        STATISTICS,
        "tl.store(table + 2 * statistic.count + statistic.place, affine.shift",
        "tl.store(table + 2 * statistic.count + statistic.place, affine.shift * 0.0",
        "y[",
        arch=89,
    ),
    Bug(
        "the table's slope in the place of its offset",
        BACKWARD,
        "load_row(table, 3, statistic), load_row(table, 4, statistic)",
        "load_row(table, 4, statistic), load_row(table, 3, statistic)",
        "dx[",
        arch=89,
    ),
    Bug(
        "a merge of one block fewer",
        STATISTICS,
        "present = (i < partials.blocks)[:, None]",
        "present = (i < partials.blocks - 1)[:, None]",
        "y[",
        arch=89,
    ),
    Bug(
        "a block's factor lost",
        SUMS,
        "tl.where(factor == SCALE_DOWN, one * 2.0**80,",
        "tl.where(factor == SCALE_DOWN, one,",
        "y[",
        HUGE,
        arch=89,
    ),
    Bug(
        "overflow of a block's sums not noticed",
        SUMS,
        "overflow = whole &",
        "overflow = (whole == 0) & whole &",
        "y[",
        HUGE,
        arch=89,
    ),
    Bug(
        "underflow of a block's sums not noticed",
        SUMS,
        "underflow = whole &",
        "underflow = (whole == 0) & whole &",
        "y[",
        TINY,
        arch=89,
    ),
    Bug(
        "sums of numbers far from their shift",
        SUMS,
        "moved = pending & (apart * apart > TRUSTED_SHIFT * spread)",
        "moved = pending & (apart != apart)",
        "y[",
        LARGE_MEAN,
        more=(
            ("no_sums(L), base,", "no_sums(L), Base(base.shift * 0.0, base.factor),"),
            ("statistic), base.shift,", "statistic), base.shift * 0.0,"),
        ),
        arch=89,
    ),
    Bug(
        "squares read for sums",
        SUMS,
        "total = block_results(partials, TOTALS,",
        "total = block_results(partials, SQUARE_SUMS,",
        "y[",
        arch=89,
    ),
    Bug(
        "shifts of blocks forgotten",
        SUMS,
        "tl.fma(apart, total + together, squares)",
        "squares",
        "y[",
        arch=89,
    ),
    Bug(
        "blocks counted without their mask",
        SUMS,
        "if strip.valid is not None:\n        return (tl.sum",
        "if L.GROUPS == 0:\n        return (tl.sum",
        "y[",
        MASKED,
        arch=89,
    ),
    Bug(
        "a tile not written",
        FORWARD,
        "for back in range(tiles):",
        "for back in range(1, tiles):",
        "nobody has written",
    ),
    Bug(
        "chains that overlap",
        STATISTICS,
        "end = tl.minimum(begin + CHAIN * L.POSITIONS, share.last)",
        "end = share.last",
        "y[",
        CHAINS,
        chain=1,
    ),
    Bug(
        "chains that overlap, backward",
        BACKWARD,
        "Share(begin, tl.minimum(begin + CHAIN * POSITIONS, own.last))",
        "Share(begin, own.last)",
        "dx[",
        CHAINS,
        chain=1,
        sms=8,
    ),
    Bug(
        "absent weight is 0",
        FORWARD,
        "weight_c = load_wide(weight, channel, 1.0)",
        "weight_c = load_wide(weight, channel, 0.0)",
        "y[",
        WITHOUT_WEIGHT,
        "cta",
    ),
    Bug(
        "slope forgotten where bits decide",
        ACTIVATIONS,
        "dy * where(keep, 1, {code.slope})",
        "dy * where(keep, 1, 0)",
        "dx[",
        SLOPED,
        "cta",
    ),
    Bug(
        "rest of the mean forgotten in dweight",
        BACKWARD,
        "sum_dz_xhat = (sum_product - affine.rest * sum_dz) * affine.rstd",
        "sum_dz_xhat = sum_product * affine.rstd",
        "dweight[",
        FROZEN,
    ),
    Bug(
        "the other side of a kink",
        ACTIVATIONS,
        "where({code.drop}, {code.dropped}, dy)",
        "where({code.drop.replace('=', '')}, {code.dropped}, dy)",
        "dweight[",
        KINKS,
        "cta",
    ),
    Bug(
        "neighbours of ragged rows counted",
        STATISTICS,
        "d = tl.where(tile_at(position, share.last, strip, L).known, d, 0.0)",
        "d = tl.where(tile_at(position, share.last, strip, L).loaded, d, 0.0)",
        "y[",
        RAGGED,
    ),
    Bug(
        "neighbours of ragged rows written",
        ACCESSES,
        "tile.known & (tile.whole == 0)",
        "tile.loaded & (tile.whole == 0)",
        "data race",
        RAGGED,
    ),
    Bug(
        "a vector beyond the last ragged row",
        ACCESSES,
        "present = (position < last) & (place < length)",
        "present = position < last",
        "out of bounds",
        RAGGED,
        "cta",
    ),
    Bug(
        "elements of ragged rows not counted",
        PER_CHANNEL,
        "return (elements_before(share.last, strip, L) - elements_before(share.first, strip, L)).to(tl.float64)",
        "return tl.cast(share.last - share.first, tl.float64) * L.VEC",
        "y[",
        RAGGED,
    ),
]
