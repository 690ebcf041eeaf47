"""Run CUDA and Triton kernels on a CPU: a PTX emulator on NumPy memory, with checks and counters.

docs/emulator.md says how to use it, and what it does not model.

- `parser` turns text into instructions; `formats` has number formats and rounding, `threads` registers and operands.
- `instructions` is the table of known instructions; `arithmetic`, `bits`, `conversions`, `warp`, `accesses`, `atomics`,
  `copies`, `matrices` and `barriers` fill it.
- `memory` has addresses, `races` the race detector, `scheduler` the order of execution, `counters` the reports.
- `machine` has devices and launches; `schedules`, `compile`, `fixtures` and `snippet` are for tests.
"""

from .errors import EmulatorError
from .machine import Checks, Device
from .parser import Kernel, parse

__all__ = ["Checks", "Device", "EmulatorError", "Kernel", "parse"]
