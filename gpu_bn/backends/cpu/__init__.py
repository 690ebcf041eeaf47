"""The compiled backend for CPUs: NumPy arrays and torch's tensors, served by the kernels in ``gpu_bn.kernels.cpu``.

Importing this package imports neither Numba nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_bn.backends.cpu.backend import CpuBackend


def backend() -> CpuBackend:
    """The backend of NumPy arrays, for :func:`gpu_bn.dispatch.load`; torch's is in :mod:`.tensors`."""
    from gpu_bn.backends.cpu.arrays import NumpyArrays
    from gpu_bn.backends.cpu.backend import CpuBackend

    return CpuBackend(NumpyArrays())
