"""The compiled backend for CPUs: NumPy arrays and torch's tensors, served by the kernels in ``gpu_bn.kernels.cpu``.

Importing this package imports neither Numba nor torch.
"""
