"""Test the reader of machine code on kernels whose instructions are known."""

from __future__ import annotations

import pytest
from emulator.compile import ARCHITECTURES, cuda_cubin
from support.machine_code import REGISTER_FILE, THREADS_PER_SM, blocks_per_sm, disassemble, tool

SOURCE = """
extern "C" __global__ void loads(float* y, const float4* x, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 4096) {
    float4 v[%(ahead)d];
#pragma unroll
    for (int u = 0; u < %(ahead)d; ++u) v[u] = __ldcs(x + i + 256 * u);
#pragma unroll
    for (int u = 0; u < %(ahead)d; ++u) sum += v[u].x * v[u].y + v[u].z * v[u].w;
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void scalars(float* y, const float* x, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) sum += x[i];
  y[threadIdx.x] = sum;
}
extern "C" __global__ void doubles(double* y, const float4* x, int n, int m) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) { const float4 v = x[i]; sum += v.x + v.y + v.z + v.w; }
  double all = sum, more = y[0];
#pragma unroll 1
  for (int i = 0; i < m; ++i) all = all * more + 1.;
  y[threadIdx.x] = all + 3.;
}
"""

pytestmark = [
    pytest.mark.compile,
    pytest.mark.usefixtures("compile_cuda"),
    pytest.mark.skipif(tool("nvdisasm") is None, reason="no disassembler: the triton wheel is not installed"),
]


def kernels(arch, ahead=4):
    return disassemble(cuda_cubin(SOURCE % {"ahead": ahead}, arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.one_in(4)
def test_loads_in_flight(arch, ahead):
    figures = kernels(arch, ahead)["loads"].figures(16)
    assert figures.in_flight == ahead
    assert 5 <= figures.instructions <= 16
    assert (figures.double, figures.asynchronous, figures.local_bytes) == (0, False, 0)


@pytest.mark.parametrize("arch", [75, 90])
def test_vectors_of_another_width_are_not_taken_for_the_tensors(arch):
    scalars = kernels(arch)["scalars"]
    assert not scalars.hot(16)
    assert scalars.figures(16).instructions == 0
    assert scalars.figures(4).instructions >= 4


@pytest.mark.parametrize("arch", [75, 90])
def test_double_precision_in_a_loop_is_told_from_the_rest(arch):
    figures = kernels(arch)["doubles"].figures(16)
    assert figures.double_rolled == 1
    assert figures.double == 3  # one in the loop, the last addition, and the conversion of the sum
    assert figures.in_flight >= 1


def test_blocks_per_sm():
    assert blocks_per_sm(90, 256, 32, 0) == 8
    assert blocks_per_sm(90, 256, 128, 0) == 2
    assert blocks_per_sm(90, 256, 122, 0) == 2  # registers are allocated in units of 8
    assert blocks_per_sm(90, 256, 129, 0) == 1
    assert blocks_per_sm(90, 256, 32, 100 << 10) == 2
    assert blocks_per_sm(75, 256, 32, 0) == 4
    assert all(threads * 32 <= REGISTER_FILE for threads in THREADS_PER_SM.values())
