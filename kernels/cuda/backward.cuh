// The backward pass (Ioffe & Szegedy 2015, section 3, after the terms that cancel). With g = dz, the gradient of what the
// activation is given, and xhat = (x - mean) * rstd:
//
//   dbias = sum g,  dweight = sum g * xhat,  dx = weight * rstd * (g - dbias / n - xhat * dweight / n),  dresidual = g
//
// As the kernels compute it: dx = ((x - centre) * slope + g + offset) * scale, where slope and offset carry the two sums;
// with frozen statistics they are zero. z is computed again from x (and the residual), or one bit of a mask stands for it.

template <class A, int N> struct Gradient {
  A rstd[N], slope[N], offset[N];
};

// What a block knows of its channels.
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

// The tensors that dz comes from, and dz itself.
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

  // (x - centre) and dz; what does not count adds nothing to any sum, whatever x and dy hold there.
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

  // From global memory.
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
  __device__ __forceinline__ Operands<L, FROM> get(u32 i, i64 offset) const {
    Operands<L, FROM> at;
    at.x = x.get(i, offset);
    at.dy = dy.get(i, offset);
    if constexpr (FROM == FROM_RESIDUAL) at.residual = residual.get(i, offset);
    if constexpr (FROM == FROM_MASK) at.bits = from.mask[offset];
    return at;
  }
};

// A thread's sums of g and of g * (x - centre) * rstd. rstd stays in shared memory: kept in registers, it would make some
// kernels spill others.
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
  // Leaves the block's sums in shared.own.
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

// Sums over a strip's blocks; thread t gets the channel at place t, other threads get nothing.
template <class L, class Peers>
DEVICE TwoSums merge_sums(const Tile<L>& tile, const Peers& peers, BackwardShared<L>& shared) {
  const u32 width = tile.strip_channels(), place = threadIdx.x & (width - 1);
  double dz[1] = {0}, dz_xhat[1] = {0};
  if (tile.g.blocks == 1) {
    dz[0] = peers.first(0, place);
    dz_xhat[0] = peers.second(0, place);
  } else {
#pragma unroll 8  // loads at a time
    for (u32 r = threadIdx.x / width; r < tile.g.blocks; r += THREADS / width) {
      dz[0] += peers.first(r, place);
      dz_xhat[0] += peers.second(r, place);
    }
    dz[0] = block_sum(dz, width, shared.sums.scratch);
    dz_xhat[0] = block_sum(dz_xhat, width, shared.sums.scratch);
  }
  if (threadIdx.x >= width || tile.channel(place) >= tile.g.channels) return {};
  const double rest = shared.mean[place] - (double)shared.affine.centre[place];
  return {dz[0], dz_xhat[0] - rest * shared.rstd[place] * dz[0]};
}

// The table entries that carry the sums into dx.
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

#define BACKWARD_ARGS(L)                                                                                          \
  const typename L::V *x, const typename L::V *dy, const typename L::V *residual, const u8 *mask,                   \
      typename L::V *dx, typename L::V *dresidual, const void *weight, const void *bias, const void *mean,          \
      const void *var, void *dweight, void *dbias, double *partials, u32 *counters, u32 dtypes, GEOMETRY_ARGS,      \
      double count, double eps, double parameter

// dbias, dweight, dx and dresidual in one launch: x and dy are read once and kept in shared memory.
template <class L, class Exchange, int FROM> DEVICE void backward_on_chip(BACKWARD_ARGS(L)) {
  typedef typename L::V V;
  typedef typename L::A A;
  __shared__ BackwardShared<L> shared;
  const Geometry g = GEOMETRY;
  const Statistics given = {{weight, dtypes, 0}, {bias, dtypes, 1}, {mean, dtypes, 2}, {var, dtypes, 3}, eps};
  const Parameter weight_gradient(dweight, dtypes, 4), bias_gradient(dbias, dtypes, 5);
  const Upstream<L, FROM> from = {x, dy, residual, mask, (A)parameter};
  const StagedUpstream<L, FROM> stage(from, g, staging);
  typename Exchange::template State<L> peers(g, &shared.sums.own, partials, counters);

  for (u32 strip = blockIdx.x / g.blocks; strip < g.strips; strip += g.groups) {
    const Tile<L> tile(g, strip, blockIdx.x % g.blocks);
    copy_in_quarters(tile, [&](u32 i, i64 offset) { stage.copy(i, offset); });
    load_channels(tile, given, shared);
    const OwnAffine<L> affine(tile, shared.affine);
    BackwardSums<L> sums(tile, shared.gradient);
    as_quarters_arrive(tile, [&](u32 begin, u32 end) {
      each<1, false>(
          tile, begin, end, [&](u32 i, i64 offset) { return stage.get(i, offset); },
          [&](const Operands<L, FROM>& at, i64) {
#pragma unroll
            for (int j = 0; j < L::VEC; ++j) {
              const A centred = affine.centred(j, at.x[j]);
              sums.add(j, from.dz(affine, at, j, centred), centred);
            }
            sums.next();
          });
    });
    sums.finish(tile, shared.sums);
    peers.meet(tile);
    const TwoSums total = merge_sums(tile, peers, shared);
    const i64 channel = tile.channel(threadIdx.x);
    if (threadIdx.x < tile.strip_channels() && channel < channels) {
      set_gradient(shared, threadIdx.x, total, count);
      if (tile.rank == 0) {
        weight_gradient.set(channel, total.dz_xhat);
        bias_gradient.set(channel, total.dz);
      }
    }
    __syncthreads();
    const OwnGradient<L> gradient(tile, shared.gradient);
    each<1, false>(
        tile, 0, tile.count, [&](u32 i, i64 offset) { return stage.get(i, offset); },
        [&](const Operands<L, FROM>& at, i64 offset) {
          V out;
          A g[L::VEC];
#pragma unroll
          for (int j = 0; j < L::VEC; ++j) g[j] = from.dz(affine, at, j, affine.centred(j, at.x[j]));
          if (dresidual) {
#pragma unroll
            for (int j = 0; j < L::VEC; ++j) out.at[j] = L::T::down(g[j]);
            store_once(dresidual + offset, out);
          }
#pragma unroll
          for (int j = 0; j < L::VEC; ++j)
            out.at[j] = L::T::down(
                gradient.dx(j, affine.centred(j, at.x[j]), g[j], affine.scale[L::COLUMNS ? j : 0]));
          store_once(dx + offset, out);
        });
    __syncthreads();  // the next strip writes the tables again
  }
  peers.leave();
}

#define BACKWARD_ON_CHIP(EXCHANGE)                                                                                  \
  backward_on_chip<L, EXCHANGE, FROM>(x, dy, residual, mask, dx, dresidual, weight, bias, mean, var, dweight, dbias, \
                                      partials, counters, dtypes, channels, inner, lanes, strips, positions, share,  \
                                      blocks, groups, count, eps, parameter)

template <class L, class Exchange, int FROM>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_backward_kernel(BACKWARD_ARGS(L)) {
  BACKWARD_ON_CHIP(Exchange);
}

template <class L, int BLOCKS, int FROM>
__global__ void CLUSTER_OF(BLOCKS) __launch_bounds__(THREADS, RESIDENT(L)) bn_backward_cluster_kernel(BACKWARD_ARGS(L)) {
  BACKWARD_ON_CHIP(Cluster<BLOCKS>);
}

// The sums alone, dbias = sum g and dweight = sum g * xhat, and dx = scale * g if it does not depend on them (frozen
// statistics: dx given); dresidual = g if given. sums: [2, statistics] double. Given more than one group, dweight and dbias
// are null: bn_add_groups_kernel makes them of the sums.
template <class L, int FROM, class... More>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_backward_reduce_kernel(
    const typename L::V* x, const typename L::V* dy, const typename L::V* residual, const u8* mask, typename L::V* dx,
    typename L::V* dresidual, const void* weight, const void* bias, const void* mean, const void* var, void* dweight,
    void* dbias, double* all_sums, double* partials, u32* counters, u32 dtypes, GEOMETRY_ARGS, double eps,
    double parameter, More... more) {
  typedef typename L::V V;
  typedef typename L::A A;
  __shared__ BackwardShared<L> shared;
  const Geometry g = GEOMETRY;
  const Statistics given = {{weight, dtypes, 0}, {bias, dtypes, 1}, {mean, dtypes, 2}, {var, dtypes, 3}, eps};
  const Parameter weight_gradient(dweight, dtypes, 4), bias_gradient(dbias, dtypes, 5);
  const Upstream<L, FROM> from = {x, dy, residual, mask, (A)parameter};
  const Selection<L> selection = {more...};
  const Tile<L> tile(g, blockIdx.x / g.blocks, blockIdx.x % g.blocks);
  load_channels(tile, given, shared);
  const OwnAffine<L> affine(tile, shared.affine);
  BackwardSums<L> sums(tile, shared.gradient);
  each<L::COLUMNS && (L::MASKED || FROM == FROM_RESIDUAL) ? 1 : 2, false>(  // more would spill
      tile, 0, tile.count, [&](u32 i, i64 offset) { return from.template load<false>(offset, selection.of(tile, i)); },
      [&](const Operands<L, FROM>& at, i64 offset) {
        A g[L::VEC];
#pragma unroll
        for (int j = 0; j < L::VEC; ++j) {
          const A centred = from.centred(affine, at, j);
          g[j] = from.dz(affine, at, j, centred);
          sums.add(j, g[j], centred);
        }
#if __CUDA_ARCH__ < 1000  // before g is stored, or after: whichever spills nothing
        sums.next();
#elif __CUDA_ARCH__ >= 1200
        if (L::COLUMNS) sums.next();
#endif
        V out;
        if (dresidual) {
#pragma unroll
          for (int j = 0; j < L::VEC; ++j) out.at[j] = L::T::down(g[j]);
          store_once(dresidual + offset, out);
        }
        if (dx) {
#pragma unroll
          for (int j = 0; j < L::VEC; ++j)
            out.at[j] = L::T::down(at.selected[j] ? g[j] * affine.scale[L::COLUMNS ? j : 0] : A(0));
          store_once(dx + offset, out);
        }
#if __CUDA_ARCH__ >= 1200
        if (!L::COLUMNS) sums.next();
#elif __CUDA_ARCH__ >= 1000
        sums.next();
#endif
      });
  sums.finish(tile, shared.sums);
  Split<L> peers;
  if (!peers.last(tile, shared.sums.own, partials, counters)) return;
  const TwoSums total = merge_sums(tile, peers, shared);
  const i64 channel = tile.channel(threadIdx.x), statistic = tile.statistic(channel);
  if (threadIdx.x < tile.strip_channels() && channel < channels) {
    all_sums[statistic] = total.dz;
    all_sums[g.statistics(L::GROUPED) + statistic] = total.dz_xhat;
    weight_gradient.set(channel, total.dz_xhat);
    bias_gradient.set(channel, total.dz);
  }
}

// The gradients of the parameters from the groups' sums, in order.
template <class Number>
__global__ void __launch_bounds__(THREADS)
    bn_add_groups_kernel(const Number* all_sums, void* dweight, void* dbias, u32 dtypes, u32 channels, u32 groups) {
  const u32 channel = blockIdx.x * THREADS + threadIdx.x;
  if (channel >= channels) return;
  double dz = 0, dz_xhat = 0;
  for (u32 group = 0; group < groups; ++group) {
    dz += all_sums[(i64)group * channels + channel];
    dz_xhat += all_sums[(i64)(groups + group) * channels + channel];
  }
  Parameter(dweight, dtypes, 0).set(channel, dz_xhat);
  Parameter(dbias, dtypes, 1).set(channel, dz);
}

// dx from given sums, or with frozen statistics (sums null); dresidual = g if given. Runs backwards.
//
//   dx = weight * rstd * (g - sum g / n - xhat * sum (g * xhat) / n);  frozen: dx = weight * rstd * g
template <class L, int FROM, class... More>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_backward_input_kernel(
    const typename L::V* x, const typename L::V* dy, const typename L::V* residual, const u8* mask, typename L::V* dx,
    typename L::V* dresidual, const void* weight, const void* bias, const void* mean, const void* var,
    const double* all_sums, u32 dtypes, GEOMETRY_ARGS, double count, double eps, double parameter, More... more) {
  typedef typename L::V V;
  typedef typename L::A A;
  __shared__ BackwardShared<L> shared;
  const Geometry g = GEOMETRY;
  const Statistics given = {{weight, dtypes, 0}, {bias, dtypes, 1}, {mean, dtypes, 2}, {var, dtypes, 3}, eps};
  const Upstream<L, FROM> from = {x, dy, residual, mask, (A)parameter};
  const Selection<L> selection = {more...};
  const u32 block = gridDim.x - 1 - blockIdx.x;
  const Tile<L> tile(g, block / g.blocks, block % g.blocks);
  load_channels(tile, given, shared);
  const i64 channel = tile.channel(threadIdx.x), statistic = tile.statistic(channel);
  if (threadIdx.x < tile.strip_channels() && channel < channels) {
    const TwoSums total =
        all_sums ? TwoSums{all_sums[statistic], all_sums[g.statistics(L::GROUPED) + statistic]} : TwoSums{0., 0.};
    if (L::GROUPED && selection.counts) count = fmax(selection.counts[tile.group], 1.);  // of nothing, all sums are zero
    set_gradient(shared, threadIdx.x, total, count);
  }
  __syncthreads();
  const OwnAffine<L> affine(tile, shared.affine);
  const OwnGradient<L> gradient(tile, shared.gradient);
  each<L::MASKED && L::COLUMNS ? 1 : 2, true>(
      tile, 0, tile.count, [&](u32 i, i64 offset) { return from.template load<true>(offset, selection.of(tile, i)); },
      [&](const Operands<L, FROM>& at, i64 offset) {
        V out, dz;
#pragma unroll
        for (int j = 0; j < L::VEC; ++j) {
          const A centred = from.centred(affine, at, j);
          const A gj = from.dz(affine, at, j, centred);
          dz.at[j] = L::T::down(gj);
          const A scale = affine.scale[L::COLUMNS ? j : 0];
          const A dxj = all_sums ? gradient.dx(j, centred, gj, scale) : gj * scale;
          out.at[j] = L::T::down(at.selected[j] ? dxj : A(0));
        }
        store_once(dx + offset, out);
        if (dresidual) store_once(dresidual + offset, dz);
      });
}
