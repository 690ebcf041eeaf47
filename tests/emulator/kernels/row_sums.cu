// Sums of rows in two ways that need synchronisation: by asynchronous copies, and over a cluster of blocks.
// Every row has 1024 floats. Small kernels for tests of the checks; each SYNC line can be removed to plant a fault.

typedef unsigned int u32;

static __device__ float warp_sum(float value) {
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// One warp per row: 8 copies of 16 bytes per lane, the next copy is in flight while the current one is added.
extern "C" __global__ void __launch_bounds__(32) row_sums_async(float* out, const float4* x) {
  __shared__ float4 ring[2][32];
  const u32 lane = threadIdx.x;
  const float4* row = x + blockIdx.x * 256 + lane;
  auto fetch = [&](int i) {
    const u32 to = (u32)__cvta_generic_to_shared(&ring[i & 1][lane]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(row + 32 * i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  float sum = 0.f;
  fetch(0);
  for (int i = 0; i < 8; ++i) {
    if (i < 7) fetch(i + 1); else asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");  // SYNC wait
    const float4 v = ring[i & 1][lane];
    sum += (v.x + v.y) + (v.z + v.w);
  }
  sum = warp_sum(sum);
  if (lane == 0) out[blockIdx.x] = sum;
}

#if __CUDA_ARCH__ >= 900
static __device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A cluster of 4 blocks of one warp per row; block 0 collects the partial sums from the others' shared memory.
extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(32) row_sums_cluster(float* out, const float* x) {
  __shared__ float partial;
  const u32 lane = threadIdx.x, rank = blockIdx.x % 4;
  float sum = 0.f;
  for (int i = 0; i < 8; ++i) sum += x[blockIdx.x * 256 + i * 32 + lane];
  sum = warp_sum(sum);
  if (lane == 0) partial = sum;
  cluster_barrier();  // SYNC before reading
  if (rank == 0) {
    float mine = 0.f;
    if (lane < 4) {
      const u32 here = (u32)__cvta_generic_to_shared(&partial);
      u32 there;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(lane));
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(mine) : "r"(there) : "memory");
    }
    mine = warp_sum(mine);
    if (lane == 0) out[blockIdx.x / 4] = mine;
  }
  cluster_barrier();  // SYNC before leaving
}
#endif
