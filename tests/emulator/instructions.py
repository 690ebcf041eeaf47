"""The table of instructions: for each opcode a builder, which turns an instruction into a function that executes it.

Everything that depends on the text only (types, rounding, operands) is decided once, when a kernel is loaded. An opcode
or a modifier that is not in the table is refused with its line when the kernel is loaded, even if it would never run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .parser import TYPE_BYTES, Instruction
from .threads import Array, Mask, reader, writer

if TYPE_CHECKING:
    from .machine import Launch

Runner = Callable[["Launch", Mask], None]
Builder = Callable[[Instruction], Runner]
_BUILDERS: dict[str, Builder] = {}
_MODIFIERS: dict[str, set[str]] = {}


def builds(opcodes: str, modifiers: str = "") -> Callable[[Builder], Builder]:
    """Register a builder for some opcodes, with the modifiers that it accepts besides types."""

    def register(builder: Builder) -> Builder:
        for opcode in opcodes.split():
            _BUILDERS[opcode], _MODIFIERS[opcode] = builder, set(modifiers.split())
        return builder

    return register


def unsupported(ins: Instruction) -> EmulatorError:
    return EmulatorError("unknown instruction", f"this is not modelled: {ins.where()}")


def build(ins: Instruction) -> Runner:
    if ins.opcode not in _BUILDERS:
        raise unsupported(ins)
    for modifier in ins.modifiers:
        known = modifier in _MODIFIERS[ins.opcode] or modifier in TYPE_BYTES
        # Cache hints (L1::, L2::) change no result.
        if not known and not modifier.startswith(("L1::", "L2::")):
            raise unsupported(ins)
    try:
        return _BUILDERS[ins.opcode](ins)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise unsupported(ins) from error  # an operand or a combination that the builder did not expect


def elementwise(ins: Instruction, function: Callable[..., Array], types: list[str], to: str | None = None) -> Runner:
    """Build dest = function(sources), lane by lane; source i is read as types[i]."""
    sources = [reader(ins, operand, type_) for operand, type_ in zip(ins.operands[1:], types, strict=True)]
    write = writer(ins, ins.operands[0], to or ins.type)

    def run(launch: Launch, active: Mask) -> None:
        threads = launch.threads
        write(threads, function(*[source(threads) for source in sources]), active)

    return run


@builds("createpolicy", "fractional")
def _cache_policy(ins: Instruction) -> Runner:
    return elementwise(replace(ins, operands=ins.operands[:1]), lambda: np.uint64(0), [])


@builds(
    "prefetch prefetchu griddepcontrol setmaxnreg applypriority discard nanosleep",
    "global local L1 L2 wait launch_dependents inc dec sync aligned",
)
def _hint(_: Instruction) -> Runner:
    """Build an instruction that does nothing here: these affect timing only."""
    return lambda launch, active: None  # noqa: ARG005
