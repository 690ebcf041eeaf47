"""The CuPy backend: CUDA C++ kernels for CuPy arrays, and for torch tensors on a GPU."""
