// Sums that do not depend on timing: fixed order everywhere, short chains in the tensor's precision, the rest in double.

constexpr u32 CHAIN = 16;  // additions in a row in the precision of the tensor

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

  // Moves the parts to the totals; rows fold their lanes pairwise.
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

// Adds up v over the threads that are equal modulo `period`, a power of two; each of them gets the sum.
// scratch: N doubles for each of max(WARPS * period, THREADS if period > 32).
template <int N> DEVICE void block_sum(double (&v)[N], u32 period, double* scratch) {
  const u32 t = threadIdx.x;
  for (u32 distance = 16; distance >= period; distance >>= 1)
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += __shfl_xor_sync(0xffffffffu, v[j], distance);
  const u32 lanes = period < 32 ? period : 32;
  __syncthreads();  // the scratch may still be in use
  if ((t & 31) < lanes)
#pragma unroll
    for (int j = 0; j < N; ++j) scratch[((t >> 5) * lanes + (t & 31)) * N + j] = v[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) {
    double sum = 0;
    for (u32 k = t & (period - 1); k < WARPS * lanes; k += period) sum += scratch[k * N + j];
    v[j] = sum;
  }
}

// What a block finds out about each channel of its strip: two doubles.
template <class L> struct Partials {
  double first[L::MAX_CHANNELS], second[L::MAX_CHANNELS];

  // Called by the first thread of each lane.
  __device__ __forceinline__ void set(const Tile<L>& tile, const double (&a)[L::CHANNELS], const double (&b)[L::CHANNELS]) {
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      first[tile.own() + j] = a[j];
      second[tile.own() + j] = b[j];
    }
  }
};

template <class L> struct Shared {
  double scratch[WARPS * (!L::COLUMNS || L::MAX_CHANNELS > 32 ? L::MAX_CHANNELS : 32)];
  Partials<L> own;
};
