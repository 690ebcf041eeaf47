"""Launch plans: which kernels serve a call, how they are launched, and how many bytes they move.

The tiers, in order of preference (:data:`TIERS`):

``cta``
    One block reads a channel (channels-last: a strip of channels) once, keeps it on chip, and writes once.
``cluster``
    The blocks of a cluster share the channel and exchange their sums through distributed shared memory.
``cooperative``
    Co-resident blocks share the channel, on any GPU, and exchange their sums through the L2 cache.
``split``
    Two launches: sums, then outputs. The second runs in reverse order, for the cache holds the end of the tensor.

If several tiers can serve a call, the plan is the fastest by the model :mod:`gpu_bn.gpu_model`, which has not been
measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from gpu_bn.gpu_model import DEVICES as DEVICES
from gpu_bn.gpu_model import STATIC_SHARED as STATIC_SHARED
from gpu_bn.gpu_model import THREADS as THREADS
from gpu_bn.gpu_model import THRESHOLDS as THRESHOLDS
from gpu_bn.gpu_model import Device as Device
from gpu_bn.gpu_model import OnChip as OnChip
from gpu_bn.gpu_model import Thresholds as Thresholds
from gpu_bn.gpu_model import Times as Times
from gpu_bn.gpu_model import copy_seconds, streaming_seconds
from gpu_bn.tiling import STRIP_BYTES as STRIP_BYTES
from gpu_bn.tiling import VECTOR_BYTES as VECTOR_BYTES
from gpu_bn.tiling import Tiling as Tiling
from gpu_bn.tiling import Work as Work
from gpu_bn.tiling import alignment as alignment
from gpu_bn.tiling import narrower_tilings as narrower_tilings
from gpu_bn.tiling import tile as tile

CO_RESIDENT = 2
"""The blocks on an SM that the launch bounds of the kernels allow (1 for float64)."""


@dataclass(frozen=True, slots=True, eq=False)
class LaunchPlan:
    """The launches of one direction of a call. Plans are compared by identity: equal work on a device has one plan.

    Attributes:
        tier: one of ``TIERS``.
        tiling: the division of the tensor.
        blocks: the number of blocks that share a strip.
        in_flight: the number of strips in progress at a time: all, except in the cooperative tier.
        share: the positions of each block of a strip.
        shared_bytes: the dynamic shared memory of a block.
        launches: the number of kernels.
        read_bytes, written_bytes: the bytes of tensors that each launch reads and writes.
        dram_bytes: the bytes that reach the memory, by the model of the L2 cache.
        times: the seconds by the model, in parts.
        floor_seconds: the seconds by the model if one launch read or wrote each tensor once.
        reason: the reason for this tier.
    """

    tier: str
    tiling: Tiling
    blocks: int
    in_flight: int
    share: int
    shared_bytes: int
    launches: int
    read_bytes: tuple[int, ...]
    written_bytes: tuple[int, ...]
    dram_bytes: int
    times: Times
    floor_seconds: float
    reason: str

    @property
    def seconds(self) -> float:
        """The seconds by the model."""
        return self.times.seconds

    @property
    def grid(self) -> int:
        """The number of blocks in a launch."""
        return self.in_flight * self.blocks

    @property
    def partials(self) -> int:
        """The doubles in global memory for partial results: two for each channel and block (cooperative: four)."""
        if self.tier in ("cta", "cluster"):
            return 0
        rounds = 2 if self.tier == "cooperative" else 1
        return rounds * self.grid * 2 * self.tiling.channels_per_strip

    @property
    def counters(self) -> int:
        """The number of counters of arrived blocks."""
        if self.tier == "cooperative":
            return 2 * self.in_flight
        return self.in_flight if self.tier == "split" and self.blocks > 1 else 0


class NoPlanError(ValueError):
    """Raised if the requested tier cannot serve the work; the message says why."""


@lru_cache(4096)
def plan(
    work: Work,
    device: Device,
    tier: str | None = None,
    thresholds: Thresholds = THRESHOLDS,
    on_chip: OnChip | None = None,
) -> LaunchPlan:
    """Return the launch plan of a training call.

    ``tier`` forces a tier. ``on_chip`` is the room of blocks that keep a channel elsewhere than in shared memory.

    Raises:
        NoPlanError: ``tier`` cannot serve this work on this device.
    """
    if tier is not None and tier not in TIERS:
        raise NoPlanError(f"unknown tier {tier!r}, expected one of {', '.join(TIERS)}")
    planner = _planner(work, device, thresholds, on_chip)
    results = {name: _TIERS[name](planner, tier is not None) for name in (TIERS if tier is None else (tier,))}
    refusals = [f"not {name}: {why}" for name, why in results.items() if isinstance(why, str)]
    plans = [option for option in results.values() if isinstance(option, LaunchPlan)]
    if not plans:
        raise NoPlanError("; ".join(refusals))
    chosen = min(plans, key=lambda option: option.seconds)
    return replace(chosen, reason="; ".join([chosen.reason, *refusals]))


def options(work: Work, device: Device, thresholds: Thresholds = THRESHOLDS) -> dict[str, LaunchPlan | str]:
    """Return the plan of each tier, or why it has none. :func:`plan` takes the first of the fastest plans."""
    planner = _planner(work, device, thresholds)
    return {name: tier(planner, False) for name, tier in _TIERS.items()}


@lru_cache(4096)
def plan_once(
    work: Work, device: Device, thresholds: Thresholds = THRESHOLDS, tiling: Tiling | None = None
) -> LaunchPlan:
    """Return the plan of one launch without exchange: evaluation, frozen statistics, or one phase of the split tier."""
    return _Planner(work, device, thresholds, tiling or tile(work), OnChip.shared(device)).one_launch()


def plan_twice(work: Work, device: Device, thresholds: Thresholds, once: LaunchPlan) -> LaunchPlan:
    """Return the plan of two launches that both use the tiling and the grid of the plan ``once``."""
    return _Planner(work, device, thresholds, once.tiling, OnChip.shared(device))._split(once)


def _planner(work: Work, device: Device, thresholds: Thresholds, on_chip: OnChip | None = None) -> _Planner:
    """Return the planner with the widest strips whose blocks fill the SMs, else with those whose clusters fill them.

    If neither exists, the strips are the widest. For a tensor so small that blocks with the narrowest strips have
    hardly any work, these come before clusters.
    """
    on_chip = on_chip or OnChip.shared(device)
    tilings = narrower_tilings(tile(work), thresholds.narrow_bytes, work.itemsize)
    planners = [_Planner(work, device, thresholds, tiling, on_chip) for tiling in tilings]
    widest, narrowest = planners[0], planners[-1]
    if widest.off_chip:
        return widest

    def narrows(planner: _Planner, blocks: int) -> bool:
        return planner is widest or planner._vectors_per_thread(blocks) <= thresholds.narrow_vectors

    single = [planner for planner in planners if planner.cta_fills() and narrows(planner, 1)]
    tiny = [narrowest] if narrowest.tiny else []
    clusters = [planner for planner in planners if planner.cluster_fills() and narrows(planner, thresholds.max_cluster)]
    return [*single, *tiny, *clusters, widest][0]


@dataclass(frozen=True, slots=True)
class _Planner:
    """The plans of a call for one tiling.

    The method of a tier returns its plan, or the reason against it; if ``forced``, a plan whenever it is possible.
    """

    work: Work
    device: Device
    thresholds: Thresholds
    tiling: Tiling
    on_chip: OnChip

    @property
    def off_chip(self) -> str:
        """The reason why no block can keep a strip on chip; empty if a block may."""
        if self.work.masked or self.work.groups > 1:
            return "masks and ghost batches take two passes"
        if self.tiling.columns and self.tiling.vector == 8 and self.work.staged > 2:
            return "three tensors with 8 channels per thread need more registers than a thread has"
        return ""

    @property
    def tiny(self) -> bool:
        """Whether the threads of one block have so little work that more blocks gain nothing."""
        return self._vectors_per_thread(1) <= self.thresholds.vectors_per_thread

    def _fill_sms(self, blocks: int) -> bool:
        """Tell whether this many blocks give enough SMs work."""
        return blocks >= self.thresholds.fill * self.device.sms

    def cta_fills(self) -> bool:
        """Tell whether single blocks hold the strips and fill the SMs."""
        limit = self._even_share if self._can_cluster() else self.on_chip.per_block
        return self._fill_sms(self.tiling.strips) and self._held(1) <= limit

    def cluster_fills(self) -> bool:
        """Tell whether clusters hold the strips and fill the SMs."""
        sizes = self._cluster_sizes() if self._can_cluster() else []
        return any(self._fill_sms(self.tiling.strips * k) and self._held(k) <= self.on_chip.per_block for k in sizes)

    def cta(self, forced: bool) -> LaunchPlan | str:
        """Give each strip a block, if the blocks fill the SMs or have little work."""
        if self.off_chip:
            return self.off_chip
        if self._held(1) > self.on_chip.per_block:
            return f"a strip needs {self._held(1)} bytes of shared memory, a block has {self.on_chip.per_block}"
        if not (forced or self.tiny or self._fill_sms(self.tiling.strips)):
            return f"{self.tiling.strips} blocks leave SMs idle"
        if not (forced or self.tiny or self.cta_fills()):
            return f"with {self._held(1)} bytes each, fewer than {self.thresholds.blocks_per_sm} blocks fit on an SM"
        return self._with_blocks("cta", 1, "one block holds a strip")

    def cluster(self, forced: bool) -> LaunchPlan | str:
        """Give each strip the smallest cluster that leaves room for other blocks and fills the SMs."""
        if self.device.arch < 90:
            return "clusters need sm_90"
        if not self.device.clusters:
            return "the device refuses clusters"
        if self.off_chip:
            return self.off_chip
        if not forced and self.tiling.positions < 2 * self._rows:
            return "a strip is too short to keep the blocks of a cluster busy"
        fitting = [k for k in self._cluster_sizes() if self._held(k) <= self.on_chip.per_block]
        if not fitting:
            return f"a strip fits no cluster of up to {self.thresholds.max_cluster} blocks"
        roomy = [k for k in fitting if self._held(k) <= self._even_share] or fitting[-1:]
        filling = [k for k in roomy if self._fill_sms(self.tiling.strips * k)]
        blocks = (filling or roomy[-1:])[0]
        return self._with_blocks("cluster", blocks, f"a cluster of {blocks} blocks holds a strip")

    def _cluster_sizes(self) -> list[int]:
        """Return the sizes of clusters in which every block has some positions."""
        sizes = [k for k in (2, 4, 8) if k <= self.thresholds.max_cluster]
        return [k for k in sizes if -(-self.tiling.positions // k) * (k - 1) < self.tiling.positions]

    def cooperative(self, forced: bool) -> LaunchPlan | str:
        """Give each strip the fewest co-resident blocks that hold it, or more that fill the SMs in as many rounds."""
        if self.off_chip:
            return self.off_chip
        tensors = self.work.reads * self.work.tensor_bytes
        if not forced and tensors <= self.thresholds.usable_l2 * self.device.l2_bytes:
            return "the second read of the split tier hits the L2 cache"
        capacity = self.device.sms * self._co_resident
        room = min(self.on_chip.share(self._co_resident), self.on_chip.per_block)
        limit = min(self.thresholds.max_cooperative, capacity, self.tiling.positions)
        vectors = max(1, room * self._vectors_per_thread(1) // self._held(1))  # a thread has whole vectors
        wanted = max(2, -(-self.tiling.positions // (vectors * self._rows)))
        if wanted > limit or self._held(wanted) > room:
            return f"a strip needs at least {wanted} blocks, but at most {limit} may share it"
        if not forced:  # the fewest rounds, all of them full
            rounds = -(-self.tiling.strips // (capacity // wanted))
            in_flight = -(-self.tiling.strips // rounds)
            wanted = max(wanted, min(capacity // in_flight, self._max_blocks, limit))
        return self._with_blocks("cooperative", wanted, f"{wanted} co-resident blocks hold a strip", capacity)

    def split(self, forced: bool) -> LaunchPlan:
        """Use two launches, with narrower strips where that saves time."""
        del forced  # this tier is always possible
        wide, thresholds = self._split(), self.thresholds
        if self.work.groups > 1:
            return wide
        tilings = narrower_tilings(self.tiling, thresholds.narrow_split_bytes, self.work.itemsize)
        plans = [replace(self, tiling=tiling)._split() for tiling in tilings]
        narrow = min(plans, key=lambda option: option.seconds)
        return narrow if narrow.seconds < (1 - thresholds.narrow_gain) * wide.seconds else wide

    def _split(self, once: LaunchPlan | None = None) -> LaunchPlan:
        work, once = self.work, once or self.one_launch()
        second = min(work.reads * work.tensor_bytes, int(self.thresholds.usable_l2 * self.device.l2_bytes))
        mask = work.valid_bytes + (work.sign_bytes if work.backward else 0)
        reads = (work.staged * work.tensor_bytes + mask, work.reads * work.tensor_bytes + mask)
        first = (work.writes - 1) * work.tensor_bytes if work.backward else 0  # the residual's gradient
        written = (first, self._written - first)
        first_dram = reads[0] + written[0]
        dram = sum(reads) + sum(written) - min(second, reads[0])
        passes = [self._streaming_times(once.grid, moved) for moved in (first_dram, dram - first_dram)]
        memory, idle = (sum(parts) for parts in zip(*passes, strict=True))
        rounds = -(-once.blocks * self.tiling.channels_per_strip // THREADS)
        merge = (self.thresholds.handover + rounds * self.thresholds.merge_round) if once.blocks > 1 else 0.0
        return replace(
            once,
            launches=2,
            read_bytes=reads,
            written_bytes=written,
            dram_bytes=dram,
            times=Times(2 * self.thresholds.launch, memory, idle, merge=merge),
            reason="two passes serve every size",
        )

    def one_launch(self) -> LaunchPlan:
        """Use one launch without an exchange, with the fewest blocks that are about as fast as any by the model."""
        slots, strips = self.device.sms * self._resident, self.tiling.strips
        counts = {max(1, min(wave * slots // strips, self._max_blocks)) for wave in range(1, self.thresholds.waves + 1)}
        plans = [self._with_blocks("split", blocks, "one pass") for blocks in sorted(counts)]
        fast_enough = (1 + self.thresholds.blocks_gain) * min(option.seconds for option in plans)
        return next(option for option in plans if option.seconds <= fast_enough)

    def _with_blocks(self, tier: str, blocks: int, reason: str, capacity: int | None = None) -> LaunchPlan:
        share = -(-self.tiling.positions // blocks)
        blocks = blocks if tier == "cluster" else -(-self.tiling.positions // share)
        in_flight = self.tiling.strips if capacity is None else min(self.tiling.strips, capacity // blocks)
        moved, thresholds = self._read + self._written, self.thresholds
        if tier == "split":
            held, exchange, (memory, idle) = 0, 0.0, self._streaming_times(in_flight * blocks, moved)
        else:
            held = self._held(blocks)
            resident = max(1, min(thresholds.blocks_per_sm, self._co_resident, self.on_chip.blocks(held)))
            grid = self.tiling.strips * blocks
            waves = -(-grid // (resident * self.device.sms))
            requested = held if self.device.arch >= 80 else min(held, self._bytes_in_flight)
            memory, idle = streaming_seconds(moved, grid, resident, requested, self.device, thresholds)
            rounds = {"cluster": -(-waves // resident), "cooperative": -(-self.tiling.strips // in_flight)}.get(tier, 0)
            exchange = rounds * (thresholds.cluster_barrier if tier == "cluster" else thresholds.grid_barrier)
        times = Times(thresholds.launch, memory, idle, exchange)
        floor = thresholds.launch + copy_seconds(moved, self.device, thresholds)
        return LaunchPlan(
            tier, self.tiling, blocks, in_flight, share, held, 1, (self._read,), (self._written,), moved, times, floor,
            reason,
        )  # fmt: skip

    def _streaming_times(self, grid: int, moved: int) -> tuple[float, float]:
        """Return the seconds of a streaming launch: those of a copy, and those lost in addition."""
        return streaming_seconds(moved, grid, self._resident, self._bytes_in_flight, self.device, self.thresholds)

    @property
    def _resident(self) -> int:
        """The blocks of a streaming kernel that an SM holds."""
        return self.thresholds.column_blocks if self.tiling.columns else self.thresholds.row_blocks

    @property
    def _bytes_in_flight(self) -> int:
        """The bytes that a block of a streaming kernel has requested from memory at a time."""
        return self.thresholds.loads * THREADS * self.tiling.vector * self.work.itemsize

    @property
    def _read(self) -> int:
        bits = self.work.sign_bytes if self.work.backward else 0
        return self.work.reads * self.work.tensor_bytes + self.work.valid_bytes + bits

    @property
    def _written(self) -> int:
        return self.work.writes * self.work.tensor_bytes + (0 if self.work.backward else self.work.sign_bytes)

    @property
    def _co_resident(self) -> int:
        return CO_RESIDENT if self.work.itemsize < 8 else 1

    @property
    def _rows(self) -> int:
        """The positions that a block processes at a time."""
        return THREADS // self.tiling.lanes

    @property
    def _max_blocks(self) -> int:
        """The most blocks of a strip whose threads all have enough work."""
        return max(1, self.tiling.positions // (self._rows * self.thresholds.vectors_per_thread))

    @property
    def _even_share(self) -> int:
        """The bytes that a block can keep if ``blocks_per_sm`` blocks share an SM."""
        return self.on_chip.share(self.thresholds.blocks_per_sm)

    def _held(self, blocks: int) -> int:
        """Return the bytes that each block keeps on chip if ``blocks`` share a strip."""
        vectors = self._vectors_per_thread(blocks) * THREADS
        return vectors * self.tiling.vector * self.work.itemsize * self.work.staged

    def _vectors_per_thread(self, blocks: int) -> int:
        """Return the most vectors that a thread processes if ``blocks`` share a strip."""
        share = -(-self.tiling.positions // blocks)
        return -(-share // self._rows)

    def _can_cluster(self) -> bool:
        return self.device.arch >= 90 and self.device.clusters and self.tiling.positions >= 2


_TIERS: dict[str, Callable[[_Planner, bool], LaunchPlan | str]] = {
    "cta": _Planner.cta,
    "cluster": _Planner.cluster,
    "cooperative": _Planner.cooperative,
    "split": _Planner.split,
}
TIERS = tuple(_TIERS)
"""The names of the tiers, in order of preference."""
