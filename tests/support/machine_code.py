"""Read what the assembler made of a kernel: its loops, its accesses, and what it does in double precision.

NVIDIA's disassembler comes with the ``triton`` wheel. :func:`disassemble` takes any cubin, of NVRTC or Triton. It
counts instructions in the code: those of a rolled loop count once, so that loops have figures of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from emulator.cache import cached_path, write_whole
from emulator.nvrtc import package_file

REGISTER_FILE = 64 << 10
"""Registers of an SM, on every architecture from sm_70 on."""
REGISTER_UNIT = 8
"""A warp's registers are given out in units of 8 a thread."""
THREADS_PER_SM = {70: 2048, 75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
SHARED_PER_SM = {70: 96, 75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""Of shared memory, in KiB: the CUDA C++ Programming Guide's table of compute capabilities, as the one above."""
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x?_?\w+|[\w$]+):\s*$")


class Instruction(NamedTuple):
    """Parse one line: ``@!P0 LDG.E.128 R4, desc[UR4][R2.64]``."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """Return the operation without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def registers(self) -> list[int]:
        """Return the numbers of the registers in its operands; of a group of registers the first."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]

    @property
    def width(self) -> int:
        """Return the bytes of an access to memory."""
        return next((WIDTHS[word] for word in self.opcode.split(".") if word in WIDTHS), 4)

    @property
    def is_double(self) -> bool:
        """Tell whether the units for double precision do this, of which most GPUs have few."""
        return self.base in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") or (
            self.base in ("F2F", "I2F", "F2I") and ".F64" in self.opcode
        )

    def accesses(self, width: int) -> str:
        """Say how this accesses a tensor of vectors of so many bytes: ``load``, ``store``, ``copy``, ``staged`` or not.

        Numbers that blocks exchange are loaded past the first cache (``STRONG``), and are none.
        """
        kinds = {"LDG": "load", "STG": "store", "LDGSTS": "copy", "LDS": "staged"}
        return kinds.get(self.base, "") if self.width == width and "STRONG" not in self.opcode else ""


@dataclass(frozen=True)
class Loop:
    """Hold the instructions from the target of a jump back to that jump; ``targets``: addresses that jumps lead to."""

    code: tuple[Instruction, ...]
    targets: frozenset[int]

    def vectors(self, width: int) -> int:
        """Count the vectors of tensors that one turn reads, or writes where it reads none."""
        kinds = Counter(kind for ins in self.code if (kind := ins.accesses(width)))
        return max(kinds["load"], kinds["copy"]) or kinds["staged"] or kinds["store"]

    def blocks(self) -> list[list[Instruction]]:
        """Cut the loop into straight runs, each ending with a jump or before what a jump leads to."""
        blocks: list[list[Instruction]] = [[]]
        for ins in self.code:
            if ins.address in self.targets:
                blocks.append([])
            blocks[-1].append(ins)
            if ins.base == "BRA":
                blocks.append([])
        return [block for block in blocks if block]

    def in_flight(self, width: int) -> int:
        """Count a thread's loads under way: until an instruction names a register that one of them fills."""
        pending: list[range] = []
        most = 0
        for ins in self.code * 2:  # twice, for what is loaded for the next turn
            named = ins.registers
            pending = [filled for filled in pending if not any(number in filled for number in named)]
            if ins.accesses(width) == "load":
                pending.append(range(named[0], named[0] + max(width // 4, 1)))
                most = max(most, len(pending))
        return most

    def instructions(self, width: int, chain: int) -> float:
        """Count instructions a vector; double precision that is jumped over runs once in ``chain`` vectors."""
        total = 0.0
        for block in self.blocks():
            rare = any(ins.is_double for ins in block)
            total += len(block) / (chain if rare else 1)
        return total / self.vectors(width)


@dataclass(frozen=True)
class Machine:
    """Hold a kernel's machine code.

    Attributes:
        name: as the assembler has it.
        code: all instructions, of the functions that it calls too.
        labels: the addresses of the targets of jumps.
        registers, shared_bytes, local_bytes: what a thread and a block have, by the assembler; the last are spills.
    """

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: int
    shared_bytes: int
    local_bytes: int

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Find the innermost loops: jumps back to where they can be reached from. Code moved off jumps back too."""
        spans = set()
        for ins in self.code:
            start = self._target(ins)
            if start is not None and start < ins.address and self._reaches(start, ins.address):
                spans.add((start, ins.address))
        inner = [span for span in spans if not any(span != other and _within(other, span) for other in spans)]
        targets = frozenset(target for ins in self.code if (target := self._target(ins)) is not None)
        return tuple(
            Loop(tuple(ins for ins in self.code if first <= ins.address <= last), targets)
            for first, last in sorted(inner)
        )

    def _target(self, ins: Instruction) -> int | None:
        """Return the address that an instruction jumps to."""
        target = re.search(r"`\((\S+?)\)", ins.operands)
        return self.labels.get(target[1]) if target and ins.base == "BRA" else None

    def _reaches(self, first: int, last: int) -> bool:
        """Tell whether there is a way from one address on to another, between the two."""
        span = [ins for ins in self.code if first <= ins.address <= last]
        place = {ins.address: at for at, ins in enumerate(span)}
        seen, ahead = set[int](), [0]
        while ahead:
            at = ahead.pop()
            if at in seen or at >= len(span):
                continue
            seen.add(at)
            ins = span[at]
            target = self._target(ins)
            if target in place:
                ahead.append(place[target])
            if ins.guard or ins.base not in ("BRA", "EXIT", "RET") or re.match(r"!?U?P\d", ins.operands):
                ahead.append(at + 1)
        return len(span) - 1 in seen

    def hot(self, width: int) -> tuple[Loop, ...]:
        """Return the loops that go through tensors."""
        return tuple(loop for loop in self.loops if loop.vectors(width) and _moves(loop, width))

    def figures(self, width: int, chain: int = 1) -> Figures:
        """Return the budgeted figures of a kernel that goes through tensors in vectors of so many bytes.

        Loops that access tensors alike are copies of one, and a vector goes through one of them. ``chain``: see
        :meth:`Loop.instructions`.
        """
        hot = self.hot(width)
        passes: dict[frozenset[str], float] = {}
        for loop in hot:
            kinds = frozenset(ins.accesses(width) for ins in loop.code)
            passes[kinds] = max(passes.get(kinds, 0.0), loop.instructions(width, chain))
        inside = {ins.address for loop in hot for ins in loop.code}
        double = [ins for ins in self.code if ins.is_double and ins.address not in inside]
        rolled = {ins.address for loop in self.loops for ins in loop.code}
        return Figures(
            self.registers,
            self.shared_bytes,
            self.local_bytes,
            round(sum(passes.values()), 1),
            max((loop.in_flight(width) for loop in hot), default=0),
            any(ins.accesses(width) == "copy" for ins in self.code),
            len(double),
            sum(ins.address in rolled for ins in double),
            len(self.code),
        )


class Figures(NamedTuple):
    """Hold a kernel's figures.

    Attributes:
        registers, shared_bytes, local_bytes: as in :class:`Machine`.
        instructions: for each vector, in all loops that a vector goes through together.
        in_flight: vectors that a thread has asked memory for at a time, before it uses one.
        asynchronous: whether vectors are copied to shared memory, all of a block's at a time.
        double: instructions in double precision outside of these loops.
        double_rolled: those of them that are in other loops, and run more than once.
        size: instructions in all.
    """

    registers: int
    shared_bytes: int
    local_bytes: int
    instructions: float
    in_flight: int
    asynchronous: bool
    double: int
    double_rolled: int
    size: int


def blocks_per_sm(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Return how many blocks an SM holds, by threads, registers and shared memory."""
    a_thread = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    reserved = 1 << 10 if arch >= 80 else 0
    return min(
        THREADS_PER_SM[arch] // threads,
        REGISTER_FILE // (a_thread * threads),
        (SHARED_PER_SM[arch] << 10) // max(shared_bytes + reserved, 1),
    )


def tool(name: str) -> Path | None:
    """Find ``nvdisasm`` or ``cuobjdump``, if the ``triton`` wheel is installed."""
    return package_file("triton", f"backends/nvidia/bin/{name}")


def figures_of(cubin: bytes, width: int, chain: int = 1) -> dict[str, Figures]:
    """Return the figures of a cubin's kernels by name, from the cache of compiled kernels if they are there."""
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    path = cached_path(["figures", reader, hashlib.sha256(cubin).hexdigest(), width, chain])
    if not path.exists():
        found = {name: machine.figures(width, chain) for name, machine in disassemble(cubin).items()}
        write_whole(path, json.dumps(found).encode())
    return {name: Figures(*figures) for name, figures in json.loads(path.read_text()).items()}


def disassemble(cubin: bytes) -> dict[str, Machine]:
    """Return the kernels of a cubin by name."""
    usage = _run("cuobjdump", cubin, "-res-usage")
    text = _run("nvdisasm", cubin, "-c")
    found = {}
    for section in re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]:
        name = section.split()[0]
        resources = re.search(rf"Function {re.escape(name)}:\s+(.*)", usage)
        if resources is None:
            continue
        numbers = {kind: int(value) for kind, value in re.findall(r"(\w+):(\d+)", resources[1])}
        code, labels = _listing(section)
        local = numbers["LOCAL"] + numbers["STACK"]
        found[name] = Machine(name, code, labels, numbers["REG"], numbers["SHARED"], local)
    return found


def _run(name: str, cubin: bytes, option: str) -> str:
    program = tool(name)
    assert program is not None, f"{name} is not installed; it comes with the triton wheel"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout


def _listing(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif found := LINE.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            if found[3] != "NOP":
                code.append(Instruction(address, found[2] or "", found[3], found[4]))
    return tuple(code), labels


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _moves(loop: Loop, width: int) -> bool:
    """Tell whether a loop reaches tensors in global memory, or sums up what is staged of them: no exchange of sums."""
    kinds = {ins.accesses(width) for ins in loop.code}
    return bool(kinds & {"load", "copy", "store"}) or not any(ins.is_double for ins in loop.blocks()[0])
