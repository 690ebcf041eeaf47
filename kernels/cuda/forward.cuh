// The forward pass (Ioffe & Szegedy 2015, algorithms 1 and 2; gpu_bn/spec.py):
//
//   mean = sum(x) / n,  var = sum((x - mean)^2) / n,  rstd = 1 / sqrt(var + eps),  xhat = (x - mean) * rstd
//   z = weight * xhat + bias + residual,  y = activation(z)
//
// The kernels compute z = (x - centre) * scale + shift + residual. centre is the mean rounded to type A, and shift contains
// the rest of the mean. The backward pass computes the same expression with the same roundings.

template <class A, int N> struct Affine {
  A centre[N], scale[N], shift[N];

  __device__ __forceinline__ void set(int place, double mean, double rstd, double weight, double bias) {
    const A near = (A)mean;
    const double slope = rstd * weight;
    centre[place] = near;
    scale[place] = (A)slope;
    shift[place] = (A)(bias - (mean - near) * slope);
  }
};

// The coefficients of a thread's own channels.
template <class L> struct OwnAffine : Affine<typename L::A, L::CHANNELS> {
  typedef typename L::A A;
  __device__ __forceinline__ OwnAffine(const Tile<L>& tile, const Affine<A, L::MAX_CHANNELS>& table) {
    if (!tile.count) return;  // true also for a lane beyond the last channel, which has no entries
#pragma unroll
    for (int j = 0; j < L::CHANNELS; ++j) {
      this->centre[j] = table.centre[tile.own() + j];
      this->scale[j] = table.scale[tile.own() + j];
      this->shift[j] = table.shift[tile.own() + j];
    }
  }
  __device__ __forceinline__ A centred(int j, A x) const { return x - this->centre[L::COLUMNS ? j : 0]; }
  __device__ __forceinline__ A z(int j, A centred) const {
    return fma(centred, this->scale[L::COLUMNS ? j : 0], this->shift[L::COLUMNS ? j : 0]);
  }
};

// Per-channel outputs: `save` writes the values for the backward pass, `track` updates the running statistics
//
//   running = (1 - momentum) * running + momentum * (mean, var * n / (n - 1))
struct Channels {
  Parameter weight, bias, running_mean, running_var;
  const double* momentum_at;  // on the device; if null, momentum is given by value
  double* saved;       // [4, statistics]: mean, var, weight, bias; may be null
  u32 statistics;
  double momentum;

  __device__ __forceinline__ void save(i64 statistic, i64 channel, double mean, double var) const {
    if (!saved) return;
    saved[statistic] = mean;
    saved[statistics + statistic] = var;
    saved[2ll * statistics + statistic] = weight.get(channel, 1.);
    saved[3ll * statistics + statistic] = bias.get(channel, 0.);
  }

  __device__ __forceinline__ void track(i64 channel, double mean, double var, double n) const {
    if (!running_mean.data) return;
    const double m = momentum_at ? *momentum_at : momentum;
    running_mean.set(channel, (1. - m) * running_mean.get(channel) + m * mean);
    running_var.set(channel, (1. - m) * running_var.get(channel) + m * (n > 1. ? n / (n - 1.) : 1.) * var);
  }
};

template <class L, bool RESIDUAL, bool MASK> struct Output {
  typedef typename L::V V;
  typedef typename L::A A;
  V* y;
  const V* residual;
  u8* mask;
  A parameter;

  __device__ __forceinline__ void write(const OwnAffine<L>& affine, const V& x, const V& added,
                                        const Selected<L>& selected, i64 offset) const {
    V out;
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < L::VEC; ++j) {
      A z = affine.z(j, affine.centred(j, x[j]));
      if (RESIDUAL) z += added[j];
      if (MASK) bits |= (u32)!Activation::drop(z) << j;
      out.at[j] = L::T::down(L::RAGGED || selected[j] ? Activation::value(z, parameter) : A(0));
    }
    store<L>(y + offset, out, selected);
    if (MASK) mask[offset] = (u8)bits;
  }
};

template <class L, bool RESIDUAL> struct Pair {
  typename L::V x, residual;
  Selected<L> selected;
};
template <class L> struct Pair<L, false> {
  typename L::V x;
  Selected<L> selected;
};

// Write y for all of the thread's vectors.
template <int UNROLL, bool REVERSED, class L, bool RESIDUAL, bool MASK, class Source>
DEVICE void write_output(const Tile<L>& tile, const OwnAffine<L>& affine, Output<L, RESIDUAL, MASK> output, Source x,
                         const Selection<L>& selection = {}) {
  each<UNROLL, REVERSED>(
      tile, 0, tile.count,
      [&](u32 i, const Cursor& at) {
        Pair<L, RESIDUAL> pair;
        pair.x = x.get(i, at.offset);
        if constexpr (RESIDUAL) pair.residual = load_once(output.residual + at.offset);
        pair.selected = selection.of(tile, i, at);
        return pair;
      },
      [&](const Pair<L, RESIDUAL>& pair, i64 offset) {
        if constexpr (RESIDUAL)
          output.write(affine, pair.x, pair.residual, pair.selected, offset);
        else
          output.write(affine, pair.x, pair.x, pair.selected, offset);
      });
}

extern __shared__ __align__(16) unsigned char staging[];

#define FORWARD_ARGS(L)                                                                                          \
  const typename L::V *x, typename L::V *y, const typename L::V *residual, u8 *mask, const void *weight,          \
      const void *bias, void *running_mean, void *running_var, const double *momentum_at, double *saved, double *partials, \
      u32 *counters, u32 dtypes, GEOMETRY_ARGS, double momentum, double eps, double parameter

// Compute statistics, running update and output in one launch; x is read once and kept in shared memory.
//
//   mean = sum(x) / n,  var = sum((x - mean)^2) / n                  (Ioffe & Szegedy 2015, algorithm 1)
//   y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)
//   running = (1 - momentum) * running + momentum * (mean, var * n / (n - 1))
template <class L, class Exchange, bool RESIDUAL, bool MASK> DEVICE void forward_on_chip(FORWARD_ARGS(L)) {
  typedef typename L::V V;
  typedef typename L::A A;
  __shared__ Shared<L> shared;
  __shared__ Shift<L> shift;
  __shared__ Affine<A, L::MAX_CHANNELS> table;
  const Geometry g = GEOMETRY;
  const Channels per_channel = {{weight, dtypes, 0}, {bias, dtypes, 1}, {running_mean, dtypes, 2}, {running_var, dtypes, 3},
                                momentum_at, saved, channels, momentum};
  const Output<L, RESIDUAL, MASK> output = {y, residual, mask, (A)parameter};
  const Staged<V> stage = {(V*)staging};
  typename Exchange::template State<L> peers(g, &shared.own, partials, counters);

  for (u32 strip = blockIdx.x / g.blocks; strip < g.strips; strip += g.groups) {
    const Tile<L> tile(g, strip, blockIdx.x % g.blocks);
    copy_in_quarters(tile, [&](u32 i, i64 offset) { stage.copy(i, x + offset); });
    block_moments(tile, x, shared, shift, [&](Deviations<L>& deviations) {
      as_quarters_arrive(tile, [&](u32 begin, u32 end) {
        if constexpr (L::RAGGED) {
          each<1, false>(
              tile, begin, end,
              [&](u32 i, const Cursor& at) { return Pair<L, false>{stage.get(i, 0), of_its_row(tile, at)}; },
              [&](const Pair<L, false>& pair, i64) { deviations.add(pair.x, pair.selected); });
        } else {
#pragma unroll(L::COLUMNS ? 1 : 2)
          for (u32 i = begin; i < end; ++i) deviations.add(stage.get(i, 0));
        }
      });
    });
    peers.meet(tile);
    const Moments moments = merge_moments(tile, peers, shift, shared.scratch, tile.elements(), Shares<L>(tile));
    const u32 place = threadIdx.x;
    const i64 channel = tile.channel(place);
    if (place < tile.strip_channels() && channel < channels) {
      const double rstd = rsqrt(moments.var + eps);
      table.set(place, moments.mean, rstd, per_channel.weight.get(channel, 1.), per_channel.bias.get(channel, 0.));
      if (tile.rank == 0) {
        per_channel.save(channel, channel, moments.mean, moments.var);
        per_channel.track(channel, moments.mean, moments.var, tile.elements());
      }
    }
    __syncthreads();
    write_output<L::COLUMNS ? 1 : 2, false>(tile, OwnAffine<L>(tile, table), output, stage);
    __syncthreads();  // the next strip writes the table again
  }
  peers.leave();
}

#define FORWARD_ON_CHIP(EXCHANGE)                                                                                   \
  forward_on_chip<L, EXCHANGE, RESIDUAL, MASK>(                                                                     \
      x, y, residual, mask, weight, bias, running_mean, running_var, momentum_at, saved, partials, counters, dtypes,    \
      GEOMETRY_NAMES, momentum, eps, parameter)

// Run forward_on_chip where one block holds a strip, or co-resident blocks share it.
template <class L, class Exchange, bool RESIDUAL, bool MASK>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_forward_kernel(FORWARD_ARGS(L)) {
  FORWARD_ON_CHIP(Exchange);
}

// Run forward_on_chip where the blocks of a cluster share a strip.
template <class L, int BLOCKS, bool RESIDUAL, bool MASK>
__global__ void CLUSTER_OF(BLOCKS) __launch_bounds__(THREADS, RESIDENT(L)) bn_forward_cluster_kernel(FORWARD_ARGS(L)) {
  FORWARD_ON_CHIP(Cluster<BLOCKS>);
}

// Compute the statistics and the running update: the first launch of two.
//
//   mean = sum(x) / n,  var = sum((x - mean)^2) / n
//   running = (1 - momentum) * running + momentum * (mean, var * n / (n - 1))
//
// With more than one ghost batch the running statistics are null: bn_track_kernel updates them in order.
template <class L, class... More>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_stats_kernel(
    const typename L::V* x, const void* weight, const void* bias, void* running_mean, void* running_var,
    const double* momentum_at, double* saved, double* partials, u32* counters, u32 dtypes, GEOMETRY_ARGS, double momentum,
    More... more) {
  typedef typename L::V V;
  __shared__ Shared<L> shared;
  __shared__ Shift<L> shift;
  const Geometry g = GEOMETRY;
  const Channels per_channel = {{weight, dtypes, 0}, {bias, dtypes, 1}, {running_mean, dtypes, 2}, {running_var, dtypes, 3},
                                momentum_at, saved, g.statistics(L::GROUPED), momentum};
  const Tile<L> tile(g, blockIdx.x / g.blocks, blockIdx.x % g.blocks);
  const Selection<L> selection = {more...};
  const Streamed<V> source = {x};
  const Shares<L> shares(tile, partials);
  const double own = block_moments(
      tile, x, shared, shift,
      [&](Deviations<L>& deviations) {
        each<L::MASKED && L::COLUMNS ? 2 : 4, false>(  // a larger batch of loads would spill
            tile, 0, tile.count,
            [&](u32 i, const Cursor& at) { return Pair<L, false>{source.get(i, at.offset), selection.of(tile, i, at)}; },
            [&](const Pair<L, false>& pair, i64) { deviations.add(pair.x, pair.selected); });
      },
      selection);
  shares.set(own, shift);
  Split<L> peers;
  if (!peers.last(tile, shared.own, partials, counters)) return;
  const double n = shares.all(shared.scratch);
  const Moments moments = merge_moments(tile, peers, shift, shared.scratch, n, shares);
  const i64 channel = tile.channel(threadIdx.x);
  if (threadIdx.x < tile.strip_channels() && channel < channels) {
    per_channel.save(tile.statistic(channel), channel, moments.mean, moments.var);
    if (!L::MASKED || n > 0) per_channel.track(channel, moments.mean, moments.var, n);
  }
  if (L::MASKED && tile.strip == 0 && threadIdx.x == 0) selection.counts[tile.group] = n;
}

// Update the running statistics by one ghost batch after the other. n is its entry of counts, or count if that is null.
//
//   running = (1 - momentum) * running + momentum * (mean, var * n / (n - 1))
template <class Number>
__global__ void __launch_bounds__(THREADS) bn_track_kernel(
    const Number* mean, const Number* var, void* running_mean, void* running_var, const double* momentum_at,
    const double* counts, u32 dtypes, u32 channels, u32 groups, double count, double momentum) {
  const Parameter to_mean(running_mean, dtypes, 0), to_var(running_var, dtypes, 1);
  const double m = momentum_at ? *momentum_at : momentum;
  const u32 channel = blockIdx.x * THREADS + threadIdx.x;
  if (channel >= channels) return;
  double tracked_mean = to_mean.get(channel), tracked_var = to_var.get(channel);
  for (u32 group = 0; group < groups; ++group) {
    const double n = counts ? counts[group] : count;
    if (n == 0.) continue;
    const i64 statistic = (i64)group * channels + channel;
    tracked_mean = (1. - m) * tracked_mean + m * mean[statistic];
    tracked_var = (1. - m) * tracked_var + m * (n > 1. ? n / (n - 1.) : 1.) * var[statistic];
  }
  to_mean.set(channel, tracked_mean);
  to_var.set(channel, tracked_var);
}

// Compute the output from given statistics: the second launch of two, or evaluation. It runs from the end of the tensor to
// its start, because the cache still holds the end.
//
//   y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)
template <class L, bool RESIDUAL, bool MASK, class... More>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_normalize_kernel(
    const typename L::V* x, typename L::V* y, const typename L::V* residual, u8* mask, const void* weight,
    const void* bias, const void* mean, const void* var, double* saved, u32 dtypes, GEOMETRY_ARGS, double eps,
    double parameter, More... more) {
  typedef typename L::V V;
  typedef typename L::A A;
  __shared__ Affine<A, L::MAX_CHANNELS> table;
  const Geometry g = GEOMETRY;
  const Channels per_channel = {{weight, dtypes, 0}, {bias, dtypes, 1}, {mean, dtypes, 2}, {var, dtypes, 3},
                                nullptr, saved, g.statistics(L::GROUPED), 0.};
  const u32 block = gridDim.x - 1 - blockIdx.x;
  const Tile<L> tile(g, block / g.blocks, block % g.blocks);
  const u32 place = threadIdx.x;
  const i64 channel = tile.channel(place);
  if (place < tile.strip_channels() && channel < channels) {
    const i64 statistic = tile.statistic(channel);
    const double m = per_channel.running_mean.get(statistic), v = per_channel.running_var.get(statistic);
    table.set(place, m, rsqrt(v + eps), per_channel.weight.get(channel, 1.), per_channel.bias.get(channel, 0.));
    if (tile.rank == 0) per_channel.save(statistic, channel, m, v);
  }
  __syncthreads();
  const Output<L, RESIDUAL, MASK> output = {y, residual, mask, (A)parameter};
  write_output<!L::COLUMNS ? 4 : RESIDUAL ? 2 : 3, true>(tile, OwnAffine<L>(tile, table), output, StreamedOnce<V>{x}, Selection<L>{more...});
}
