"""Which kernels serve a call, how they are launched, and how many bytes they move: arithmetic on a tensor and a GPU.

The tiers, in order of preference:

``cta``
    One block owns a channel (channels-last: a strip of channels), keeps it on chip, reads it once, writes once.
``cluster``
    The same, the channel shared by a cluster of blocks that exchange their sums through distributed shared memory.
``cooperative``
    The same on any GPU: co-resident blocks exchange their sums through the L2 cache.
``split``
    Two launches: sums, then outputs. The second runs backwards, to start with what the first left in the cache.

A *position* is one vector of a strip (``rows``: of the channel's (N, S) slab; ``columns``: a row of the strip).
Where several tiers can serve a call, the fastest by :mod:`gpu_bn.gpu_model` does. Nothing here has been measured on a
GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from gpu_bn.gpu_model import DEVICES as DEVICES
from gpu_bn.gpu_model import THREADS as THREADS
from gpu_bn.gpu_model import THRESHOLDS as THRESHOLDS
from gpu_bn.gpu_model import Device as Device
from gpu_bn.gpu_model import Thresholds as Thresholds
from gpu_bn.gpu_model import Times as Times
from gpu_bn.gpu_model import copying, streaming

TIERS = ("cta", "cluster", "cooperative", "split")
VECTOR_BYTES = 16
STRIP_BYTES = 128
STATIC_SHARED = 7_696
"""A block's static shared memory, at most."""
CO_RESIDENT = 2
"""Blocks that the kernels' launch bounds let an SM hold (float64: one)."""


@dataclass(frozen=True, slots=True)
class Work:
    """One direction of one call, as a plan sees it: tensors of (N, C, S), S = 1 for channels-last.

    Attributes:
        n, c, s: the geometry.
        itemsize: bytes an element.
        backward: which direction.
        alignment: bytes, of the least aligned tensor.
        reads, writes: how many tensors are read and written; ``staged`` of those read are needed twice.
        mask: whether one bit an element is written (forward) or read (backward).
        masked: whether a byte for each position says if it counts.
        groups: parts of the batch (of ``n``) that are normalised each for itself.
    """

    n: int
    c: int
    s: int
    itemsize: int
    backward: bool = False
    alignment: int = VECTOR_BYTES
    reads: int = 1
    writes: int = 1
    staged: int = 1
    mask: bool = False
    masked: bool = False
    groups: int = 1

    @property
    def tensor_bytes(self) -> int:
        """Of one tensor."""
        return self.n * self.c * self.s * self.itemsize

    @property
    def mask_bytes(self) -> int:
        """Of the bit mask: one byte for each full vector."""
        return self.tensor_bytes // VECTOR_BYTES if self.mask else 0

    @property
    def valid_bytes(self) -> int:
        """Of the bytes that say which positions count: read in each pass."""
        return self.n * self.s if self.masked else 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a tensor is cut into strips and vectors.

    Attributes:
        columns: whether a strip is some adjacent channels (channels-last), or one channel's rows.
        n, c, s: the geometry, of one group; a single channel is one long row.
        vector: elements a vector.
        lanes: threads side by side across a strip.
        strips: how many strips there are, those of all groups.
        positions: vectors that a lane has to go through in one strip.
    """

    columns: bool
    n: int
    c: int
    s: int
    vector: int
    lanes: int
    strips: int
    positions: int

    @property
    def channels_per_strip(self) -> int:
        """Channels that a block's sums are for."""
        return self.lanes * self.vector if self.columns else 1


@dataclass(frozen=True, slots=True, eq=False)
class LaunchPlan:
    """How one direction of a call is launched. Compared by identity: the same work on the same device is one plan.

    Attributes:
        tier: one of ``TIERS``.
        tiling: how the tensor is cut.
        blocks: blocks that share a strip.
        groups: strips in progress at a time (all of them, but in the cooperative tier).
        share: positions each of a strip's blocks has.
        shared_bytes: dynamic shared memory a block.
        launches: how many kernels.
        read_bytes, written_bytes: of the tensors, in each launch.
        dram_bytes: what of that reaches the memory, by the model of the L2 cache.
        times: how long that takes, in parts (model).
        floor_seconds: the time if one launch read and wrote each tensor once (model).
        reason: why this tier.
    """

    tier: str
    tiling: Tiling
    blocks: int
    groups: int
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
        """The time (model)."""
        return self.times.seconds

    @property
    def grid(self) -> int:
        """Blocks in a launch."""
        return self.groups * self.blocks

    @property
    def partials(self) -> int:
        """Doubles that the blocks need in global memory to exchange their sums: two a channel and block."""
        if self.tier in ("cta", "cluster"):
            return 0
        rounds = 2 if self.tier == "cooperative" else 1
        return rounds * self.grid * 2 * self.tiling.channels_per_strip

    @property
    def counters(self) -> int:
        """Counters that the blocks of a strip need to know who has come."""
        if self.tier == "cooperative":
            return 2 * self.groups
        return self.groups if self.tier == "split" and self.blocks > 1 else 0


class NoPlanError(ValueError):
    """The tier that was asked for cannot serve the work; the message says why."""


def alignment(addresses: Iterable[int]) -> int:
    """The largest power of two, up to a vector's size, that divides all addresses."""
    least = VECTOR_BYTES
    for address in addresses:
        least |= address
    return least & -least


def tile(work: Work) -> Tiling:
    """Cut a tensor into the widest vectors that its geometry and alignment allow, and into the widest strips."""
    n = work.n // work.groups
    n, c, s = (1, 1, n * work.s) if work.c == 1 else (n, work.c, work.s)
    columns = s == 1 and c > 1
    inner = c if columns else s
    vector = math.gcd(VECTOR_BYTES // work.itemsize, inner, max(work.alignment // work.itemsize, 1))
    if not columns:
        return Tiling(False, n, c, s, vector, 1, work.groups * c, n * s // vector)
    across = c // vector
    lanes = min(32, STRIP_BYTES // (vector * work.itemsize), 1 << (across - 1).bit_length())
    return Tiling(True, n, c, s, vector, lanes, work.groups * -(-across // lanes), n)


def narrower(tiling: Tiling, least_bytes: int, itemsize: int) -> Iterator[Tiling]:
    """A tiling, then those with strips half as wide, a quarter, and so on down to ``least_bytes``: of one group."""
    yield tiling
    while tiling.columns and tiling.lanes > 1 and tiling.lanes * tiling.vector * itemsize // 2 >= least_bytes:
        lanes = tiling.lanes // 2
        tiling = replace(tiling, lanes=lanes, strips=-(-(tiling.c // tiling.vector) // lanes))
        yield tiling


@lru_cache(4096)
def plan(work: Work, device: Device, tier: str | None = None, thresholds: Thresholds = THRESHOLDS) -> LaunchPlan:
    """The launch plan of a training call; ``tier`` forces one.

    Raises:
        NoPlanError: ``tier`` cannot serve this work on this device.
    """
    if tier is not None and tier not in TIERS:
        raise NoPlanError(f"unknown tier {tier!r}, expected one of {', '.join(TIERS)}")
    planner = _planner(work, device, thresholds)
    found = {name: planner.tier(name, tier is not None) for name in (TIERS if tier is None else (tier,))}
    refusals = [f"not {name}: {why}" for name, why in found.items() if isinstance(why, str)]
    plans = [option for option in found.values() if isinstance(option, LaunchPlan)]
    if not plans:
        raise NoPlanError("; ".join(refusals))
    chosen = min(plans, key=lambda option: option.seconds)
    return replace(chosen, reason="; ".join([chosen.reason, *refusals]))


def options(work: Work, device: Device, thresholds: Thresholds = THRESHOLDS) -> dict[str, LaunchPlan | str]:
    """Each tier's plan, or why it is not for this work. :func:`plan` takes the fastest plan, of equals the first."""
    planner = _planner(work, device, thresholds)
    return {name: planner.tier(name, False) for name in TIERS}


@lru_cache(4096)
def plan_once(
    work: Work, device: Device, thresholds: Thresholds = THRESHOLDS, tiling: Tiling | None = None
) -> LaunchPlan:
    """The launch plan of one pass without exchange of statistics: evaluation, frozen statistics, one phase of two."""
    return _Planner(work, device, thresholds, tiling or tile(work)).once()


def _planner(work: Work, device: Device, thresholds: Thresholds) -> _Planner:
    """With the widest strips of which single blocks fill the SMs, or else clusters; the widest of all if none do.

    Between the two: a tensor so small that blocks of the narrowest strips have next to nothing to do gets those.
    """
    tilings = narrower(tile(work), thresholds.narrow_bytes, work.itemsize)
    planners = [_Planner(work, device, thresholds, tiling) for tiling in tilings]
    widest, narrowest = planners[0], planners[-1]
    if widest._crowded:
        return widest

    def few(planner: _Planner, blocks: int) -> bool:
        return planner is widest or planner._vectors(blocks) <= thresholds.narrow_vectors

    alone = [planner for planner in planners if planner.cta_fills() and few(planner, 1)]
    tiny = [narrowest] if narrowest._tiny else []
    clustered = [planner for planner in planners if planner.cluster_fills() and few(planner, thresholds.max_cluster)]
    return [*alone, *tiny, *clustered, widest][0]


@dataclass(frozen=True, slots=True)
class _Planner:
    work: Work
    device: Device
    thresholds: Thresholds
    tiling: Tiling

    def tier(self, name: str, forced: bool) -> LaunchPlan | str:
        """A tier's plan, or why there is none."""
        tiers = {"cta": self.cta, "cluster": self.cluster, "cooperative": self.cooperative, "split": self.split}
        return tiers[name](forced)

    @property
    def _crowded(self) -> str:
        """Why a block cannot keep its strip on chip; empty if it can."""
        if self.work.masked or self.work.groups > 1:
            return "masks and groups are served in two passes"
        if self.tiling.columns and self.tiling.vector == 8 and self.work.staged > 2:
            return "three tensors, 8 channels a thread, need more registers than there are"
        return ""

    @property
    def _tiny(self) -> bool:
        """Whether the threads of one block have so little to do that more blocks gain nothing."""
        return self._vectors(1) <= self.thresholds.vectors_per_thread

    def _fills(self, blocks: int) -> bool:
        return blocks >= self.thresholds.fill * self.device.sms

    def cta_fills(self) -> bool:
        """Whether single blocks hold the strips and give the SMs work."""
        most = self._even_shared if self._can_cluster() else self._most_shared
        return self._fills(self.tiling.strips) and self._shared(1) <= most

    def cluster_fills(self) -> bool:
        """Whether clusters hold the strips and give the SMs work."""
        sizes = self._cluster_sizes() if self._can_cluster() else []
        return any(self._fills(self.tiling.strips * k) and self._shared(k) <= self._most_shared for k in sizes)

    def cta(self, forced: bool) -> LaunchPlan | str:
        if self._crowded:
            return self._crowded
        if self._shared(1) > self._most_shared:
            return f"a strip needs {self._shared(1)} bytes of shared memory, a block has {self._most_shared}"
        if not (forced or self._tiny or self._fills(self.tiling.strips)):
            return f"{self.tiling.strips} blocks leave SMs idle"
        if not (forced or self._tiny or self.cta_fills()):
            return f"{self._shared(1)} bytes a block leave fewer than {self.thresholds.blocks_per_sm} blocks on an SM"
        return self._resident("cta", 1, "a block holds its strip")

    def cluster(self, forced: bool) -> LaunchPlan | str:
        if self.device.arch < 90:
            return "clusters need sm_90"
        if not self.device.clusters:
            return "the device refuses clusters"
        if self._crowded:
            return self._crowded
        if not forced and self.tiling.positions < 2 * self._rows:
            return "a cluster's blocks would idle"
        fitting = [k for k in self._cluster_sizes() if self._shared(k) <= self._most_shared]
        if not fitting:
            return f"a strip does not fit {self.thresholds.max_cluster} blocks"
        roomy = [k for k in fitting if self._shared(k) <= self._even_shared] or fitting[-1:]
        filling = [k for k in roomy if self._fills(self.tiling.strips * k)]
        blocks = (filling or roomy[-1:])[0]
        return self._resident("cluster", blocks, f"a cluster of {blocks} blocks holds a strip")

    def _cluster_sizes(self) -> list[int]:
        """Sizes that leave every block of a cluster some positions."""
        sizes = [k for k in (2, 4, 8) if k <= self.thresholds.max_cluster]
        return [k for k in sizes if -(-self.tiling.positions // k) * (k - 1) < self.tiling.positions]

    def cooperative(self, forced: bool) -> LaunchPlan | str:
        if self._crowded:
            return self._crowded
        tensors = self.work.reads * self.work.tensor_bytes
        if not forced and tensors <= self.thresholds.usable_l2 * self.device.l2_bytes:
            return "the second read of a split call hits L2"
        capacity = self.device.sms * self._co_resident
        room = min(self._share_of_sm(self._co_resident), self._most_shared)
        most = min(self.thresholds.max_cooperative, capacity, self.tiling.positions)
        vectors = max(1, room * self._vectors(1) // self._shared(1))  # of a thread: whole ones
        wanted = max(2, -(-self.tiling.positions // (vectors * self._rows)))
        if wanted > most or self._shared(wanted) > room:
            return f"a strip needs {wanted} blocks or more, {most} may share one"
        if not forced:  # as few rounds as can be, all of them full
            rounds = -(-self.tiling.strips // (capacity // wanted))
            groups = -(-self.tiling.strips // rounds)
            wanted = max(wanted, min(capacity // groups, self._most_blocks, most))
        return self._resident("cooperative", wanted, f"{wanted} co-resident blocks hold a strip", capacity)

    def split(self, forced: bool) -> LaunchPlan:
        del forced  # it serves everything
        wide, thresholds = self._split(), self.thresholds
        if self.work.groups > 1:
            return wide
        tilings = narrower(self.tiling, thresholds.narrow_split_bytes, self.work.itemsize)
        plans = [replace(self, tiling=tiling)._split() for tiling in tilings]
        narrow = min(plans, key=lambda option: option.seconds)
        return narrow if narrow.seconds < (1 - thresholds.narrow_gain) * wide.seconds else wide

    def _split(self) -> LaunchPlan:
        work, once = self.work, self.once()
        second = min(work.reads * work.tensor_bytes, int(self.thresholds.usable_l2 * self.device.l2_bytes))
        mask = work.valid_bytes + (work.mask_bytes if work.backward else 0)
        reads = (work.staged * work.tensor_bytes + mask, work.reads * work.tensor_bytes + mask)
        first = (work.writes - 1) * work.tensor_bytes if work.backward else 0  # the residual's gradient
        written = (first, self._written - first)
        first_dram = reads[0] + written[0]
        dram = sum(reads) + sum(written) - min(second, reads[0])
        passes = [self._streamed(once.grid, moved) for moved in (first_dram, dram - first_dram)]
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

    def once(self) -> LaunchPlan:
        wanted = self.device.sms * self.thresholds.split_blocks_per_sm // self.tiling.strips  # whole waves
        resident = self.device.sms * self._co_resident // self.tiling.strips
        blocks = max(1, min(wanted, max(self.thresholds.max_partials, resident), self._most_blocks))
        share = -(-self.tiling.positions // blocks)
        return self._plan("split", -(-self.tiling.positions // share), self.tiling.strips, share, 0, "one pass")

    def _resident(self, tier: str, blocks: int, reason: str, capacity: int | None = None) -> LaunchPlan:
        share = -(-self.tiling.positions // blocks)
        blocks = blocks if tier == "cluster" else -(-self.tiling.positions // share)
        groups = self.tiling.strips if capacity is None else min(self.tiling.strips, capacity // blocks)
        return self._plan(tier, blocks, groups, share, self._shared(blocks), reason)

    def _plan(self, tier: str, blocks: int, groups: int, share: int, shared: int, reason: str) -> LaunchPlan:
        moved, thresholds = self._read + self._written, self.thresholds
        if tier == "split":
            exchange, (memory, idle) = 0.0, self._streamed(groups * blocks, moved)
        else:
            resident = max(1, min(thresholds.blocks_per_sm, self._co_resident, self._blocks_of(shared)))
            grid = self.tiling.strips * blocks
            waves = -(-grid // (resident * self.device.sms))
            under_way = shared if self.device.arch >= 80 else min(shared, self._under_way)
            memory, idle = streaming(moved, grid, resident, under_way, self.device, thresholds)
            rounds = {"cluster": -(-waves // resident), "cooperative": -(-self.tiling.strips // groups)}.get(tier, 0)
            exchange = rounds * (thresholds.cluster_barrier if tier == "cluster" else thresholds.grid_barrier)
        times = Times(thresholds.launch, memory, idle, exchange)
        floor = thresholds.launch + copying(moved, self.device, thresholds)
        return LaunchPlan(
            tier, self.tiling, blocks, groups, share, shared, 1, (self._read,), (self._written,), moved, times, floor,
            reason,
        )  # fmt: skip

    def _streamed(self, grid: int, moved: int) -> tuple[float, float]:
        """Seconds of a streaming launch: of a copy, and what is lost beyond."""
        resident = self.thresholds.column_blocks if self.tiling.columns else self.thresholds.row_blocks
        return streaming(moved, grid, resident, self._under_way, self.device, self.thresholds)

    @property
    def _under_way(self) -> int:
        """Bytes that a block of a streaming kernel has asked memory for at a time."""
        return self.thresholds.loads * THREADS * self.tiling.vector * self.work.itemsize

    def _blocks_of(self, shared: int) -> int:
        """Blocks of so much dynamic shared memory that an SM holds."""
        return self.device.shared_per_sm // (shared + STATIC_SHARED + self.device.reserved_shared)

    @property
    def _read(self) -> int:
        bits = self.work.mask_bytes if self.work.backward else 0
        return self.work.reads * self.work.tensor_bytes + self.work.valid_bytes + bits

    @property
    def _written(self) -> int:
        return self.work.writes * self.work.tensor_bytes + (0 if self.work.backward else self.work.mask_bytes)

    @property
    def _co_resident(self) -> int:
        return CO_RESIDENT if self.work.itemsize < 8 else 1

    @property
    def _rows(self) -> int:
        """Positions that a block goes through at a time."""
        return THREADS // self.tiling.lanes

    @property
    def _most_blocks(self) -> int:
        """Blocks that a strip may be cut into before their threads run out of work."""
        return max(1, self.tiling.positions // (self._rows * self.thresholds.vectors_per_thread))

    @property
    def _most_shared(self) -> int:
        return self.device.shared_per_block - STATIC_SHARED

    @property
    def _even_shared(self) -> int:
        return self._share_of_sm(self.thresholds.blocks_per_sm)

    def _share_of_sm(self, blocks: int) -> int:
        """Dynamic shared memory of each of some blocks that an SM holds."""
        return self.device.shared_per_sm // blocks - STATIC_SHARED - self.device.reserved_shared

    def _shared(self, blocks: int) -> int:
        """Bytes that each of a strip's blocks keeps on chip."""
        vectors = self._vectors(blocks) * THREADS
        return vectors * self.tiling.vector * self.work.itemsize * self.work.staged

    def _vectors(self, blocks: int) -> int:
        """Vectors that each thread of a strip's blocks goes through, at most."""
        share = -(-self.tiling.positions // blocks)
        return -(-share // self._rows)

    def _can_cluster(self) -> bool:
        return self.device.arch >= 90 and self.device.clusters and self.tiling.positions >= 2
