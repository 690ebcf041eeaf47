"""A model of GPUs: their properties, the thresholds of plans, and the time of a launch. Not measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields

THREADS = 256
FAST_DOUBLES = (80, 90, 100)
"""The compute capabilities whose double precision is fast."""
STATIC_SHARED = 7_696
"""The maximum bytes of static shared memory of a block."""


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """The properties of a GPU that plans need. Devices are compared by identity, which is fast.

    Attributes:
        name: the name to print.
        arch: the compute capability, 90 for sm_90.
        sms: the number of SMs.
        shared_per_sm, shared_per_block: bytes of shared memory of an SM, and of a block with opt-in.
        l2_bytes: bytes of the L2 cache.
        bandwidth: bytes per second of the memory, from the data sheet.
        clusters: whether blocks may form clusters on sm_90 and later.
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
        """The bytes of shared memory that the driver reserves for each block."""
        return 1 << 10 if self.arch >= 80 else 0

    @property
    def slow_doubles(self) -> bool:
        """Whether an SM computes 2 lanes of double precision per cycle, not 32 or more: 16 cycles for a warp."""
        return self.arch not in FAST_DOUBLES


@dataclass(frozen=True, slots=True)
class OnChip:
    """The bytes of tensors that blocks can keep on chip.

    Attributes:
        per_block: the maximum bytes of one block.
        per_sm: the bytes of all blocks of an SM.
        overhead: bytes of ``per_sm`` that each block takes in addition.
    """

    per_block: int
    per_sm: int
    overhead: int = 0

    @staticmethod
    def shared(device: Device) -> OnChip:
        """Return the bytes that the shared memory of a device can hold."""
        used = STATIC_SHARED + device.reserved_shared
        return OnChip(device.shared_per_block - STATIC_SHARED, device.shared_per_sm, used)

    def blocks(self, nbytes: int) -> int:
        """Return how many blocks that keep ``nbytes`` each fit on an SM."""
        return self.per_sm // (nbytes + self.overhead)

    def share(self, blocks: int) -> int:
        """Return the bytes that each block can keep if ``blocks`` share an SM."""
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
    """The parameters of the model that a measurement on a GPU may change.

    Attributes:
        blocks_per_sm: blocks that share an SM in the tiers that keep a channel on chip, limited by registers.
        waves: the most waves of blocks in a streaming launch, unless there are more strips.
        blocks_gain: the share of the time that more blocks must save in such a launch, because their sums are merged.
        fill: the share of the SMs that must have work if each strip gets one block. Where only one such block fits on
            an SM, a GPU with clusters uses clusters; an older GPU uses the block, for the other tiers cost more.
        vectors_per_thread: with fewer vectors per thread than this, cutting a channel further gains nothing.
        max_cluster: the maximum blocks of a cluster (every sm_90 GPU allows 8).
        max_cooperative: the maximum blocks that share a channel through L2.
        narrow_bytes: the minimum width of a strip of channels, which is 128 bytes unless wide strips leave SMs idle and
            blocks or clusters with narrower ones fill them. Memory is read in sectors of 32 bytes.
        narrow_vectors: with more vectors per thread than this, strips stay wide: there are enough rows to cut, and long
            reads matter more.
        usable_l2: the share of the L2 cache that the second read of the split tier may rely on.
        copy_share: the share of the data sheet's bandwidth that a copy reaches.
        launch: seconds from the end of one kernel to the work of the next in its stream: 2 to 3 us on current GPUs with
            queued launches. No call is faster than one launch.
        grid_barrier: seconds in which co-resident blocks publish sums, synchronise in L2 and read them: a fence, an
            atomic operation and a polled load, about 700 ns each, and late blocks; 4 to 8 us in all.
        cluster_barrier: seconds for the same through distributed shared memory, about 200 ns for each step.
        handover: seconds until the last block of a strip in the split tier knows that it is the last: a fence and an
            atomic operation.
        merge_round: seconds in which that block's threads read a round of partial sums from L2; eight loads share one
            latency.
        narrow_split_bytes, narrow_gain: the minimum width of a strip in the split tier (two sectors), and the share of
            the time that narrowing must save. The last block then merges fewer sums, but all blocks read less at once.
        latency: seconds from a load to its data on a busy GPU. With the bytes in flight it bounds the bandwidth.
        loads: vectors that a thread of a streaming kernel has in flight, by its machine code
            (``docs/machine_code.md``).
        row_blocks, column_blocks: streaming blocks, for rows and for columns, that fit on an SM by their registers.
    """

    blocks_per_sm: int = 2
    waves: int = 4
    blocks_gain: float = 0.01
    fill: float = 0.75
    vectors_per_thread: int = 4
    max_cluster: int = 8
    max_cooperative: int = 64
    narrow_bytes: int = 32
    narrow_vectors: int = 16
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
    """The seconds of a call by the model, in parts.

    Attributes:
        launches: the start of the kernels.
        memory: the bytes divided by the bandwidth of a copy.
        idle: the loss where too few bytes are in flight: few blocks, short loads, a last wave that is not full.
        exchange: the wait of blocks for each other's sums.
        merge: the addition of all sums by the last block of each strip, in the first launch of the split tier.
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
        """The name of the longest part."""
        parts = self.parts()
        return max(parts, key=lambda part: parts[part])


def memory_bandwidth(clock_khz: float, bus_bits: int) -> float:
    """Return the bytes per second of a memory that transfers data twice per clock cycle."""
    return 2e3 * clock_khz * bus_bits / 8


def copy_seconds(nbytes: float, device: Device, thresholds: Thresholds) -> float:
    """Return the seconds of a copy that reads and writes ``nbytes`` in total."""
    return nbytes / (thresholds.copy_share * device.bandwidth)


def streaming_seconds(
    nbytes: float, grid: int, resident: int, in_flight: int, device: Device, thresholds: Thresholds
) -> tuple[float, float]:
    """Return the seconds of a launch in two parts: those of a copy, and those lost in addition.

    ``grid`` blocks move the bytes in waves. An SM holds ``resident`` blocks, and each has ``in_flight`` bytes requested
    from memory at a time. A wave reaches the bandwidth of a copy, or less if too few bytes in flight hide the latency.
    """
    slots = resident * device.sms
    full, last = divmod(grid, slots)
    copy = thresholds.copy_share * device.bandwidth
    lost = 0.0
    for blocks, waves in ((slots, full), (last, 1)):
        if blocks and waves:
            reached = min(copy, blocks * in_flight / thresholds.latency)
            lost += waves * blocks * nbytes / grid * (1 / reached - 1 / copy)
    return nbytes / copy, lost
