"""Fixtures and hooks that every test file shares."""

from emulator.fixtures import caught_faults, compile_cuda, compile_triton, device, pytest_terminal_summary

__all__ = ["caught_faults", "compile_cuda", "compile_triton", "device", "pytest_terminal_summary"]
