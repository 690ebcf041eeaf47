"""Read the machine code of a kernel: its loops, its memory accesses, and its instructions in double precision.

NVIDIA's disassembler comes with the ``triton`` wheel. :func:`disassemble` takes any cubin, from NVRTC or Triton.
Instructions are counted in the code, where those of a loop count once. Loops therefore have separate figures.
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
"""The registers of an SM on every architecture from sm_70 on."""
REGISTER_UNIT = 8
"""The registers of a thread are allocated in units of 8."""
THREADS_PER_SM = {70: 2048, 75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
SHARED_PER_SM = {70: 96, 75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""The KiB of shared memory of an SM. Both tables are from the CUDA C++ Programming Guide (compute capabilities)."""
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x?_?\w+|[\w$]+):\s*$")


class Instruction(NamedTuple):
    """An instruction, such as ``@!P0 LDG.E.128 R4, desc[UR4][R2.64]``."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The operation without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def registers(self) -> list[int]:
        """The numbers of the registers in the operands; of a group of registers the first."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]

    @property
    def width(self) -> int:
        """The bytes of a memory access."""
        return next((WIDTHS[word] for word in self.opcode.split(".") if word in WIDTHS), 4)

    @property
    def is_double(self) -> bool:
        """Whether the units for double precision execute this. Most GPUs have few of them."""
        return self.base in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") or (
            self.base in ("F2F", "I2F", "F2I") and ".F64" in self.opcode
        )

    def accesses(self, width: int) -> str:
        """Return how this accesses a tensor in vectors of ``width`` bytes: ``load``, ``store``, ``copy`` or ``staged``.

        Return ``""`` if it accesses none. Loads past the L1 cache (``STRONG``) are of values that blocks exchange.
        """
        kinds = {"LDG": "load", "STG": "store", "LDGSTS": "copy", "LDS": "staged"}
        return kinds.get(self.base, "") if self.width == width and "STRONG" not in self.opcode else ""


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward jump to that jump. ``targets`` are the targets of all jumps."""

    code: tuple[Instruction, ...]
    targets: frozenset[int]

    def vectors(self, width: int) -> int:
        """Return the number of vectors that one iteration reads, or that it writes if it reads none."""
        kinds = Counter(kind for ins in self.code if (kind := ins.accesses(width)))
        return max(kinds["load"], kinds["copy"]) or kinds["staged"] or kinds["store"]

    def blocks(self) -> list[list[Instruction]]:
        """Split the loop into basic blocks: each ends with a jump or before the target of one."""
        blocks: list[list[Instruction]] = [[]]
        for ins in self.code:
            if ins.address in self.targets:
                blocks.append([])
            blocks[-1].append(ins)
            if ins.base == "BRA":
                blocks.append([])
        return [block for block in blocks if block]

    def in_flight(self, width: int) -> int:
        """Return the most loads of a thread in flight. A load ends where an instruction names one of its registers."""
        pending: list[range] = []
        most = 0
        for ins in self.code * 2:  # two iterations, for loads that the next iteration uses
            named = ins.registers
            pending = [filled for filled in pending if not any(number in filled for number in named)]
            if ins.accesses(width) == "load":
                pending.append(range(named[0], named[0] + max(width // 4, 1)))
                most = max(most, len(pending))
        return most

    def instructions(self, width: int, chain: int) -> float:
        """Return the number of instructions per vector. Blocks that add to wider sums run once in ``chain`` vectors."""
        return sum(len(block) / (chain if _widens(block) else 1) for block in self.blocks()) / self.vectors(width)


@dataclass(frozen=True)
class Machine:
    """The machine code of a kernel.

    Attributes:
        name: the name in the cubin.
        code: all instructions, including those of called functions.
        labels: the addresses of the labels that jumps name.
        registers: the registers of a thread.
        shared_bytes: the static shared memory of a block.
        local_bytes: the local memory of a thread, which holds spilled registers.
    """

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: int
    shared_bytes: int
    local_bytes: int

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The innermost loops. A backward jump closes one only if its target can reach the jump.

        Code that the assembler has moved away also jumps backward.
        """
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
        """Return the address that an instruction jumps to; ``None`` for other instructions."""
        target = re.search(r"`\((\S+?)\)", ins.operands)
        return self.labels.get(target[1]) if target and ins.base == "BRA" else None

    def _reaches(self, first: int, last: int) -> bool:
        """Tell whether control can flow from one address to another without leaving the code between them."""
        span = [ins for ins in self.code if first <= ins.address <= last]
        place = {ins.address: at for at, ins in enumerate(span)}
        visited, pending = set[int](), [0]
        while pending:
            at = pending.pop()
            if at in visited or at >= len(span):
                continue
            visited.add(at)
            ins = span[at]
            target = self._target(ins)
            if target in place:
                pending.append(place[target])
            if ins.guard or ins.base not in ("BRA", "EXIT", "RET") or re.match(r"!?U?P\d", ins.operands):
                pending.append(at + 1)
        return len(span) - 1 in visited

    def hot(self, width: int) -> tuple[Loop, ...]:
        """Return the loops over tensors."""
        return tuple(loop for loop in self.loops if loop.vectors(width) and _moves(loop, width))

    def figures(self, width: int, chain: int = 1) -> Figures:
        """Return the figures of a kernel that accesses tensors in vectors of ``width`` bytes.

        Loops with the same kinds of accesses are copies of one, of which a vector passes through one only. ``chain`` is
        as in :meth:`Loop.instructions`.
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
    """The figures of a kernel. ``registers``, ``shared_bytes`` and ``local_bytes`` are as in :class:`Machine`.

    Attributes:
        instructions: the instructions per vector in all loops over tensors together.
        in_flight: the most vectors that a thread has in flight.
        asynchronous: whether vectors are copied to shared memory asynchronously.
        double: the instructions in double precision outside the loops over tensors.
        double_rolled: the number of these that are in other loops.
        size: the number of all instructions.
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
    """Return the number of blocks that an SM holds, limited by threads, registers and shared memory."""
    a_thread = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    reserved = 1 << 10 if arch >= 80 else 0
    return min(
        THREADS_PER_SM[arch] // threads,
        REGISTER_FILE // (a_thread * threads),
        (SHARED_PER_SM[arch] << 10) // max(shared_bytes + reserved, 1),
    )


def tool(name: str) -> Path | None:
    """Return the path of ``nvdisasm`` or ``cuobjdump``; ``None`` if the ``triton`` wheel is not installed."""
    return package_file("triton", f"backends/nvidia/bin/{name}")


def figures_of(cubin: bytes, width: int, chain: int = 1) -> dict[str, Figures]:
    """Return the figures of the kernels in a cubin by name. They are kept in the cache of compiled kernels."""
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    path = cached_path(["figures", reader, hashlib.sha256(cubin).hexdigest(), width, chain])
    if not path.exists():
        figures = {name: machine.figures(width, chain) for name, machine in disassemble(cubin).items()}
        write_whole(path, json.dumps(figures).encode())
    return {name: Figures(*values) for name, values in json.loads(path.read_text()).items()}


def disassemble(cubin: bytes) -> dict[str, Machine]:
    """Return the kernels of a cubin by name."""
    usage = _run("cuobjdump", cubin, "-res-usage")
    text = _run("nvdisasm", cubin, "-c")
    kernels = {}
    for section in re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]:
        name = section.split()[0]
        resources = re.search(rf"Function {re.escape(name)}:\s+(.*)", usage)
        if resources is None:
            continue
        numbers = {kind: int(value) for kind, value in re.findall(r"(\w+):(\d+)", resources[1])}
        code, labels = _listing(section)
        local = numbers["LOCAL"] + numbers["STACK"]
        kernels[name] = Machine(name, code, labels, numbers["REG"], numbers["SHARED"], local)
    return kernels


def _run(name: str, cubin: bytes, option: str) -> str:
    program = tool(name)
    assert program is not None, f"{name} is not installed; it comes with the triton wheel"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout


def _listing(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Return the instructions of a disassembled section without NOP, and the addresses of its labels."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif match := LINE.match(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            if match[3] != "NOP":
                code.append(Instruction(address, match[2] or "", match[3], match[4]))
    return tuple(code), labels


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _moves(loop: Loop, width: int) -> bool:
    """Tell whether a loop accesses tensors in global memory, or reads staged vectors without exchanging sums."""
    kinds = {ins.accesses(width) for ins in loop.code}
    return bool(kinds & {"load", "copy", "store"}) or not _widens(loop.blocks()[0])


def _widens(block: list[Instruction]) -> bool:
    """Tell whether a block adds to sums in double precision, or in pairs of floats, which takes additions above all."""
    return any(ins.is_double for ins in block) or 2 * sum(ins.base == "FADD" for ins in block) > len(block)
