// Sums in a fixed order, which do not depend on timing: short chains in type A, the rest in a wider type.

constexpr u32 CHAIN = 16;  // additions in a row in type A

// A sum in double precision.
struct DoubleSum {
  double all = 0;
  __device__ __forceinline__ void add(double v) { all += v; }
  __device__ __forceinline__ void add(const DoubleSum& other) { all += other.all; }
  __device__ __forceinline__ DoubleSum from(u32 distance) const {
    DoubleSum other;
    other.all = __shfl_xor_sync(0xffffffffu, all, distance);
    return other;
  }
  __device__ __forceinline__ double value() const { return all; }
};

// A sum of floats as a pair high + low of 48 bits, by Knuth's two-sum (The Art of Computer Programming 2, 4.2.2). It takes 7
// instructions in single precision, where one in double precision takes as long as 32 or 64 of them.
struct __align__(8) PairSum {
  float high = 0, low = 0;
  __device__ __forceinline__ void add(float v) {
    const float sum = high + v, added = sum - high;
    low += (high - (sum - added)) + (v - added);  // the rounding error of the sum, exactly
    high = sum;
  }
  __device__ __forceinline__ void add(const PairSum& other) {
    add(other.high);
    low += other.low;
  }
  __device__ __forceinline__ PairSum from(u32 distance) const {
    PairSum other;
    other.high = __shfl_xor_sync(0xffffffffu, high, distance);
    other.low = __shfl_xor_sync(0xffffffffu, low, distance);
    return other;
  }
  // low is NaN once high is not finite
  __device__ __forceinline__ double value() const { return high - high == 0 ? (double)high + low : high; }
};

constexpr bool FAST_DOUBLES = __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000;

// The wider type of sums in type A: doubles, or pairs of floats.
template <class A, bool DOUBLES> struct Wider {
  typedef DoubleSum Type;
};
template <> struct Wider<float, false> {
  typedef PairSum Type;
};

// A thread's sums for each of its channels.
template <class L> struct Sum {
  typedef typename L::A A;
  A part[L::VEC];
  // Pairs would make some kernels of ghost batches spill, and on sm_120 cost ragged rows a block on an SM.
  static constexpr bool DOUBLES = FAST_DOUBLES || L::GROUPED || (L::RAGGED && __CUDA_ARCH__ >= 1200);
  typename Wider<A, DOUBLES>::Type total[L::CHANNELS];

  __device__ __forceinline__ Sum() {
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) part[j] = 0;
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
    for (int j = 0; j < L::CHANNELS; ++j) total[j].add(part[j]);
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) part[j] = 0;
  }
};

// Add up v over the threads with the same threadIdx.x % period; period is a power of two. Thread t < period * N returns
// the sum of v[t % N] over the threads with threadIdx.x % period == t / N. Other threads return 0 and add nothing, because
// most GPUs are slow at double precision.
// scratch: N * WARPS * min(period, 32) sums, of 8 bytes each.
template <class Total, int N> DEVICE double block_sum(Total (&v)[N], u32 period, double* memory) {
  Total* scratch = (Total*)memory;
  const u32 t = threadIdx.x;
  for (u32 distance = 16; distance >= period; distance >>= 1)
#pragma unroll
    for (int j = 0; j < N; ++j) v[j].add(v[j].from(distance));
  const u32 lanes = period < 32 ? period : 32, width = period * N, size = WARPS * lanes * N;
  __syncthreads();  // the scratch may still be in use
  if ((t & 31) < lanes)
#pragma unroll
    for (int j = 0; j < N; ++j) scratch[((t >> 5) * lanes + (t & 31)) * N + j] = v[j];
  __syncthreads();
  if (t >= width) return 0;
  Total sum;
#pragma unroll 4  // more would need more registers than some kernels have
  for (u32 k = 0; k < WARPS; ++k)
    if (period <= 32 || k * width + t < size) sum.add(scratch[k * width + t]);
  return sum.value();
}

// Return the sum of v over all threads, in all of them.
DEVICE double block_sum_for_all(double v, double* scratch) {
  DoubleSum one[1];
  one[0].add(v);
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
