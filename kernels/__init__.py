"""Device code of gpu_bn, installed as ``gpu_bn.kernels``: CUDA C++ sources and Triton kernels, nothing else."""
