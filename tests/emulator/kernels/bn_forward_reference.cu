// A reference kernel in CUDA C++: the training forward pass for NCHW, written as plainly as possible.
//
// One block computes one channel. x has the shape [n, c, s]. VEC divides s, so a vector of VEC elements lies in one
// row. Three passes compute mean, variance and output. The statistics are double, so that large means lose no digits
// and squares do not overflow. STAGED keeps the channel in dynamic shared memory: x is then read from global memory
// once, and a thread reads back only what it stored. A null weight stands for ones, a null bias for zeros. If y is
// null, only the statistics are computed.

typedef unsigned short u16;
typedef unsigned int u32;

struct F32 {
  typedef float Storage;
  static __device__ float up(float v) { return v; }
  static __device__ float down(float v) { return v; }
};

struct F16 {
  typedef u16 Storage;
  static __device__ float up(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
  static __device__ u16 down(float f) { u16 v; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f)); return v; }
};

struct BF16 {
  typedef u16 Storage;
  static __device__ float up(u16 v) { return __uint_as_float((u32)v << 16); }
  static __device__ u16 down(float f) {
    u32 bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
};

template <class T, int VEC> struct alignas(VEC * sizeof(typename T::Storage)) Vector {
  typename T::Storage at[VEC];
};

extern __shared__ __align__(16) unsigned char staging[];

// Return the sum over the block in each thread, always added in the same order.
static __device__ double block_sum(double value, double* partials) {
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // partials of the previous sum may still be read
  if ((threadIdx.x & 31) == 0) partials[threadIdx.x >> 5] = value;
  __syncthreads();
  const int lane = threadIdx.x & 31;
  value = lane < blockDim.x >> 5 ? partials[lane] : 0.;
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <class T, int VEC, bool STAGED>
static __device__ void forward(const void* x_, void* y_, const float* weight, const float* bias, double* save_mean,
                               double* save_var, int n, int c, int s, double eps) {
  typedef Vector<T, VEC> V;
  const V* x = (const V*)x_;
  V* y = (V*)y_;
  V* stage = (V*)staging;
  __shared__ double partials[32];

  const int channel = blockIdx.x;
  const int row = s / VEC;
  const int vectors = n * row;
  const double count = (double)n * s;
  auto place = [&](int v) { return ((long long)(v / row) * c + channel) * row + v % row; };

  double sum = 0.;
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    const V loaded = x[place(v)];
    if (STAGED) stage[v] = loaded;
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += T::up(loaded.at[i]);
  }
  const double mean = block_sum(sum, partials) / count;

  double squares = 0.;
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    const V loaded = STAGED ? stage[v] : x[place(v)];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const double deviation = T::up(loaded.at[i]) - mean;
      squares = fma(deviation, deviation, squares);
    }
  }
  const double var = block_sum(squares, partials) / count;
  if (threadIdx.x == 0) {
    save_mean[channel] = mean;
    save_var[channel] = var;
  }
  if (!y) return;

  const float scale = (weight ? weight[channel] : 1.f) * (float)(1. / sqrt(var + eps));
  const float offset = bias ? bias[channel] : 0.f;
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    const V loaded = STAGED ? stage[v] : x[place(v)];
    V out;
#pragma unroll
    for (int i = 0; i < VEC; ++i) out.at[i] = T::down(fmaf((float)(T::up(loaded.at[i]) - mean), scale, offset));
    y[place(v)] = out;
  }
}

#define KERNEL(NAME, T, VEC, STAGED)                                                                              \
  extern "C" __global__ void __launch_bounds__(256) NAME(                                                         \
      const void* x, void* y, const float* weight, const float* bias, double* save_mean, double* save_var, int n, \
      int c, int s, double eps) {                                                                                 \
    forward<T, VEC, STAGED>(x, y, weight, bias, save_mean, save_var, n, c, s, eps);                               \
  }

KERNEL(bn_forward_f32_v1, F32, 1, false)
KERNEL(bn_forward_f32_v4, F32, 4, false)
KERNEL(bn_forward_f32_v4_staged, F32, 4, true)
KERNEL(bn_forward_f16_v1, F16, 1, false)
KERNEL(bn_forward_f16_v2, F16, 2, false)
KERNEL(bn_forward_f16_v8, F16, 8, false)
KERNEL(bn_forward_f16_v8_staged, F16, 8, true)
KERNEL(bn_forward_bf16_v1, BF16, 1, false)
KERNEL(bn_forward_bf16_v8, BF16, 8, false)
