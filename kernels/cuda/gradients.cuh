// Parts of the backward kernels. g = dz is the gradient with respect to z, the activation's argument, and
// xhat = (x - mean) * rstd:
//
//   dx = weight * rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n) = ((x - centre) * slope + g + offset) * scale
//
// slope and offset contain the two sums, and are 0 with running statistics. z is computed again from x and the residual,
// unless the sign bit of each element is read instead.

template <class A, int N> struct Gradient {
  A rstd[N], slope[N], offset[N];
};

// A block's per-channel tables, in shared memory.
template <class L> struct BackwardShared {
  Shared<L> sums;
  Affine<typename L::A, L::MAX_CHANNELS> affine;
  Gradient<typename L::A, L::MAX_CHANNELS> gradient;
  double mean[L::MAX_CHANNELS], rstd[L::MAX_CHANNELS];
};

struct Statistics {
  Parameter weight, bias, mean, var;
  double eps;
};

template <class L>
DEVICE void load_channels(const Tile<L>& tile, const Statistics& given, BackwardShared<L>& shared) {
  const u32 place = threadIdx.x;
  const i64 channel = tile.channel(place);
  if (place < tile.strip_channels() && channel < tile.g.channels) {
    const i64 statistic = tile.statistic(channel);
    const double mean = given.mean.get(statistic), rstd = rsqrt(given.var.get(statistic) + given.eps);
    shared.affine.set(place, mean, rstd, given.weight.get(channel, 1.), given.bias.get(channel, 0.));
    shared.gradient.rstd[place] = (typename L::A)rstd;
    shared.mean[place] = mean;
    shared.rstd[place] = rstd;
  }
  __syncthreads();
}

// Sources of dz: dy alone (no activation), or dy with z computed from x, with z computed from x and the residual, or with
// a bit of the mask.
enum Source { DY, FROM_X, FROM_RESIDUAL, FROM_MASK };

template <class L, int FROM> struct Operands {
  typename L::V x, dy;
  u32 bits;
  Selected<L> selected;
};
template <class L> struct Operands<L, FROM_RESIDUAL> {
  typename L::V x, dy, residual;
  u32 bits;
  Selected<L> selected;
};

template <class L, int FROM> struct Upstream {
  typedef typename L::V V;
  typedef typename L::A A;
  const V *x, *dy, *residual;
  const u8* mask;
  A parameter;

  // Return x - centre, and dz. Both are 0 for elements that do not count, whatever x and dy hold there.
  __device__ __forceinline__ A centred(const OwnAffine<L>& affine, const Operands<L, FROM>& at, int j) const {
    return at.selected[j] ? affine.centred(j, at.x[j]) : A(0);
  }
  __device__ __forceinline__ A dz(const OwnAffine<L>& affine, const Operands<L, FROM>& at, int j, A centred) const {
    return at.selected[j] ? dz_of_any(affine, at, j, centred) : A(0);
  }
  __device__ __forceinline__ A dz_of_any(const OwnAffine<L>& affine, const Operands<L, FROM>& at, int j, A centred) const {
    const A dy = at.dy[j];
    if constexpr (FROM == DY) return dy;
    if constexpr (FROM == FROM_MASK) return at.bits >> j & 1u ? dy : Activation::dropped(dy, parameter);
    A z = affine.z(j, centred);
    if constexpr (FROM == FROM_RESIDUAL) z += at.residual[j];
    return Activation::gradient(z, dy, parameter);
  }

  // Load the operands from global memory.
  template <bool ONCE> __device__ __forceinline__ Operands<L, FROM> load(i64 offset, const Selected<L>& selected) const {
    Operands<L, FROM> at;
    at.selected = selected;
    at.x = ONCE ? load_once(x + offset) : x[offset];
    at.dy = ONCE ? load_once(dy + offset) : dy[offset];
    if constexpr (FROM == FROM_RESIDUAL) at.residual = ONCE ? load_once(residual + offset) : residual[offset];
    if constexpr (FROM == FROM_MASK) at.bits = mask[offset];
    return at;
  }
};

template <class L, int FROM> struct StagedUpstream {
  typedef typename L::V V;
  Upstream<L, FROM> from;
  Staged<V> x, dy, residual;

  __device__ __forceinline__ StagedUpstream(const Upstream<L, FROM>& from, const Geometry& g, unsigned char* memory)
      : from(from) {
    const u32 step = THREADS / g.lanes, slots = (g.share + step - 1) / step * THREADS;
    x.slots = (V*)memory;
    dy.slots = x.slots + slots;
    residual.slots = dy.slots + slots;
  }
  __device__ __forceinline__ void copy(u32 i, i64 offset) const {
    x.copy(i, from.x + offset);
    dy.copy(i, from.dy + offset);
    if constexpr (FROM == FROM_RESIDUAL) residual.copy(i, from.residual + offset);
  }
  __device__ __forceinline__ Operands<L, FROM> get(u32 i, i64 offset, const Selected<L>& selected) const {
    Operands<L, FROM> at;
    at.selected = selected;
    at.x = x.get(i, offset);
    at.dy = dy.get(i, offset);
    if constexpr (FROM == FROM_RESIDUAL) at.residual = residual.get(i, offset);
    if constexpr (FROM == FROM_MASK) at.bits = from.mask[offset];
    return at;
  }
};

// A thread's sums of g and of g * (x - centre) * rstd. rstd stays in shared memory, because some kernels have no registers
// left for it.
template <class L> struct BackwardSums {
  typedef typename L::A A;
  const A* rstd;
  Sum<L> dz, dz_xhat;
  u32 pending = 0;

  __device__ __forceinline__ BackwardSums(const Tile<L>& tile, const Gradient<A, L::MAX_CHANNELS>& table)
      : rstd(table.rstd + tile.own()) {}
  __device__ __forceinline__ void add(int j, A g, A centred) {
    dz.part[j] += g;
    dz_xhat.part[j] = fma(g, centred * rstd[L::COLUMNS ? j : 0], dz_xhat.part[j]);
  }
  __device__ __forceinline__ void next() {
    if (++pending == CHAIN) pending = 0, dz.flush(), dz_xhat.flush();
  }
  // Write the block's sums to shared.own.
  __device__ __forceinline__ void finish(const Tile<L>& tile, Shared<L>& shared) {
    dz.flush();
    dz_xhat.flush();
    const double first = block_sum(dz.total, tile.g.lanes, shared.scratch);
    const double second = block_sum(dz_xhat.total, tile.g.lanes, shared.scratch);
    if (threadIdx.x < tile.strip_channels()) shared.own.first[threadIdx.x] = first, shared.own.second[threadIdx.x] = second;
  }
};

struct TwoSums {
  double dz, dz_xhat;
};

// Add up the sums of a strip's blocks, and correct for the difference between mean and centre:
//
//   sum(g * xhat) = sum(g * (x - centre) * rstd) - (mean - centre) * rstd * sum(g)
//
// Thread t returns the sums of the channel at place t; other threads return zeros.
template <class L, class Peers>
DEVICE TwoSums merge_sums(const Tile<L>& tile, const Peers& peers, BackwardShared<L>& shared) {
  const u32 width = tile.strip_channels(), place = threadIdx.x & (width - 1);
  double dz, dz_xhat;
  if (tile.g.blocks == 1) {
    dz = peers.first(0, place);
    dz_xhat = peers.second(0, place);
  } else {
    DoubleSum first[1], second[1];
#pragma unroll 8  // eight loads at a time
    for (u32 r = threadIdx.x / width; r < tile.g.blocks; r += THREADS / width) {
      first[0].add(peers.first(r, place));
      second[0].add(peers.second(r, place));
    }
    dz = block_sum(first, width, shared.sums.scratch);
    dz_xhat = block_sum(second, width, shared.sums.scratch);
  }
  if (threadIdx.x >= width || tile.channel(place) >= tile.g.channels) return {};
  const double rest = shared.mean[place] - (double)shared.affine.centre[place];
  return {dz, dz_xhat - rest * shared.rstd[place] * dz};
}

// Write slope and offset of a channel to the table:
//
//   slope = -sum(g * xhat) * rstd / n,  offset = -sum(g) / n - slope * (mean - centre)
template <class L>
DEVICE void set_gradient(BackwardShared<L>& shared, u32 place, const TwoSums& sums, double count) {
  typedef typename L::A A;
  const double slope = -sums.dz_xhat * shared.rstd[place] / count;
  const double rest = shared.mean[place] - (double)shared.affine.centre[place];
  shared.gradient.slope[place] = (A)slope;
  shared.gradient.offset[place] = (A)(-sums.dz / count - slope * rest);
}

template <class L> struct OwnGradient {
  typedef typename L::A A;
  A slope[L::CHANNELS], offset[L::CHANNELS];
  __device__ __forceinline__ OwnGradient(const Tile<L>& tile, const Gradient<A, L::MAX_CHANNELS>& table) {
    if (!tile.count) return;
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      slope[j] = table.slope[tile.own() + j];
      offset[j] = table.offset[tile.own() + j];
    }
  }
  __device__ __forceinline__ A dx(int j, A centred, A g, A scale) const {
    const int k = L::COLUMNS ? j : 0;
    return (fma(centred, slope[k], g) + offset[k]) * scale;
  }
};
