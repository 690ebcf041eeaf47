"""Kernels for CPUs, compiled by Numba; ``gpu_bn.backends.cpu`` calls them."""
