"""The compiled backend for CPUs: it serves NumPy arrays and torch tensors with the kernels in ``gpu_bn.kernels.cpu``.

Importing this package imports neither Numba nor torch.
"""
