// Exchanges, by which the blocks of a strip read each other's partial results: first(rank, place) and second(rank, place).
//
// All threads of a block call `meet` when its partial results are in shared memory, and `leave` before the block ends.

// One block holds the whole strip.
struct Cta {
  template <class L> struct State {
    const Partials<L>* own;
    __device__ State(const Geometry&, Partials<L>* own, double*, u32*) : own(own) {}
    __device__ __forceinline__ void meet(const Tile<L>&) { __syncthreads(); }
    __device__ __forceinline__ double first(u32, u32 place) const { return own->first[place]; }
    __device__ __forceinline__ double second(u32, u32 place) const { return own->second[place]; }
    __device__ __forceinline__ void leave() {}
  };
};

// The blocks of a cluster (sm_90 and later) read each other's distributed shared memory.
template <int BLOCKS> struct Cluster {
  template <class L> struct State {
    const Partials<L>* own;
    __device__ State(const Geometry&, Partials<L>* own, double*, u32*) : own(own) {}
    __device__ __forceinline__ void meet(const Tile<L>&) { barrier(); }
    __device__ __forceinline__ double first(u32 rank, u32 place) const { return remote(rank, own->first + place); }
    __device__ __forceinline__ double second(u32 rank, u32 place) const { return remote(rank, own->second + place); }
    // No block ends while another may still read its shared memory.
    __device__ __forceinline__ void leave() { barrier(); }

    DEVICE void barrier() {
#if __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    }
    DEVICE double remote(u32 rank, const double* p) {
      double value = 0;
#if __CUDA_ARCH__ >= 900
      u32 address;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank));
      asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(address) : "memory");
#endif
      return value;
    }
  };
};

// Write a block's partial results to global memory, where other blocks can read them.
template <class L> DEVICE void publish(const Partials<L>& own, const Tile<L>& tile, double* to) {
  __syncthreads();
  const u32 width = tile.strip_channels();
  for (u32 place = threadIdx.x; place < width; place += THREADS) {
    to[place] = own.first[place];
    to[width + place] = own.second[place];
  }
  __threadfence();
  __syncthreads();
}

// Co-resident blocks exchange through the L2 cache. `groups` is the number of strips in flight. Two sets of partial results
// alternate: a block that is ahead cannot overwrite a set that others still read, because it waits for all of them before
// it writes that set again.
struct Cooperative {
  template <class L> struct State {
    const Geometry& g;
    const Partials<L>* own;
    double* partials;  // [2, groups, blocks, 2, strip_channels]
    u32* arrived;      // [groups]
    u32* left;         // [groups]
    const double* base;
    u32 width;

    __device__ State(const Geometry& g, Partials<L>* own, double* partials, u32* counters)
        : g(g), own(own), partials(partials), arrived(counters), left(counters + g.groups) {}

    // round and group are computed from the strip's number, because some kernels have no registers left to keep them.
    __device__ __forceinline__ void meet(const Tile<L>& tile) {
      const u32 round = tile.strip / g.groups, group = tile.strip % g.groups;
      width = tile.strip_channels();
      double* all = partials + (i64)((round & 1) * g.groups + group) * g.blocks * 2 * width;
      publish(*own, tile, all + (i64)tile.rank * 2 * width);
      if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived + group) : "memory");
        u32 seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived + group) : "memory");
        while (seen < (round + 1) * g.blocks);
      }
      __syncthreads();
      base = all;
    }
    __device__ __forceinline__ double first(u32 rank, u32 place) const { return __ldcg(base + rank * 2 * width + place); }
    __device__ __forceinline__ double second(u32 rank, u32 place) const {
      return __ldcg(base + rank * 2 * width + width + place);
    }
    // The last block of a group resets the counters to 0.
    __device__ __forceinline__ void leave() {
      const u32 group = blockIdx.x / g.blocks;
      __syncthreads();
      if (threadIdx.x == 0 && atomicAdd(left + group, 1u) == g.blocks - 1) {
        atomicExch(arrived + group, 0u);
        atomicExch(left + group, 0u);
      }
    }
  };
};

// In the split tier, blocks write their partial results to global memory, and the last block to do so reads them all.
// `last` returns true in that block.
template <class L> struct Split {
  const double* base;
  u32 width;

  __device__ __forceinline__ bool last(const Tile<L>& tile, const Partials<L>& own, double* partials, u32* counters) {
    __shared__ u32 ticket;
    width = tile.strip_channels();
    if (L::GROUPED) {
      partials += (i64)tile.group * tile.g.strips * tile.g.blocks * 2 * width;
      counters += tile.group * tile.g.strips;
    }
    double* all = partials + (i64)tile.strip * tile.g.blocks * 2 * width;
    publish(own, tile, all + (i64)tile.rank * 2 * width);
    base = all;
    if (tile.g.blocks == 1) return true;
    if (threadIdx.x == 0) {
      ticket = atomicAdd(counters + tile.strip, 1u);
      if (ticket == tile.g.blocks - 1) atomicExch(counters + tile.strip, 0u);
      __threadfence();
    }
    __syncthreads();
    return ticket == tile.g.blocks - 1;
  }
  __device__ __forceinline__ double first(u32 rank, u32 place) const { return __ldcg(base + rank * 2 * width + place); }
  __device__ __forceinline__ double second(u32 rank, u32 place) const {
    return __ldcg(base + rank * 2 * width + width + place);
  }
};
