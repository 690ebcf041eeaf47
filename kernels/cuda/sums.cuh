// Sums in a fixed order, which do not depend on timing: short chains in type A, the rest in double.

constexpr u32 CHAIN = 16;  // additions in a row in type A

// A thread's sums for each of its channels.
template <class L> struct Sum {
  typedef typename L::A A;
  A part[L::VEC];
  double total[L::CHANNELS];

  __device__ __forceinline__ Sum() {
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) part[j] = 0;
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) total[j] = 0;
  }

  // Add the parts to the totals and reset them. In rows all parts belong to one channel and are added up pairwise first.
  __device__ __forceinline__ void flush() {
    if constexpr (!L::COLUMNS) {
#pragma unroll
      for (int half = L::VEC / 2; half; half /= 2)
#pragma unroll
        for (int j = 0; j < half; ++j) part[j] += part[j + half];
    }
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) total[j] += part[j];
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) part[j] = 0;
  }
};

// Add up v over the threads with the same threadIdx.x % period; period is a power of two. Thread t < period * N returns
// the sum of v[t % N] over the threads with threadIdx.x % period == t / N. Other threads return 0 and add nothing, because
// most GPUs are slow in double precision.
// scratch: N * WARPS * min(period, 32) doubles.
template <int N> DEVICE double block_sum(double (&v)[N], u32 period, double* scratch) {
  const u32 t = threadIdx.x;
  for (u32 distance = 16; distance >= period; distance >>= 1)
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += __shfl_xor_sync(0xffffffffu, v[j], distance);
  const u32 lanes = period < 32 ? period : 32, width = period * N, size = WARPS * lanes * N;
  __syncthreads();  // the scratch may still be in use
  if ((t & 31) < lanes)
#pragma unroll
    for (int j = 0; j < N; ++j) scratch[((t >> 5) * lanes + (t & 31)) * N + j] = v[j];
  __syncthreads();
  double sum = 0;
  if (t < width) {
#pragma unroll 4  // more would need more registers than some kernels have
    for (u32 k = 0; k < WARPS; ++k)
      if (period <= 32 || k * width + t < size) sum += scratch[k * width + t];
  }
  return sum;
}

// Return the sum of v over all threads, in all of them.
DEVICE double block_sum_for_all(double v, double* scratch) {
  double one[1] = {v};
  const double sum = block_sum(one, 1, scratch);
  if (threadIdx.x == 0) scratch[WARPS] = sum;
  __syncthreads();
  return scratch[WARPS];
}

// A block's partial results: two numbers for each channel of its strip.
template <class L> struct Partials {
  double first[L::MAX_CHANNELS], second[L::MAX_CHANNELS];
};

template <class L> struct Shared {
  double scratch[L::COLUMNS ? WARPS * (L::MAX_CHANNELS > 32 ? L::MAX_CHANNELS : 32) : 2 * WARPS];
  Partials<L> own;
};
