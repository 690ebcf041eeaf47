// Mean and variance of a block's share, and the merge of shares (Chan, Golub & LeVeque 1983):
//
//   d = x - shift,  mean = shift + sum(d) / n,  m2 = sum(d^2) - sum(d)^2 / n,  var = m2 / n
//
// One sweep adds up d and d^2 in type A, which is accurate because the shift is near the mean. If the shift turns out bad,
// or the squares leave the range of float, the sweep is repeated with a better shift or scale.

constexpr float SCALE_UP = 1.2089258196146292e24f;    // 2^80
constexpr float SCALE_DOWN = 8.271806125530277e-25f;  // 2^-80
constexpr double LARGEST = 1e38, SMALLEST = 1e-30;    // limits of a sum of squares, and of their mean, in float
constexpr int SAMPLES = 8;

// Centre and scale of the deviations d = (x - centre) * scale, and the origin, for each channel of a strip, in shared
// memory.
//
// Blocks exchange their means as differences from the origin, one of the channel's elements, so that large means cost no
// accuracy. In double precision the origin is the smallest of several elements, so that an element far from the mean costs
// none either. With a mask, each block uses its own centre as its origin.
template <class L> struct Shift {
  typedef typename L::A A;
  static constexpr u32 ORIGINS = sizeof(A) == 4 ? 1 : SAMPLES;  // candidates; 1 for float: doubles keep all its digits
  A centre[L::MAX_CHANNELS], scale[L::MAX_CHANNELS], origin[L::MAX_CHANNELS];

  // Set the centre to the mean of SAMPLES vectors spread over the block's share, one for each of the first SAMPLES rows of
  // threads; for ragged rows, of SAMPLES elements. Choose the origin. All threads call this.
  __device__ __forceinline__ void sample(const Tile<L>& tile, const typename L::V* x, double* scratch) {
    const u32 width = tile.strip_channels(), place = threadIdx.x;
    A *samples = (A*)scratch, *origins = samples + SAMPLES * width;  // [SAMPLES, width], [ORIGINS, width]
    if (tile.row < SAMPLES) {
      A sum[L::CHANNELS], first[L::CHANNELS];
#pragma unroll
      for (int j = 0; j < L::CHANNELS; ++j) sum[j] = first[j] = 0;
      if constexpr (L::RAGGED) {
        const typename L::T::Storage* elements = (const typename L::T::Storage*)x;
        const i64 all = (i64)tile.elements(), own = (i64)tile.elements_of(tile.rank);
        const i64 spread = tile.elements_before((i64)tile.rank * tile.g.share) + own * tile.row / SAMPLES;
        sum[0] = L::T::up(elements[tile.element(spread < all ? spread : all - 1)]) * A(1. / SAMPLES);
        first[0] = L::T::up(elements[tile.element(all * (tile.row < ORIGINS ? tile.row : 0) / ORIGINS)]);
      } else if (tile.active()) {
        const typename L::V v = x[tile.seek((u32)((u64)tile.length * tile.row / SAMPLES)).offset];
#pragma unroll
        for (int j = 0; j < L::VEC; ++j) sum[L::COLUMNS ? j : 0] += v[j] * A(1. / (SAMPLES * L::PER_POSITION));
        if (tile.row < ORIGINS) {
          const typename L::V v = x[tile.in_strip(tile.g.positions * tile.row / ORIGINS)];
#pragma unroll
          for (int j = 0; j < L::CHANNELS; ++j) first[j] = v[j];
        }
      }
#pragma unroll
      for (int j = 0; j < L::CHANNELS; ++j) {
        samples[tile.row * width + tile.own() + j] = sum[j];
        if (tile.row < ORIGINS) origins[tile.row * width + tile.own() + j] = first[j];
      }
    }
    __syncthreads();
    if (place < width) {
      A sum = 0;
#pragma unroll
      for (int k = 0; k < SAMPLES; ++k) sum += samples[k * width + place];
      A least = origins[place];
#pragma unroll
      for (u32 k = 1; k < ORIGINS; ++k)
        if (fabs(origins[k * width + place]) < fabs(least)) least = origins[k * width + place];
      centre[place] = sum;
      scale[place] = 1;
      origin[place] = least;
    }
  }

  // Set the centre to the mean of the sampled elements that the mask keeps; to 0 if it keeps none: then the first sweep
  // finds a better one. The first thread of each lane calls this.
  __device__ __forceinline__ void sample(const Tile<L>& tile, const typename L::V* x, const Selection<L>& selection) {
    A sum[L::CHANNELS];
    u32 n = 0;
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) sum[j] = 0;
    for (int k = 0; k < SAMPLES && tile.count; ++k) {
      const u32 position = (u32)((u64)tile.length * k / SAMPLES);
      const Selected<L> selected = selection.at(tile, position);
      const typename L::V v = x[tile.seek(position).offset];
#pragma unroll
      for (int j = 0; j < L::VEC; ++j)
        if (selected[j]) sum[L::COLUMNS ? j : 0] += v[j] * A(1. / (SAMPLES * L::PER_POSITION));
      n += selected.count();
    }
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      centre[tile.own() + j] = n ? sum[j] * (A(SAMPLES * L::PER_POSITION) / A(n)) : 0;
      scale[tile.own() + j] = 1;
      origin[tile.own() + j] = 0;
    }
  }

  // Change the centre or the scale if the sums of a sweep are inaccurate: the centre is more than one standard deviation
  // away from the mean, or the squares left the range of float. Return whether one has changed. far = sum / n.
  __device__ __forceinline__ bool improve(u32 place, double n, double sum, double squares, double far) {
    const A c = centre[place], s = scale[place];
    if (sizeof(A) == 4 && s == 1) {
      if (squares > LARGEST) return scale[place] = SCALE_DOWN, true;
      const bool small = squares < n * SMALLEST && (sum != 0 || squares != 0 || c != 0);
      if (small && fabs(c) < 1e-8f) return scale[place] = SCALE_UP, true;
    }
    const A better = (A)(c + far * unscale(place));
    if (2 * far * sum > squares && better != c) return centre[place] = better, true;
    return false;
  }

  // Return 1 / scale, a power of two.
  __device__ __forceinline__ double unscale(u32 place) const { return sizeof(A) == 4 ? A(1) / scale[place] : A(1); }
};

// A thread's sums of deviations and of their squares.
template <class L> struct Deviations {
  typedef typename L::A A;
  A scale[L::CHANNELS], offset[L::CHANNELS];
  Sum<L> sum, squares;
  u32 pending = 0;
  u32 count = 0;  // number of elements that the mask keeps

  __device__ __forceinline__ Deviations(const Tile<L>& tile, const Shift<L>& shift) {
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      scale[j] = shift.scale[tile.own() + j];
      offset[j] = -shift.centre[tile.own() + j] * scale[j];
    }
  }

  __device__ __forceinline__ void add(const typename L::V& v, const Selected<L>& selected = {}) {
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) {
      const A d = selected[j] ? fma(v[j], scale[L::COLUMNS ? j : 0], offset[L::COLUMNS ? j : 0]) : A(0);
      sum.part[j] += d;
      squares.part[j] = fma(d, d, squares.part[j]);
    }
    if constexpr (L::MASKED) count += selected.count();
    if (++pending == CHAIN) flush();
  }
  __device__ __forceinline__ void flush() {
    pending = 0;
    sum.flush();
    squares.flush();
  }
};

// Write mean - origin (first) and the sum of (x - mean)^2 (second) of each channel's share to shared.own. sweep(deviations)
// adds each of the thread's vectors. Return the number of elements that each channel has in the share.
template <class L, class Sweep>
DEVICE double block_moments(const Tile<L>& tile, const typename L::V* x, Shared<L>& shared, Shift<L>& shift, Sweep sweep,
                            const Selection<L>& selection = {}) {
  if constexpr (!L::MASKED) shift.sample(tile, x, shared.scratch);
  else if (tile.row == 0) shift.sample(tile, x, selection);
  for (int attempt = 0;; ++attempt) {
    __syncthreads();
    Deviations<L> d(tile, shift);
    sweep(d);
    d.flush();
    const double sum = block_sum(d.sum.total, tile.g.lanes, shared.scratch);
    const double squares = block_sum(d.squares.total, tile.g.lanes, shared.scratch);
    double n = tile.elements_of(tile.rank);
    if constexpr (L::MASKED) n = block_sum_for_all(tile.lane ? 0. : d.count, shared.scratch);  // lane 0 always has channels
    bool again = false;
    const u32 place = threadIdx.x;
    if (place < tile.strip_channels()) {
      const bool any = !(L::MASKED || L::RAGGED) || n > 0;
      if (L::MASKED) shift.origin[place] = shift.centre[place];
      const double mean = any ? sum / n : 0, unscale = shift.unscale(place), m2 = squares - sum * mean;
      shared.own.first[place] = ((double)shift.centre[place] - shift.origin[place]) + mean * unscale;
      shared.own.second[place] = (m2 < 0 ? 0 : m2) * (unscale * unscale);
      again = any && shift.improve(place, n, sum, squares, mean);
    }
    if (!__syncthreads_or(again) || attempt == 3) return n;
  }
}

struct Moments {
  double mean, var;
};

// Counts and origins of a strip's shares, which the merge needs beside their partial results. Without a mask, counts
// follow from the shape, and all shares have the same origin.
template <class L, bool MASKED = L::MASKED> struct Shares {
  const Tile<L>& tile;
  __device__ __forceinline__ Shares(const Tile<L>& tile, double* = nullptr) : tile(tile) {}
  __device__ __forceinline__ void set(double, const Shift<L>&) const {}
  __device__ __forceinline__ double of(u32 rank) const { return tile.elements_of(rank); }
  __device__ __forceinline__ double all(double*) const { return tile.elements(); }
  __device__ __forceinline__ u32 first() const { return 0; }
  __device__ __forceinline__ double origin(const Shift<L>& shift, u32, u32 place) const { return shift.origin[place]; }
  template <class Peers> __device__ __forceinline__ double mean(const Peers& peers, double, u32 r, u32 place) const {
    return peers.first(r, place);
  }
};

// With a mask, each block has counted its elements and has its own origin. It publishes both before its partial results.
template <class L> struct Shares<L, true> {
  const Tile<L>& tile;
  double* counted;  // [strips, blocks], after the partial results
  double* origins;  // [strips, blocks, strip_channels]
  __device__ __forceinline__ Shares(const Tile<L>& tile, double* partials) : tile(tile) {
    const i64 blocks = tile.g.blocks, all = tile.g.groups * blocks, before = tile.strip_of_all() * blocks;
    const i64 width = tile.strip_channels();
    counted = partials + all * 2 * width + before;
    origins = partials + all * (2 * width + 1) + before * width;
  }
  __device__ __forceinline__ void set(double n, const Shift<L>& shift) const {
    const u32 place = threadIdx.x, width = tile.strip_channels();
    if (place == 0) counted[tile.rank] = n;
    if (place < width) origins[(i64)tile.rank * width + place] = shift.origin[place];
  }
  __device__ __forceinline__ double of(u32 rank) const { return __ldcg(counted + rank); }
  __device__ __forceinline__ double all(double* scratch) const {
    double n = 0;
    for (u32 r = threadIdx.x; r < tile.g.blocks; r += THREADS) n += of(r);
    return block_sum_for_all(n, scratch);
  }
  // first: the first share with elements. origin: the origin of share r. mean: its mean minus another origin.
  __device__ __forceinline__ u32 first() const {
    u32 r = 0;
    while (r + 1 < tile.g.blocks && of(r) == 0) ++r;
    return r;
  }
  __device__ __forceinline__ double origin(const Shift<L>&, u32 r, u32 place) const { return origin_of(r, place); }
  template <class Peers> __device__ __forceinline__ double mean(const Peers& peers, double origin, u32 r, u32 place) const {
    return (origin_of(r, place) - origin) + peers.first(r, place);
  }
  __device__ __forceinline__ double origin_of(u32 r, u32 place) const {
    return __ldcg(origins + (i64)r * tile.strip_channels() + place);
  }
};

// Merge the shares of a strip's blocks. Thread t returns the moments of the channel at place t; other threads return zeros.
//
//   mean = near + sum_r n_r d_r / n,  var = (sum_r (m2_r + n_r d_r^2) - (sum_r n_r d_r)^2 / n) / n,  d_r = mean_r - near
//
// near is the mean of one share of n_0 elements, so that the terms that cancel are at most n / n_0 times the variance.
template <class L, class Peers>
DEVICE Moments merge_moments(const Tile<L>& tile, const Peers& peers, const Shift<L>& shift, double* scratch, double count,
                             const Shares<L>& shares) {
  const u32 width = tile.strip_channels(), place = threadIdx.x & (width - 1);
  const double n = L::MASKED && count == 0 ? 1. : count;  // all sums are zero then
  const u32 first = shares.first();
  const double origin = shares.origin(shift, first, place), near = peers.first(first, place);
  DoubleSum parts[1], squares[1];
  double sum = 0, m2;
  if (tile.g.blocks > 1) {
#pragma unroll 8  // eight loads at a time
    for (u32 r = threadIdx.x / width; r < tile.g.blocks; r += THREADS / width) {
      const double d = shares.mean(peers, origin, r, place) - near, nd = shares.of(r) * d;
      parts[0].add(nd);
      squares[0].add(peers.second(r, place) + nd * d);
    }
    sum = block_sum(parts, width, scratch);
    m2 = block_sum(squares, width, scratch);
  } else {
    m2 = peers.second(0, place);
  }
  if (threadIdx.x >= width) return {};
  const double far = sum / n, left = m2 - sum * far;
  return {origin + (near + far), (left < 0 ? 0 : left) / n};
}
