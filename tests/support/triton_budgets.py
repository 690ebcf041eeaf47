"""The limits of the budget for the machine code of the Triton kernels, by call and kernel: see :mod:`triton_budget`."""

from __future__ import annotations

from typing import NamedTuple

VECTOR = 16
"""Bytes of a vector."""


class Budget(NamedTuple):
    """The limits for a kernel on every architecture.

    Attributes:
        instructions: the most instructions for each vector of 16 bytes, in the loops over tensors; for kernels that
            hold a channel, in the whole kernel; 0 for kernels that read no tensor.
        double: the most instructions in double precision outside of the loops over tensors.
        in_flight: the fewest vectors that a thread requests from memory before it uses one.
        blocks: the fewest blocks on an SM.
        spilled: the most bytes of registers that a thread spills. The assembler spills a few where more registers would
            cost a block on an SM.
    """

    instructions: float
    double: int
    in_flight: int
    blocks: int
    spilled: int = 0

    def over(self, found: Found) -> list[str]:
        """Return a message for each figure that is outside of the budget."""
        least = {"instructions": float(self.instructions > 0), "in_flight": self.in_flight, "blocks": self.blocks}
        most = {"instructions": self.instructions, "double": self.double, "local_bytes": self.spilled}
        numbers = found._asdict()
        under = [f"{what} {numbers[what]} < {limit}" for what, limit in least.items() if numbers[what] < limit]
        return under + [f"{what} {numbers[what]} > {limit}" for what, limit in most.items() if numbers[what] > limit]


class Found(NamedTuple):
    """The figures of a kernel; see :class:`Budget`."""

    instructions: float
    double: int
    in_flight: int
    blocks: int
    registers: int
    local_bytes: int
    threads: int

    @property
    def kib(self) -> int:
        """The KiB that the blocks of an SM request from memory at a time."""
        return self.in_flight * VECTOR * self.threads * self.blocks >> 10


BUDGETS = {
    ("rows", "bn_stats_kernel, before a merge"): Budget(60, 0, 4, 4),
    ("rows", "bn_merge_moments_kernel"): Budget(0, 101, 0, 25),
    ("rows", "bn_normalize_kernel, after a merge"): Budget(76, 12, 2, 4),
    ("rows", "bn_backward_reduce_kernel, before a merge"): Budget(48, 26, 2, 3),
    ("rows", "bn_merge_sums_kernel"): Budget(0, 64, 0, 32),
    ("rows", "bn_backward_input_kernel, after a merge"): Budget(61, 0, 4, 4),
    ("rows", "bn_stats_kernel"): Budget(60, 22, 4, 4),
    ("rows", "bn_normalize_kernel"): Budget(68, 67, 2, 8),
    ("rows", "bn_backward_reduce_kernel"): Budget(48, 28, 2, 4),
    ("rows", "bn_backward_input_kernel"): Budget(57, 47, 2, 6),
    ("columns", "bn_stats_kernel, before a merge"): Budget(53, 0, 4, 2),
    ("columns", "bn_merge_moments_kernel"): Budget(0, 108, 0, 25),
    ("columns", "bn_normalize_kernel, after a merge"): Budget(68, 12, 1, 4),
    ("columns", "bn_backward_reduce_kernel, before a merge"): Budget(45, 31, 4, 2),
    ("columns", "bn_merge_sums_kernel"): Budget(0, 70, 0, 32),
    ("columns", "bn_backward_input_kernel, after a merge"): Budget(57, 0, 2, 3),
    ("columns", "bn_stats_kernel"): Budget(54, 39, 4, 2),
    ("columns", "bn_normalize_kernel"): Budget(60, 85, 2, 4),
    ("columns", "bn_backward_reduce_kernel"): Budget(45, 33, 3, 2),
    ("columns", "bn_backward_input_kernel"): Budget(53, 57, 2, 3),
    ("held rows", "bn_forward_kernel"): Budget(227, 68, 4, 2),
    ("held rows", "bn_backward_kernel"): Budget(103, 39, 6, 2),
    ("held columns", "bn_forward_kernel"): Budget(525, 78, 4, 2),
    ("held columns", "bn_backward_kernel"): Budget(128, 44, 8, 2),
    ("ragged rows", "bn_stats_kernel, before a merge"): Budget(84, 0, 4, 4),
    ("ragged rows", "bn_merge_moments_kernel"): Budget(0, 57, 0, 32),
    ("ragged rows", "bn_normalize_kernel, after a merge"): Budget(112, 12, 2, 4),
    ("ragged rows", "bn_backward_reduce_kernel, before a merge"): Budget(64, 26, 2, 3),
    ("ragged rows", "bn_merge_sums_kernel"): Budget(0, 43, 0, 32),
    ("ragged rows", "bn_backward_input_kernel, after a merge"): Budget(83, 0, 4, 4),
    ("ragged rows", "bn_stats_kernel"): Budget(84, 23, 4, 3),
    ("ragged rows", "bn_normalize_kernel"): Budget(111, 106, 2, 8),
    ("ragged rows", "bn_backward_reduce_kernel"): Budget(65, 28, 2, 3),
    ("ragged rows", "bn_backward_input_kernel"): Budget(83, 55, 2, 6),
    ("held ragged rows", "bn_forward_kernel"): Budget(425, 66, 2, 2),
    ("held ragged rows", "bn_backward_kernel"): Budget(143, 39, 4, 3),
    ("cluster rows", "bn_forward_kernel"): Budget(207, 67, 4, 2),
    ("cluster rows", "bn_backward_kernel"): Budget(107, 40, 7, 2),
    ("cluster columns", "bn_forward_kernel"): Budget(354, 65, 4, 2),
    ("cluster columns", "bn_backward_kernel"): Budget(148, 44, 8, 2),
    ("rows, float32", "bn_stats_kernel, before a merge"): Budget(35, 0, 4, 4),
    ("rows, float32", "bn_merge_moments_kernel"): Budget(0, 101, 0, 25),
    ("rows, float32", "bn_normalize_kernel, after a merge"): Budget(38, 12, 4, 4),
    ("rows, float32", "bn_backward_reduce_kernel, before a merge"): Budget(26, 26, 2, 3),
    ("rows, float32", "bn_merge_sums_kernel"): Budget(0, 64, 0, 32),
    ("rows, float32", "bn_backward_input_kernel, after a merge"): Budget(30, 0, 4, 4),
    ("rows, float32", "bn_stats_kernel"): Budget(35, 27, 4, 4),
    ("rows, float32", "bn_normalize_kernel"): Budget(37, 67, 4, 6),
    ("rows, float32", "bn_backward_reduce_kernel"): Budget(26, 28, 2, 3),
    ("rows, float32", "bn_backward_input_kernel"): Budget(29, 47, 4, 5),
    ("columns, float32", "bn_stats_kernel, before a merge"): Budget(29, 0, 4, 2),
    ("columns, float32", "bn_merge_moments_kernel"): Budget(0, 106, 0, 25),
    ("columns, float32", "bn_normalize_kernel, after a merge"): Budget(30, 12, 4, 4),
    ("columns, float32", "bn_backward_reduce_kernel, before a merge"): Budget(24, 30, 2, 2),
    ("columns, float32", "bn_merge_sums_kernel"): Budget(0, 68, 0, 32),
    ("columns, float32", "bn_backward_input_kernel, after a merge"): Budget(26, 0, 4, 4),
    ("columns, float32", "bn_stats_kernel"): Budget(28, 49, 4, 2),
    ("columns, float32", "bn_normalize_kernel"): Budget(30, 87, 4, 4),
    ("columns, float32", "bn_backward_reduce_kernel"): Budget(22, 32, 2, 3),
    ("columns, float32", "bn_backward_input_kernel"): Budget(26, 59, 3, 4, 8),
    ("held rows, float32", "bn_forward_kernel"): Budget(125, 73, 8, 2),
    ("held rows, float32", "bn_backward_kernel"): Budget(52, 39, 7, 2),
    ("held columns, float32", "bn_forward_kernel"): Budget(184, 88, 8, 2),
    ("held columns, float32", "bn_backward_kernel"): Budget(53, 44, 8, 2),
    ("ragged rows, float32", "bn_stats_kernel, before a merge"): Budget(50, 0, 4, 3),
    ("ragged rows, float32", "bn_merge_moments_kernel"): Budget(0, 57, 0, 32),
    ("ragged rows, float32", "bn_normalize_kernel, after a merge"): Budget(60, 12, 4, 4),
    ("ragged rows, float32", "bn_backward_reduce_kernel, before a merge"): Budget(38, 26, 4, 2),
    ("ragged rows, float32", "bn_merge_sums_kernel"): Budget(0, 43, 0, 32),
    ("ragged rows, float32", "bn_backward_input_kernel, after a merge"): Budget(45, 0, 6, 4),
    ("ragged rows, float32", "bn_stats_kernel"): Budget(51, 27, 4, 3),
    ("ragged rows, float32", "bn_normalize_kernel"): Budget(63, 106, 4, 4),
    ("ragged rows, float32", "bn_backward_reduce_kernel"): Budget(36, 28, 4, 2),
    ("ragged rows, float32", "bn_backward_input_kernel"): Budget(45, 55, 4, 4),
    ("held ragged rows, float32", "bn_forward_kernel"): Budget(222, 71, 4, 2),
    ("held ragged rows, float32", "bn_backward_kernel"): Budget(72, 39, 8, 3),
    ("cluster rows, float32", "bn_forward_kernel"): Budget(120, 72, 8, 2),
    ("cluster rows, float32", "bn_backward_kernel"): Budget(54, 39, 7, 2),
    ("cluster columns, float32", "bn_forward_kernel"): Budget(154, 70, 8, 2, 8),
    ("cluster columns, float32", "bn_backward_kernel"): Budget(62, 44, 10, 2),
}
"""The worst figures on sm_75 to sm_120, with a twentieth more instructions."""
EARLIER = {
    ("rows", "bn_stats_kernel, before a merge"): Budget(60, 0, 4, 3),
    ("rows", "bn_merge_moments_kernel"): Budget(0, 107, 0, 25),
    ("rows", "bn_normalize_kernel, after a merge"): Budget(82, 12, 2, 4),
    ("rows", "bn_merge_sums_kernel"): Budget(0, 76, 0, 32),
    ("rows", "bn_stats_kernel"): Budget(60, 22, 4, 3),
    ("rows", "bn_normalize_kernel"): Budget(82, 67, 2, 8),
    ("rows", "bn_backward_reduce_kernel"): Budget(48, 28, 2, 3),
    ("rows", "bn_backward_input_kernel"): Budget(62, 47, 2, 6),
    ("columns", "bn_normalize_kernel, after a merge"): Budget(76, 12, 1, 4),
    ("columns", "bn_backward_reduce_kernel, before a merge"): Budget(50, 31, 2, 2),
    ("columns", "bn_merge_sums_kernel"): Budget(0, 78, 0, 32),
    ("columns", "bn_stats_kernel"): Budget(54, 65, 4, 2),
    ("columns", "bn_normalize_kernel"): Budget(65, 85, 2, 4),
    ("columns", "bn_backward_reduce_kernel"): Budget(50, 33, 2, 2),
    ("columns", "bn_backward_input_kernel"): Budget(58, 57, 2, 3),
    ("held rows", "bn_backward_kernel"): Budget(103, 40, 6, 2),
    ("held columns", "bn_backward_kernel"): Budget(137, 44, 3, 2),
    ("ragged rows", "bn_stats_kernel, before a merge"): Budget(84, 0, 2, 3),
    ("ragged rows", "bn_merge_moments_kernel"): Budget(0, 58, 0, 32),
    ("ragged rows", "bn_normalize_kernel, after a merge"): Budget(123, 12, 2, 4),
    ("ragged rows", "bn_backward_input_kernel, after a merge"): Budget(90, 0, 2, 4),
    ("ragged rows", "bn_stats_kernel"): Budget(84, 24, 2, 3),
    ("ragged rows", "bn_normalize_kernel"): Budget(123, 106, 2, 5),
    ("ragged rows", "bn_backward_input_kernel"): Budget(91, 55, 2, 6),
    ("held ragged rows", "bn_backward_kernel"): Budget(143, 40, 4, 3),
    ("rows, float32", "bn_stats_kernel, before a merge"): Budget(35, 0, 4, 3),
    ("rows, float32", "bn_merge_moments_kernel"): Budget(0, 104, 0, 25),
    ("rows, float32", "bn_normalize_kernel, after a merge"): Budget(40, 12, 4, 4),
    ("rows, float32", "bn_merge_sums_kernel"): Budget(0, 73, 0, 32),
    ("rows, float32", "bn_backward_input_kernel, after a merge"): Budget(33, 0, 4, 4),
    ("rows, float32", "bn_stats_kernel"): Budget(35, 27, 4, 3),
    ("rows, float32", "bn_normalize_kernel"): Budget(40, 67, 4, 6),
    ("rows, float32", "bn_backward_input_kernel"): Budget(33, 47, 3, 5),
    ("columns, float32", "bn_normalize_kernel, after a merge"): Budget(34, 12, 4, 4),
    ("columns, float32", "bn_merge_sums_kernel"): Budget(0, 77, 0, 32),
    ("columns, float32", "bn_backward_input_kernel, after a merge"): Budget(29, 0, 3, 3),
    ("columns, float32", "bn_normalize_kernel"): Budget(34, 87, 4, 4),
    ("columns, float32", "bn_backward_reduce_kernel"): Budget(24, 32, 2, 3),
    ("columns, float32", "bn_backward_input_kernel"): Budget(29, 59, 3, 3),
    ("held rows, float32", "bn_backward_kernel"): Budget(52, 40, 7, 2),
    ("held columns, float32", "bn_backward_kernel"): Budget(56, 44, 4, 2),
    ("ragged rows, float32", "bn_stats_kernel, before a merge"): Budget(50, 0, 2, 3),
    ("ragged rows, float32", "bn_merge_moments_kernel"): Budget(0, 59, 0, 32),
    ("ragged rows, float32", "bn_normalize_kernel, after a merge"): Budget(69, 12, 3, 4),
    ("ragged rows, float32", "bn_backward_input_kernel, after a merge"): Budget(48, 0, 5, 4),
    ("ragged rows, float32", "bn_stats_kernel"): Budget(51, 27, 2, 3),
    ("ragged rows, float32", "bn_normalize_kernel"): Budget(68, 106, 4, 4),
    ("ragged rows, float32", "bn_backward_reduce_kernel"): Budget(36, 28, 2, 2),
    ("ragged rows, float32", "bn_backward_input_kernel"): Budget(49, 55, 4, 3),
    ("held ragged rows, float32", "bn_backward_kernel"): Budget(72, 40, 6, 2),
}
"""The limits with Triton 3.6 to 3.8, where they differ. Their compilers keep fewer loads in flight and need more
registers: that costs the statistics in rows one block in four on an SM."""
