"""Describe GPUs, the numbers by which plans are chosen, and how long a launch takes: a model, measured on no GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields

THREADS = 256
FAST_DOUBLES = (80, 90, 100)
"""The compute capabilities whose double precision is fast."""
STATIC_SHARED = 7_696
"""A block's static shared memory, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """Describe a GPU as far as plans need it. Compared by identity, which costs a call nothing.

    Attributes:
        name: its name, for people.
        arch: the compute capability, 90 for sm_90.
        sms: multiprocessors.
        shared_per_sm, shared_per_block: bytes of shared memory, the second with opt-in.
        l2_bytes: of cache.
        bandwidth: bytes per second of the memory, from the data sheet.
        clusters: whether blocks may form clusters, on sm_90 and later.
    """

    name: str
    arch: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    l2_bytes: int
    bandwidth: float
    clusters: bool = True

    @property
    def reserved_shared(self) -> int:
        """Bytes of an SM's shared memory that the driver takes for each block."""
        return 1 << 10 if self.arch >= 80 else 0

    @property
    def slow_doubles(self) -> bool:
        """Whether an SM does double precision in 2 lanes at a time, not in 32 or more: 16 cycles for a warp."""
        return self.arch not in FAST_DOUBLES


@dataclass(frozen=True, slots=True)
class OnChip:
    """Hold how many bytes of tensors blocks can keep on chip.

    Attributes:
        per_block: bytes of one block, at most.
        per_sm: bytes of all blocks of an SM.
        overhead: bytes of ``per_sm`` that each block takes besides.
    """

    per_block: int
    per_sm: int
    overhead: int = 0

    @staticmethod
    def shared(device: Device) -> OnChip:
        """Return what the shared memory of a device has room for."""
        used = STATIC_SHARED + device.reserved_shared
        return OnChip(device.shared_per_block - STATIC_SHARED, device.shared_per_sm, used)

    def blocks(self, nbytes: int) -> int:
        """Return how many blocks that keep so many bytes an SM holds."""
        return self.per_sm // (nbytes + self.overhead)

    def share(self, blocks: int) -> int:
        """Return the bytes that each of an SM's blocks can keep."""
        return self.per_sm // blocks - self.overhead


DEVICES = {
    "t4": Device("T4", 75, 40, 64 << 10, 64 << 10, 4 << 20, 320e9),
    "a100": Device("A100", 80, 108, 164 << 10, 163 << 10, 40 << 20, 1555e9),
    "4090": Device("RTX 4090", 89, 128, 100 << 10, 99 << 10, 72 << 20, 1008e9),
    "h100": Device("H100", 90, 132, 228 << 10, 227 << 10, 50 << 20, 3350e9),
    "b200": Device("B200", 100, 148, 228 << 10, 227 << 10, 126 << 20, 8000e9),
}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Hold the numbers that a measurement on a GPU may change.

    Attributes:
        blocks_per_sm: blocks that share an SM in the tiers that keep a channel on chip: as many as registers allow.
        split_blocks_per_sm: blocks per SM that the split kernels are cut into.
        fill: share of the SMs that must have work before a strip is left to one block. Where an SM has room for only
            one such block, a GPU with clusters takes a cluster; an older one takes the block, as the rest costs more.
        vectors_per_thread: below so many vectors a thread, cutting a channel further gains nothing.
        max_cluster: blocks in a cluster (8 is what every sm_90 GPU offers).
        max_cooperative: blocks that may share a channel through L2.
        narrow_bytes: what a strip of channels may be narrowed to, from 128 bytes, where wider ones leave SMs idle and
            narrower ones fit blocks or clusters that fill them. Memory is read in sectors of 32 bytes.
        narrow_vectors: vectors a thread, beyond which strips stay wide: there are rows enough to cut, and long reads
            matter more.
        max_partials: blocks of a strip whose sums the last of them merges in two launches. More are used only where
            the SMs would not be full.
        usable_l2: share of the L2 cache that the second read of a split call may count on.
        copy_share: share of the data sheet's bandwidth that a copy reaches.
        launch: seconds from the end of one kernel to the work of the next in its stream: 2 to 3 us on GPUs of these
            years where launches are queued. No call is faster than one.
        grid_barrier: seconds that co-resident blocks take to publish sums, meet in L2 and read them: a fence, an atomic
            operation and a polled load, at some 700 ns each, and the stragglers; 4 to 8 us by count.
        cluster_barrier: the same through distributed shared memory, some 200 ns each.
        handover: seconds until the last block of a strip knows that it is, in two launches: a fence and an atomic
            operation.
        merge_round: seconds in which that block's threads read a round of partial sums from L2: a latency for eight.
        narrow_split_bytes, narrow_gain: what a strip may be narrowed to in two launches (two sectors), and the share of
            the time that this must save. The last block then has fewer partial sums, but all blocks read less at once.
        latency: seconds from a load to its data, of a GPU under load. With bytes under way it bounds the bandwidth.
        loads: vectors that a thread of a streaming kernel has under way at a time, by its machine code
            (``docs/machine_code.md``).
        row_blocks, column_blocks: blocks that registers let an SM hold, of streaming kernels for rows and columns, by
            their machine code.
    """

    blocks_per_sm: int = 2
    split_blocks_per_sm: int = 4
    fill: float = 0.75
    vectors_per_thread: int = 4
    max_cluster: int = 8
    max_cooperative: int = 64
    narrow_bytes: int = 32
    narrow_vectors: int = 16
    max_partials: int = 256
    usable_l2: float = 0.5
    copy_share: float = 0.88
    launch: float = 2.5e-6
    grid_barrier: float = 6e-6
    cluster_barrier: float = 1e-6
    handover: float = 1.5e-6
    merge_round: float = 0.1e-6
    narrow_split_bytes: int = 64
    narrow_gain: float = 0.05
    latency: float = 0.7e-6
    loads: int = 4
    row_blocks: int = 3
    column_blocks: int = 2


THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True)
class Times:
    """Hold a call's seconds by the model, in parts.

    Attributes:
        launches: the start of the kernels.
        memory: the bytes over the bandwidth of a copy.
        idle: the loss where too few bytes are under way: few blocks, short loads, a last wave that fills no GPU.
        exchange: blocks that wait for each other's sums.
        merge: the last block of each strip in a first launch, which adds up the sums of all.
    """

    launches: float = 0.0
    memory: float = 0.0
    idle: float = 0.0
    exchange: float = 0.0
    merge: float = 0.0

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return self.launches + self.memory + self.idle + self.exchange + self.merge

    @property
    def limiter(self) -> str:
        """The longest part."""
        parts = self.parts()
        return max(parts, key=lambda part: parts[part])


def copy_seconds(nbytes: float, device: Device, thresholds: Thresholds) -> float:
    """Return the seconds of a copy that moves so many bytes, read and written together."""
    return nbytes / (thresholds.copy_share * device.bandwidth)


def streaming_seconds(
    nbytes: float, grid: int, resident: int, under_way: int, device: Device, thresholds: Thresholds
) -> tuple[float, float]:
    """Return the seconds of a launch: those of a copy, and those lost beyond.

    ``grid`` blocks move the bytes in waves; an SM holds ``resident`` blocks, and each has asked for ``under_way`` bytes
    at a time. A wave has the bandwidth of a copy, or less if its bytes under way are too few to hide the latency.
    """
    slots = resident * device.sms
    full, last = divmod(grid, slots)
    copy = thresholds.copy_share * device.bandwidth
    lost = 0.0
    for blocks, waves in ((slots, full), (last, 1)):
        if blocks and waves:
            reached = min(copy, blocks * under_way / thresholds.latency)
            lost += waves * blocks * nbytes / grid * (1 / reached - 1 / copy)
    return nbytes / copy, lost
