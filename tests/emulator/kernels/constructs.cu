// Small kernels with the constructs that kernels of a batch norm use. Their PTX must run in the emulator.

typedef unsigned int u32;

#define UNARY(NAME, T, FUNCTION)                                            \
  extern "C" __global__ void NAME(T* y, const T* x, int n) {                \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                    \
    if (i < n) y[i] = FUNCTION(x[i]);                                       \
  }

UNARY(math_expf, float, expf)
UNARY(math_expm1f, float, expm1f)
UNARY(math_erff, float, erff)
UNARY(math_tanhf, float, tanhf)
UNARY(math_rsqrtf, float, rsqrtf)
UNARY(math_log1pf, float, log1pf)
UNARY(math_exp, double, exp)
UNARY(math_expm1, double, expm1)
UNARY(math_erf, double, erf)
UNARY(math_tanh, double, tanh)
UNARY(math_rsqrt, double, rsqrt)

// Each block writes three numbers: whether any of its elements is negative, how many are, and whether all are.
extern "C" __global__ void votes(int* out, const float* x) {
  const bool negative = x[blockIdx.x * blockDim.x + threadIdx.x] < 0.f;
  const int any = __syncthreads_or(negative), count = __syncthreads_count(negative), all = __syncthreads_and(negative);
  if (threadIdx.x == 0) out[3 * blockIdx.x] = any != 0, out[3 * blockIdx.x + 1] = count, out[3 * blockIdx.x + 2] = all != 0;
}

static __device__ double block_sum(double value) {
  __shared__ double partials[32];
  for (int offset = 16; offset; offset >>= 1) value += __shfl_down_sync(0xffffffffu, value, offset);
  if ((threadIdx.x & 31) == 0) partials[threadIdx.x >> 5] = value;
  __syncthreads();
  double sum = 0.;
  for (u32 warp = 0; warp < blockDim.x / 32; ++warp) sum += partials[warp];
  __syncthreads();
  return sum;
}

// Sum over all blocks. The last one to take a ticket adds the partial sums and resets the counter.
extern "C" __global__ void sum_by_ticket(double* out, double* partials, u32* counter, const float* x) {
  __shared__ bool last;
  const double sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) {
    __threadfence();
    double total = 0.;
    for (u32 block = 0; block < gridDim.x; ++block) total += ((volatile double*)partials)[block];
    *out = total;
    *counter = 0;
  }
}

// Sum over all blocks, in each of them. They wait for each other at a counter, which needs a cooperative launch.
extern "C" __global__ void sum_by_barrier(double* out, double* partials, u32* counter, const float* x) {
  const double sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
    u32 arrived;
    do {
      asm volatile("{ ld.acquire.gpu.global.u32 %0, [%1]; }" : "=r"(arrived) : "l"(__cvta_generic_to_global(counter)) : "memory");
    } while (arrived < gridDim.x);
  }
  __syncthreads();
  double total = 0.;
  for (u32 block = 0; block < gridDim.x; ++block) total += partials[block];
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// A struct in local memory, indexed at run time, and a switch.
extern "C" __global__ void local_arrays(float* y, const float* x, const int* at) {
  float kept[8];
  for (int i = 0; i < 8; ++i) kept[i] = x[8 * threadIdx.x + i];
  for (int i = 0; i < 8; ++i) kept[at[i]] += kept[(at[i] + 1) & 7];
  float value = kept[at[threadIdx.x & 7]];
  switch (threadIdx.x & 7) {
    case 0: value = -value; break;
    case 1: value = value * value; break;
    case 2: value = fmaxf(value, 0.f); break;
    case 3: value = 1.f / value; break;
    case 4: value = sqrtf(fabsf(value)); break;
    case 5: value = fminf(value, 6.f); break;
    case 6: value = floorf(value); break;
  }
  y[threadIdx.x] = value;
}

// High products, 64-bit division and remainders, and operations on bits.
extern "C" __global__ void integers(unsigned long long* y, const unsigned long long* x) {
  const unsigned long long a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1] | 1;
  y[threadIdx.x] = __umul64hi(a, b) ^ (a / b) ^ (a % b) ^ (unsigned long long)((long long)a / (long long)b) ^
                   __brevll(a) ^ __popcll(b) ^ __clzll(a) ^ __byte_perm((u32)a, (u32)b, 0x3175) ^
                   __funnelshift_l((u32)a, (u32)b, (u32)a) ^ (u32)__ffs((int)b);
}

#if __CUDA_ARCH__ >= 800
// Copy x by cp.async in four groups, and add each group when it has arrived. The last vector may be a partial one.
extern "C" __global__ void __launch_bounds__(64) copies_in_groups(double* out, const float* x, int n) {
  extern __shared__ float4 staged[];
  for (int group = 0; group < 4; ++group) {
    const int v = group * 64 + threadIdx.x, left = 4 * (n - 4 * v), bytes = left < 0 ? 0 : left > 16 ? 16 : left;
    const u32 to = (u32)__cvta_generic_to_shared(staged + v);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(x + (bytes ? 4 * v : 0)), "r"(bytes) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  double sum = 0.;
#define LAND(GROUP)                                                         \
  {                                                                         \
    asm volatile("cp.async.wait_group %0;" ::"n"(3 - GROUP) : "memory");    \
    const float4 v = staged[GROUP * 64 + threadIdx.x];                      \
    sum += (double)v.x + v.y + v.z + v.w;                                   \
  }
  LAND(0) LAND(1) LAND(2) LAND(3)
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}
#endif

#if __CUDA_ARCH__ >= 900
// Each block of a cluster adds the partial sums of all blocks, and writes the sum plus its rank to the next block.
extern "C" __global__ void __cluster_dims__(4, 1, 1) sum_by_cluster(double* out, const float* x) {
  __shared__ double partial, told;
  const double sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) partial = sum;
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  if (threadIdx.x == 0) {
    double total = 0.;
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    for (u32 i = 0; i < 4; ++i) {
      u32 there;
      double its;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(&partial)), "r"(i));
      asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(its) : "r"(there) : "memory");
      total += its;
    }
    u32 next;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(next) : "r"((u32)__cvta_generic_to_shared(&told)), "r"((rank + 1) % 4));
    asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(next), "d"(total + rank) : "memory");
  }
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  if (threadIdx.x == 0) out[blockIdx.x] = told;
}
#endif
