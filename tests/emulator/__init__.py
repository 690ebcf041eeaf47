"""Run CUDA and Triton kernels on a CPU: a PTX emulator on NumPy memory that checks and counts as it goes.

How to use it, and what it does not model, is in CONTRIBUTING.md. `parser` turns text into instructions; `formats` has
numbers and rounding; `threads` registers and operands; `arithmetic`, `bits`, `conversions`, `warp`, `accesses`,
`atomics` and `copies` the instructions; `memory` addresses; `races` order; `barriers` and `scheduler` who runs when;
`machine` devices and launches; `counters` reports; `schedules` determinism; `compile`, `fixtures` and `snippet` serve
tests. A new instruction is one function that a table or a `@builds("opcode")` names, and a test against NumPy.
"""

from .errors import EmulatorError
from .machine import Checks, Device
from .parser import Kernel, parse

__all__ = ["Checks", "Device", "EmulatorError", "Kernel", "parse"]
