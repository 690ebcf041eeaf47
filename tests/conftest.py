"""Fixtures that every test file may ask for by name."""

from emulator.fixtures import compile_cuda, compile_triton, device

__all__ = ["compile_cuda", "compile_triton", "device"]
