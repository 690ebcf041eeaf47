"""Device code of gpu_bn, installed as ``gpu_bn.kernels``: CUDA C++, Triton, and ``cpu`` for LLVM; nothing else."""
