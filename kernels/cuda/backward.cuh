// The backward pass (Ioffe & Szegedy 2015, section 3, without the terms that cancel; gpu_bn/spec.py). g = dz is the
// gradient with respect to z, the activation's argument, and xhat = (x - mean) * rstd:
//
//   dbias = sum(g),  dweight = sum(g * xhat),  dresidual = g
//   dx = weight * rstd * (g - dbias / n - xhat * dweight / n)             (batch statistics)
//   dx = weight * rstd * g                                                (running statistics)

#define BACKWARD_ARGS(L)                                                                                          \
  const typename L::V *x, const typename L::V *dy, const typename L::V *residual, const u8 *mask,                   \
      typename L::V *dx, typename L::V *dresidual, const void *weight, const void *bias, const void *mean,          \
      const void *var, void *dweight, void *dbias, double *partials, u32 *counters, u32 dtypes, GEOMETRY_ARGS,      \
      double count, double eps, double parameter

// Compute all gradients in one launch; x and dy are read once and kept in shared memory.
//
//   dbias = sum(g),  dweight = sum(g * xhat),  dresidual = g
//   dx = weight * rstd * (g - dbias / n - xhat * dweight / n)
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
          tile, begin, end, [&](u32 i, const Cursor& at) { return stage.get(i, at.offset, of_its_row(tile, at)); },
          [&](const Operands<L, FROM>& at, i64) {
#pragma unroll
            for (int j = 0; j < L::VEC; ++j) {
              const A centred = from.centred(affine, at, j);
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
        tile, 0, tile.count, [&](u32 i, const Cursor& at) { return stage.get(i, at.offset, of_its_row(tile, at)); },
        [&](const Operands<L, FROM>& at, i64 offset) {
          V out;
          A g[L::VEC];
#pragma unroll
          for (int j = 0; j < L::VEC; ++j) g[j] = from.dz(affine, at, j, from.centred(affine, at, j));
          if (dresidual) {
#pragma unroll
            for (int j = 0; j < L::VEC; ++j) out.at[j] = L::T::down(g[j]);
            store<L>(dresidual + offset, out, at.selected);
          }
#pragma unroll
          for (int j = 0; j < L::VEC; ++j)
            out.at[j] = L::T::down(
                gradient.dx(j, from.centred(affine, at, j), g[j], affine.scale[L::COLUMNS ? j : 0]));
          store<L>(dx + offset, out, at.selected);
        });
    __syncthreads();  // the next strip writes the tables again
  }
  peers.leave();
}

#define BACKWARD_ON_CHIP(EXCHANGE)                                                                                  \
  backward_on_chip<L, EXCHANGE, FROM>(x, dy, residual, mask, dx, dresidual, weight, bias, mean, var, dweight, dbias, \
                                      partials, counters, dtypes, GEOMETRY_NAMES, count, eps, parameter)

// Run backward_on_chip where one block holds a strip, or co-resident blocks share it.
template <class L, class Exchange, int FROM>
__global__ void __launch_bounds__(THREADS, RESIDENT(L)) bn_backward_kernel(BACKWARD_ARGS(L)) {
  BACKWARD_ON_CHIP(Exchange);
}

// Run backward_on_chip where the blocks of a cluster share a strip.
template <class L, int BLOCKS, int FROM>
__global__ void CLUSTER_OF(BLOCKS) __launch_bounds__(THREADS, RESIDENT(L)) bn_backward_cluster_kernel(BACKWARD_ARGS(L)) {
  BACKWARD_ON_CHIP(Cluster<BLOCKS>);
}

// Compute the sums: the first launch of two, or the only one with running statistics.
//
//   dbias = sum(g),  dweight = sum(g * xhat),  dresidual = g              (dresidual unless it is null)
//   dx = weight * rstd * g                                                (running statistics: unless dx is null)
//
// all_sums: [2, statistics] double. With more than one ghost batch dweight and dbias are null, and bn_add_groups_kernel
// computes them from all_sums.
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
  constexpr bool longest = Activation::LONG && __CUDA_ARCH__ >= 1000;
  constexpr bool crowded =  // two vectors at a time would spill
      L::COLUMNS ? L::MASKED || FROM == FROM_RESIDUAL || longest : L::BATCH == GROUPS && longest;
  constexpr bool early =  // whether g is added to the sums before it is stored: the order that does not spill
      __CUDA_ARCH__ < 1000 || (__CUDA_ARCH__ >= 1200 && L::COLUMNS && !L::MASKED);
  each<crowded ? 1 : 2, false>(
      tile, 0, tile.count, [&](u32 i, const Cursor& at) { return from.template load<false>(at.offset, selection.of(tile, i, at)); },
      [&](const Operands<L, FROM>& at, i64 offset) {
        A g[L::VEC];
#pragma unroll
        for (int j = 0; j < L::VEC; ++j) {
          const A centred = from.centred(affine, at, j);
          g[j] = from.dz(affine, at, j, centred);
          sums.add(j, g[j], centred);
        }
        if (early) sums.next();
        V out;
        if (dresidual) {
#pragma unroll
          for (int j = 0; j < L::VEC; ++j) out.at[j] = L::T::down(g[j]);
          store<L>(dresidual + offset, out, at.selected);
        }
        if (dx) {
#pragma unroll
          for (int j = 0; j < L::VEC; ++j)
            out.at[j] = L::T::down(L::RAGGED || at.selected[j] ? g[j] * affine.scale[L::COLUMNS ? j : 0] : A(0));
          store<L>(dx + offset, out, at.selected);
        }
        if (!early) sums.next();
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

// Compute the gradients of the parameters from the sums of ghost batches, added in order.
//
//   dbias = sum over ghost batches of sum(g),  dweight = sum over ghost batches of sum(g * xhat)
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

// Compute the gradient of x from the sums: the second launch of two. It runs from the end of the tensor to its start,
// because the cache still holds the end.
//
//   dx = weight * rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n),  dresidual = g    (dresidual unless it is null)
//   dx = weight * rstd * g                                                              (running statistics: all_sums null)
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
    if (L::GROUPED && selection.counts) count = fmax(selection.counts[tile.group], 1.);  // an empty ghost batch has sums of 0
    set_gradient(shared, threadIdx.x, total, count);
  }
  __syncthreads();
  const OwnAffine<L> affine(tile, shared.affine);
  const OwnGradient<L> gradient(tile, shared.gradient);
  each<L::MASKED && L::COLUMNS ? 1 : 2, true>(
      tile, 0, tile.count, [&](u32 i, const Cursor& at) { return from.template load<true>(at.offset, selection.of(tile, i, at)); },
      [&](const Operands<L, FROM>& at, i64 offset) {
        V out, dz;
#pragma unroll
        for (int j = 0; j < L::VEC; ++j) {
          const A centred = from.centred(affine, at, j);
          const A gj = from.dz(affine, at, j, centred);
          dz.at[j] = L::T::down(gj);
          const A scale = affine.scale[L::COLUMNS ? j : 0];
          const A dxj = all_sums ? gradient.dx(j, centred, gj, scale) : gj * scale;
          out.at[j] = L::T::down(L::RAGGED || at.selected[j] ? dxj : A(0));
        }
        store<L>(dx + offset, out, at.selected);
        if (dresidual) store<L>(dresidual + offset, dz, at.selected);
      });
}
