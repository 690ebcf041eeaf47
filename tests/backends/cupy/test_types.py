"""Storage types of the CUDA kernels: conversions round to nearest even, also on GPUs without an instruction."""

import numpy as np
import pytest
from emulator import Device
from support import rng

from gpu_bn.backends.cupy import sources as cuda_sources

ml_dtypes = pytest.importorskip("ml_dtypes")
pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore:invalid value|overflow:RuntimeWarning")]

ROUND_TRIP = """
template <class T> __device__ void round_trip(u16* down, float* up, const float* from) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  down[i] = T::down(from[i]);
  up[i] = T::up(down[i]);
}
extern "C" __global__ void float16(u16* down, float* up, const float* from) { round_trip<F16>(down, up, from); }
extern "C" __global__ void bfloat16(u16* down, float* up, const float* from) { round_trip<BF16>(down, up, from); }
"""


def numbers(dtype) -> np.ndarray:
    """Return numbers of a 16-bit type, the midpoints between them, their float32 neighbours, infinities and NaN."""
    bits = np.concatenate([rng().integers(0, 1 << 15, 1000), np.arange(40), [0x7BFF, 0x7C00, 0x7F7F, 0x7F80, 0x3F80]])
    every_bit = np.array([0x7FFFFFFF, 0x7F800001], np.uint32).view(np.float32)  # NaN whose bits overflow if rounded
    low, high = ((bits + k).astype(np.uint16).view(dtype).astype(np.float64) for k in (0, 1))
    between, low = ((low + high) / 2).astype(np.float32), low.astype(np.float32)
    near = [between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(np.inf))]
    found = np.concatenate([low, *near, every_bit, [np.inf, np.nan, 65520, 65519.99, 3.4e38]])
    found = np.where(np.abs(found) < np.finfo(np.float32).tiny, 0, found)  # CuPy flushes subnormal float32
    return np.resize(np.concatenate([found, -found]), 1 << 13).astype(np.float32)


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_roundings(arch, name, dtype, compile_cuda):
    kernel = compile_cuda(cuda_sources.source("identity") + ROUND_TRIP, arch, cuda_sources.OPTIONS, resources=False)[
        name
    ]
    device, values = Device(), numbers(dtype)
    down, up = device.empty(values.size, np.uint16), device.empty(values.size, np.float32)
    device.launch(kernel.kernel, values.size // 256, 256, [down, up, values])
    with np.errstate(all="ignore"):
        want = values.astype(dtype)
    wrong = (down != want.view(np.uint16)) & ~(np.isnan(want) & np.isnan(down.view(dtype)))
    assert not wrong.any(), [(values[i], down[i], want[i]) for i in np.flatnonzero(wrong)[:3]]
    assert np.array_equal(up, want.astype(np.float32), equal_nan=True)
    assert np.isinf(up).any()
    assert np.isnan(up).any()
