"""Run CUDA and Triton kernels on a CPU: a PTX emulator on NumPy memory that checks and counts as it goes.

How to use it, and what it does not model, is in CONTRIBUTING.md.

- `parser` turns text into instructions; `formats` has numbers and rounding; `threads` registers and operands.
- `instructions` is the table of what is known; `arithmetic`, `bits`, `conversions`, `warp`, `accesses`, `atomics`,
  `copies` and `barriers` fill it.
- `memory` has addresses, `races` the order of accesses, `scheduler` who runs when, `counters` the reports.
- `machine` has devices and launches; `schedules`, `compile`, `fixtures` and `snippet` serve tests.
"""

from .errors import EmulatorError
from .machine import Checks, Device
from .parser import Kernel, parse

__all__ = ["Checks", "Device", "EmulatorError", "Kernel", "parse"]
