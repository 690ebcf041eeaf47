// CUDA C++ for g++: the keywords, built-in variables, functions and PTX instructions that the kernels use.
//
// This header is compiled with the kernels, under the sanitizers; the scheduler is not.
#pragma once
#include <math.h>
#include <cstring>
#include <utility>
#include "fibres.h"

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
#define threadIdx (shim::current->index)
#define blockIdx (shim::current->block->index)
#define gridDim (shim::grid)
#define blockDim (shim::block_shape)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline void __syncthreads() { shim::barrier(); }
inline int __syncthreads_or(int value) { return shim::barrier_or(value != 0); }
inline void __threadfence() { shim::fence(); }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }

template <class T> T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
template <class T> T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }

inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float normcdff(float x) { return (float)(0.5 * erfc(-(double)x * 0.70710678118654752440)); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }

template <class To, class From> To bits_as(From v) {
  static_assert(sizeof(To) >= sizeof(From));
  To to = {};
  memcpy(&to, &v, sizeof v);
  return to;
}
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }

template <class T> T __shfl_xor_sync(unsigned mask, T v, unsigned distance) {
  if (mask != 0xffffffffu) shim::fail("a shuffle of some lanes, which the shim does not know");
  const uint64_t bits = shim::exchange(bits_as<uint64_t>(v), (threadIdx.x & 31) ^ distance);
  T out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// An address in shared memory has 32 bits: the rank of the block in its cluster (8), and the offset in its memory (24).
inline size_t __cvta_generic_to_shared(const void* p) {
  const shim::Block& block = *shim::current->block;
  return (size_t)block.rank << 24 | (size_t)((const char*)p - block.memory);
}

namespace ptx {

inline char* shared(unsigned address) {
  return shim::of_cluster(address >> 24)->memory + (address & 0xffffff);
}

// ---------------------------------------------------------------------------------------- conversions
inline void cvt_f64_f32(double& d, float a) { d = a; }
inline void cvt_rn_f32_f64(float& d, double a) { d = (float)a; }

inline void cvt_f32_f16(float& d, unsigned short a) {
  const unsigned sign = (a & 0x8000u) << 16, exponent = a >> 10 & 31, digits = a & 1023;
  if (exponent == 31) d = __uint_as_float(sign | 0x7f800000u | digits << 13);
  else d = (sign ? -1.f : 1.f) * ldexpf((float)(exponent ? digits | 1024 : digits), (int)(exponent ? exponent : 1) - 25);
}

inline void cvt_rn_f16_f32(unsigned short& d, float a) {
  const unsigned bits = __float_as_uint(a), sign = bits >> 16 & 0x8000u;
  const float size = fabsf(a);
  if (a != a) d = 0x7fff;
  else if (size >= 65520.f) d = (unsigned short)(sign | 0x7c00u);
  else if (size < 0x1p-14f) d = (unsigned short)(sign | (unsigned)nearbyintf(size * 0x1p24f));  // carries into the exponent
  else d = (unsigned short)(sign | (((bits & 0x7fffffffu) - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

inline void cvt_rn_bf16_f32(unsigned short& d, float a) {
  const unsigned bits = __float_as_uint(a);
  d = a != a ? 0x7fff : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// ---------------------------------------------------------------------------------------- copies
inline void copy(unsigned to, const void* from, int bytes) {
  shim::current->copies.push_back({shared(to), (const char*)from, bytes, shim::current->groups});
}
inline void cp_async_cg_shared_global(unsigned to, const void* from, int bytes) { copy(to, from, bytes); }
inline void cp_async_ca_shared_global(unsigned to, const void* from, int bytes) { copy(to, from, bytes); }
inline void cp_async_commit_group() { ++shim::current->groups; }
inline void cp_async_wait_group(int pending) {
  shim::Thread& thread = *shim::current;
  std::vector<shim::Copy> later;
  for (const shim::Copy& c : thread.copies) {
    if (c.group >= thread.groups - pending) later.push_back(c);
    else
      for (int i = 0; i < c.bytes; i += 4) *(unsigned*)(c.to + i) = *(const unsigned*)(c.from + i);
  }
  thread.copies.swap(later);
}

// ---------------------------------------------------------------------------------------- synchronisation of blocks
inline void red_release_gpu_global_add_u32(unsigned* p, unsigned v) { __atomic_fetch_add(p, v, __ATOMIC_RELEASE); }
inline void red_relaxed_gpu_global_add_u32(unsigned* p, unsigned v) { __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline void ld_acquire_gpu_global_u32(unsigned& d, const unsigned* p) {
  shim::yield();
  d = __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void ld_relaxed_gpu_global_u32(unsigned& d, const unsigned* p) {
  shim::yield();
  d = __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline void barrier_cluster_arrive_release_aligned() { shim::cluster_arrive(true); }
inline void barrier_cluster_arrive_relaxed_aligned() { shim::cluster_arrive(false); }
inline void barrier_cluster_wait_acquire_aligned() { shim::cluster_wait(true); }
inline void mapa_shared__cluster_u32(unsigned& d, unsigned address, unsigned rank) {
  d = rank << 24 | (address & 0xffffff);
}
inline void ld_shared__cluster_f64(double& d, unsigned address) { d = *(const double*)shared(address); }

}  // namespace ptx

namespace shim {

// Call a kernel with a table of the addresses of its arguments.
template <class... P, size_t... I> void unpack(void (*kernel)(P...), void** table, std::index_sequence<I...>) {
  kernel(*(P*)table[I]...);
}
template <class... P> void call(void (*kernel)(P...), void** table) {
  unpack(kernel, table, std::index_sequence_for<P...>());
}

}  // namespace shim
