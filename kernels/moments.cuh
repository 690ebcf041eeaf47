// Mean and variance of a block's share, and the merge of shares (Chan, Golub & LeVeque 1983).
//
// One sweep of deviations from a shift near the mean: in the tensor's precision, because the deviations are small. Where
// the shift turns out bad, or the squares leave the range, the sweep is repeated with a better shift or scale.

constexpr float SCALE_UP = 1.2089258196146292e24f;    // 2^80
constexpr float SCALE_DOWN = 8.271806125530277e-25f;  // 2^-80
constexpr double LARGEST = 1e38, SMALLEST = 1e-30;    // of sums and means of squares in float
constexpr int SAMPLES = 8;

// d = (x - centre) * scale for each channel of a strip, in shared memory. The blocks of a strip tell each other their
// means as differences from the channel's first element, the origin, so that large means cost no accuracy.
template <class L> struct Shift {
  typedef typename L::A A;
  A centre[L::MAX_CHANNELS], scale[L::MAX_CHANNELS], origin[L::MAX_CHANNELS];

  // The mean of some vectors spread over the block's share. Called by the first thread of each lane.
  __device__ __forceinline__ void sample(const Tile<L>& tile, const typename L::V* x) {
    A sum[L::CHANNELS], first[L::CHANNELS];
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) sum[j] = first[j] = 0;
    if (tile.count) {
      const typename L::V v = x[tile.origin()];
#pragma unroll
      for (int j = 0; j < L::CHANNELS; ++j) first[j] = v[j];
#pragma unroll
      for (int k = 0; k < SAMPLES; ++k) {
        const typename L::V v = x[tile.seek((u32)((u64)tile.length * k / SAMPLES)).offset];
#pragma unroll
        for (int j = 0; j < L::VEC; ++j) sum[L::COLUMNS ? j : 0] += v[j] * A(1. / (SAMPLES * L::PER_POSITION));
      }
    }
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      centre[tile.own() + j] = sum[j];
      scale[tile.own() + j] = 1;
      origin[tile.own() + j] = first[j];
    }
  }

  // Whether the sums of a sweep lose accuracy, because the centre is more than one sd away from the mean or the squares
  // leave float's range. The shift is changed then.
  __device__ __forceinline__ bool improve(u32 place, double n, double sum, double squares) {
    const A c = centre[place], s = scale[place];
    if (sizeof(A) == 4 && s == 1) {
      if (squares > LARGEST) return scale[place] = SCALE_DOWN, true;
      const bool small = squares < n * SMALLEST && (sum != 0 || squares != 0 || c != 0);
      if (small && fabs(c) < 1e-8f) return scale[place] = SCALE_UP, true;
    }
    const double far = sum / n;
    const A better = (A)(c + far / s);
    if (far * far > squares / n - far * far && better != c) return centre[place] = better, true;
    return false;
  }
};

// A thread's sums of deviations and of their squares.
template <class L> struct Deviations {
  typedef typename L::A A;
  A scale[L::CHANNELS], offset[L::CHANNELS];
  Sum<L> sum, squares;
  u32 pending = 0;

  __device__ __forceinline__ Deviations(const Tile<L>& tile, const Shift<L>& shift) {
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      scale[j] = shift.scale[tile.own() + j];
      offset[j] = -shift.centre[tile.own() + j] * scale[j];
    }
  }

  __device__ __forceinline__ void add(const typename L::V& v) {
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) {
      const A d = fma(v[j], scale[L::COLUMNS ? j : 0], offset[L::COLUMNS ? j : 0]);
      sum.part[j] += d;
      squares.part[j] = fma(d, d, squares.part[j]);
    }
    if (++pending == CHAIN) flush();
  }
  __device__ __forceinline__ void flush() {
    pending = 0;
    sum.flush();
    squares.flush();
  }
};

// Leaves the mean less the origin (first) and the sum of squared deviations (second) of each channel in shared.own.
// sweep(deviations) adds each of the thread's vectors.
template <class L, class Sweep>
DEVICE void block_moments(const Tile<L>& tile, const typename L::V* x, Shared<L>& shared, Shift<L>& shift, Sweep sweep) {
  if (tile.row == 0) shift.sample(tile, x);
  for (int attempt = 0;; ++attempt) {
    __syncthreads();
    Deviations<L> d(tile, shift);
    sweep(d);
    d.flush();
    block_sum(d.sum.total, tile.g.lanes, shared.scratch);
    block_sum(d.squares.total, tile.g.lanes, shared.scratch);
    if (tile.row == 0) shared.own.set(tile, d.sum.total, d.squares.total);
    __syncthreads();
    bool again = false;
    const u32 place = threadIdx.x;
    if (place < tile.strip_channels()) {
      const double n = tile.elements_of(tile.rank), sum = shared.own.first[place], squares = shared.own.second[place];
      const double scale = shift.scale[place], m2 = squares - sum * (sum / n);
      shared.own.first[place] = ((double)shift.centre[place] - shift.origin[place]) + sum / n / scale;
      shared.own.second[place] = (m2 < 0 ? 0 : m2) / (scale * scale);
      again = shift.improve(place, n, sum, squares);
    }
    if (!__syncthreads_or(again) || attempt == 3) return;
  }
}

struct Moments {
  double mean, var;
};

// Merges the shares of a strip's blocks; thread t gets the channel at place t modulo the strip's channels.
template <class L, class Peers>
DEVICE Moments merge_moments(const Tile<L>& tile, const Peers& peers, const Shift<L>& shift, double* scratch) {
  const u32 width = tile.strip_channels(), place = threadIdx.x & (width - 1);
  const double n = tile.elements();
  if (tile.g.blocks == 1) return {shift.origin[place] + peers.first(0, place), peers.second(0, place) / n};
  double mean[1] = {0}, m2[1] = {0};
  for (u32 r = threadIdx.x / width; r < tile.g.blocks; r += THREADS / width)
    mean[0] += tile.elements_of(r) * peers.first(r, place);
  block_sum(mean, width, scratch);
  mean[0] /= n;
  for (u32 r = threadIdx.x / width; r < tile.g.blocks; r += THREADS / width) {
    const double d = peers.first(r, place) - mean[0];
    m2[0] += peers.second(r, place) + tile.elements_of(r) * d * d;
  }
  block_sum(m2, width, scratch);
  return {shift.origin[place] + mean[0], m2[0] / n};
}
