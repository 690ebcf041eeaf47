"""Kernels for CPUs, compiled by LLVM; ``gpu_bn.backends.cpu`` calls them."""
