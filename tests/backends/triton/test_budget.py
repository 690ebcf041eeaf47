"""The budget of the Triton kernels' machine code: instructions, double precision, loads under way, blocks an SM.

The kernels in two launches of an NCHW layer of ResNet-50, half precision with ReLU, as :mod:`machine_code` reads them.
Speed has a gate that needs no GPU: what is dearer than this is slower, whatever the memory does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
from emulator.compile import ARCHITECTURES, triton_cubin
from support.machine_code import Figures, blocks_per_sm, disassemble, tool

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.language as tl
from support.triton_variants import compiled_with, recorded

from gpu_bn.backends.triton.launch import Specialisation, Step

VECTOR = 16
pytestmark = [
    pytest.mark.compile,
    pytest.mark.usefixtures("compile_triton"),
    pytest.mark.skipif(tool("nvdisasm") is None, reason="no disassembler"),
]


class Budget(NamedTuple):
    """What a kernel may take, and what it must have.

    Attributes:
        instructions: for each vector of 16 bytes, at most.
        double: instructions in double precision outside of the loops that go through tensors, at most.
        in_flight: vectors that a thread has asked memory for before it uses one, at least.
        blocks: on an SM, at least.
    """

    instructions: float
    double: int
    in_flight: int
    blocks: int

    def over(self, found: Figures, blocks: int) -> list[str]:
        """Why figures are outside of it."""
        least = {"instructions": (1.0, found.instructions), "in_flight": (self.in_flight, found.in_flight),
                 "blocks": (self.blocks, blocks)}  # fmt: skip
        most = {"instructions": (self.instructions, found.instructions), "double": (self.double, found.double),
                "local_bytes": (0, found.local_bytes)}  # fmt: skip
        under = [f"{what} {value} < {limit}" for what, (limit, value) in least.items() if value < limit]
        return under + [f"{what} {value} > {limit}" for what, (limit, value) in most.items() if value > limit]


BUDGETS = {
    "bn_stats_kernel": Budget(66, 23, 1, 4),
    "bn_normalize_kernel": Budget(77, 81, 2, 4),
    "bn_backward_reduce_kernel": Budget(49, 28, 2, 3),
    "bn_backward_input_kernel": Budget(62, 43, 2, 4),
}
"""Of kernels in rows: what most was measured on sm_75 to sm_120, and a twentieth more."""


@cache
def launches() -> dict[str, tuple[Step, Specialisation]]:
    """The launches of a call in two passes, by kernel: two blocks a strip, so that there is something to merge."""
    found = recorded(torch.empty(32, 256, 3136, dtype=torch.float16), 80, sms=128, activation="relu", residual=False)
    return {step.kernel.__name__: (step, special) for step, special in found}


def measured(arch: int, step: Step, special: Specialisation) -> tuple[Figures, int]:
    """The figures of a launch, and its blocks an SM."""
    (machine,) = disassemble(triton_cubin(step.kernel, arch, **compiled_with(special))).values()
    found = machine.figures(VECTOR)
    return found, blocks_per_sm(arch, 32 * step.num_warps, found.registers, found.shared_bytes)


MARKS = {90: [], 75: pytest.mark.slow, 120: pytest.mark.slow}


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=MARKS.get(arch, pytest.mark.exhaustive)) for arch in ARCHITECTURES]
)
@pytest.mark.parametrize("kernel", BUDGETS)
def test_budget(arch, kernel):
    assert not BUDGETS[kernel].over(*measured(arch, *launches()[kernel]))


REDUCE = "bn_backward_reduce_kernel"
SLOW = {
    "narrow loads": ({"aligned": ()}, {}, "instructions 0"),
    "double precision for each element": ({}, {"COMPUTE": tl.float64}, "instructions"),
    "one load under way": ({}, {"POSITIONS": 64}, "in_flight"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_planted_slow_kernel_is_noticed(name):
    changed, constants, says = SLOW[name]
    step, special = launches()[REDUCE]
    slow = replace(special, constants=special.constants | constants, **changed)
    assert any(says in why for why in BUDGETS[REDUCE].over(*measured(90, step, slow)))
