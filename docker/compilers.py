"""Check the compilers of the image: NVRTC with the headers that CuPy finds, and gcc for Triton's launcher."""

import cupy
from cuda.pathfinder import find_nvidia_header_directory
from cupy_backends.cuda.libs import nvrtc
from triton.runtime.build import compile_module_from_src

SOURCE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void convert(__half* y, const __nv_bfloat16* x) {
  y[threadIdx.x] = __float2half(__bfloat162float(x[threadIdx.x]));
}
"""
MODULE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "empty", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_empty(void) { return PyModule_Create(&module); }
"""

headers = find_nvidia_header_directory("cudart")
program = nvrtc.createProgram(SOURCE, "convert.cu", (), ())
try:
    nvrtc.compileProgram(program, (f"-I{headers}", "-arch=sm_90"))
except nvrtc.NVRTCError:
    raise SystemExit(nvrtc.getProgramLog(program)) from None
cubin = len(nvrtc.getCUBIN(program))
print(f"CuPy {cupy.__version__}, NVRTC {nvrtc.getVersion()}, {headers}: a cubin of {cubin} bytes for sm_90")
compile_module_from_src(MODULE, "empty")
print("gcc: a Python module compiled by Triton")
