"""Run CUDA and Triton kernels on a CPU: a PTX emulator on NumPy memory that checks and counts as it goes."""

from .errors import EmulatorError
from .machine import Checks, Device
from .parser import Kernel, parse

__all__ = ["Checks", "Device", "EmulatorError", "Kernel", "parse"]
