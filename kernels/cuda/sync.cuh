// SyncBatchNorm: merge the reports of several processes, add up their sums, and update running statistics, one launch each.
// Every process writes the same results, because all of them add up the same packets in the same order.
//
// Packets have shape [parts, processes, header + room], in double. Each has a header, which all processes compare, and a
// part of a process's numbers: its report [0, count, means, variances] or its sums.

constexpr u32 LANES = 32;  // lanes of a warp: each computes one number, and each warp reads every eighth process
typedef double Scratch[WARPS][LANES];

#define PACKETS_ARGS const double *numbers, u32 parts, u32 processes, u32 header, u32 room, double unknown
#define PACKETS {numbers, parts, processes, header, room, unknown}

struct Packets {
  const double* numbers;
  u32 parts, processes, header, room;
  double unknown;  // value of header fields that are not compared

  __device__ __forceinline__ const double* packet(u32 part, u32 process) const {
    return numbers + ((i64)part * processes + process) * (header + room);
  }
  // Return number `at` of a process's numbers.
  __device__ __forceinline__ double get(u32 process, u32 at) const {
    return packet(at / room, process)[header + at % room];
  }

  // Return sum(value(i)) over processes i. Each warp adds up its own processes. Then every thread adds up the warps' sums
  // for its lane, in order.
  template <class Value> __device__ __forceinline__ double sum(Scratch& scratch, Value value) const {
    double own = 0, all = 0;
    for (u32 process = threadIdx.x / LANES; process < processes; process += WARPS) own += value(process);
    __syncthreads();  // the previous sum has been read
    scratch[threadIdx.x / LANES][threadIdx.x % LANES] = own;
    __syncthreads();
    for (u32 warp = 0; warp < WARPS; ++warp) all += scratch[warp][threadIdx.x % LANES];
    return all;
  }

  // Return NaN if a process reports a mistake in the first field of its header, or if headers differ; else 0.
  __device__ __forceinline__ double poison() const {
    bool wrong = false;
    for (u32 place = threadIdx.x; place < parts * header; place += THREADS) {
      const u32 field = place % header;
      double known = unknown;
      for (u32 process = 0; process < processes; ++process) {
        const double value = packet(place / header, process)[field];
        wrong |= (field == 0 && value != 0) || (value != unknown && known != unknown && value != known);
        if (value != unknown) known = value;
      }
    }
    return __syncthreads_or(wrong) ? 0. / 0. : 0.;
  }
};

// Merge the statistics of all processes from their reports (Chan, Golub & LeVeque 1979; gpu_bn/merge.py).
//
//   N = sum(n_i),  mean = sum(n_i / N * mean_i),  var = sum(n_i * (var_i + (mean_i - mean)^2)) / N
template <class Number>
__global__ void __launch_bounds__(THREADS)
    bn_sync_merge_kernel(PACKETS_ARGS, Number* count, Number* mean, Number* var, u32 channels) {
  __shared__ Scratch scratch;
  const Packets packets = PACKETS;
  const u32 channel = blockIdx.x * LANES + threadIdx.x % LANES;
  const u32 at = 2 + (channel < channels ? channel : 0);  // lanes beyond the last channel read channel 0
  const double n = packets.sum(scratch, [&](u32 i) { return packets.get(i, 1); });
  const double inverse = 1. / fmax(n, 1.);
  const double all_mean = packets.sum(scratch, [&](u32 i) { return packets.get(i, 1) * inverse * packets.get(i, at); });
  const double squares = packets.sum(scratch, [&](u32 i) {
    const double apart = packets.get(i, at) - all_mean;
    return packets.get(i, 1) * (packets.get(i, channels + at) + apart * apart);
  });
  const double poison = packets.poison();
  if (threadIdx.x < LANES && channel < channels) {
    mean[channel] = all_mean + poison;
    var[channel] = squares * inverse + poison;
    if (channel == 0) *count = n;
  }
}

// Add up the sums of the backward pass over all processes.
//
//   sum(g) = sum(sum_i(g)),  sum(g * xhat) = sum(sum_i(g * xhat))
template <class Number>
__global__ void __launch_bounds__(THREADS) bn_sync_sum_kernel(PACKETS_ARGS, Number* sums, u32 length) {
  __shared__ Scratch scratch;
  const Packets packets = PACKETS;
  const u32 at = blockIdx.x * LANES + threadIdx.x % LANES;
  const double sum = packets.sum(scratch, [&](u32 i) { return packets.get(i, at < length ? at : 0); });
  const double poison = packets.poison();
  if (threadIdx.x < LANES && at < length) sums[at] = sum + poison;
}

// Update the running statistics by those of all processes, unless N is 0, and count the batch.
//
//   running = (1 - momentum) * running + momentum * (mean, var * N / (N - 1))
//   momentum: *momentum_at, or if that is null 1 / the number of batches (cumulative), or the given number
//
// A single block does all the work, so that every thread has read the counter before it is written.
template <class Number>
__global__ void __launch_bounds__(THREADS, 1) bn_sync_update_kernel(
    void* running_mean, void* running_var, i64* counter, const Number* count, const Number* mean, const Number* var,
    const double* momentum_at, u32 dtypes, u32 channels, u32 cumulative, double momentum) {
  const Parameter to_mean(running_mean, dtypes, 0), to_var(running_var, dtypes, 1);
  const i64 batches = counter ? *counter + 1 : 1;
  const double n = *count, bessel = n / fmax(n - 1., 1.);
  const double m = momentum_at ? *momentum_at : cumulative ? 1. / batches : momentum;
  for (u32 channel = threadIdx.x; n > 0 && channel < channels; channel += THREADS) {
    const double old_mean = to_mean.get(channel), old_var = to_var.get(channel);
    to_mean.set(channel, (1. - m) * old_mean + m * mean[channel]);
    to_var.set(channel, (1. - m) * old_var + m * (var[channel] * bessel));
  }
  __syncthreads();
  if (counter && threadIdx.x == 0) *counter = batches;
}
