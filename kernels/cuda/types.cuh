// Storage types, vectors of them, and per-channel parameters of any floating dtype. It includes no headers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;

// Blocks that must fit on an SM at the same time. The cooperative tier of plan.py relies on it.
#define RESIDENT(L) (sizeof(typename L::A) == 4 ? 2 : 1)

#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)
#else
#define CLUSTER_OF(BLOCKS)
#endif

// Storage types: the type in memory, the type for arithmetic, and the conversions between them.
struct F32 {
  typedef float Storage;
  typedef float Compute;
  DEVICE float up(float v) { return v; }
  DEVICE float down(float v) { return v; }
};

struct F64 {
  typedef double Storage;
  typedef double Compute;
  DEVICE double up(double v) { return v; }
  DEVICE double down(double v) { return v; }
};

struct F16 {
  typedef u16 Storage;
  typedef float Compute;
  DEVICE float up(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
  }
  DEVICE u16 down(float f) {
    u16 v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
  }
};

struct BF16 {
  typedef u16 Storage;
  typedef float Compute;
  DEVICE float up(u16 v) { return __uint_as_float((u32)v << 16); }
  DEVICE u16 down(float f) {
#if __CUDA_ARCH__ >= 800
    u16 v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
#else
    const u32 bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  }
};

struct Flag {
  typedef u8 Storage;
  typedef bool Compute;
  DEVICE bool up(u8 v) { return v != 0; }
};

template <class T, int VEC> struct alignas(VEC * sizeof(typename T::Storage)) Vector {
  typename T::Storage at[VEC];
  __device__ __forceinline__ typename T::Compute operator[](int j) const { return T::up(at[j]); }
};

// ------------------------------------------------------------------------------------------------ memory
template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 Type; };
template <> struct Word<8> { typedef uint2 Type; };
template <> struct Word<4> { typedef u32 Type; };
template <> struct Word<2> { typedef u16 Type; };
template <> struct Word<1> { typedef u8 Type; };

// Load a vector that is read only once, so that the cache evicts it first.
template <class V> DEVICE V load_once(const V* p) {
  union { typename Word<sizeof(V)>::Type word; V vector; } u;
  u.word = __ldcs((const typename Word<sizeof(V)>::Type*)p);
  return u.vector;
}

// Load a vector that other blocks read too.
template <class V> DEVICE V load_shared_by_blocks(const V* p) {
  union { typename Word<sizeof(V)>::Type word; V vector; } u;
  u.word = __ldg((const typename Word<sizeof(V)>::Type*)p);
  return u.vector;
}

template <class V> DEVICE void store_once(V* p, const V& v) {
  union { typename Word<sizeof(V)>::Type word; V vector; } u;
  u.vector = v;
  __stcs((typename Word<sizeof(V)>::Type*)p, u.word);
}

// Copy a vector from global to shared memory, asynchronously if the architecture and the size allow it.
template <class V> DEVICE void copy_async(V* shared, const V* global) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(V) >= 4) {
    const u32 address = (u32)__cvta_generic_to_shared(shared);
    if constexpr (sizeof(V) == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(sizeof(V)) : "memory");
    return;
  }
#endif
  *shared = load_once(global);
}

DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most PENDING groups of this thread's copies are still under way.
template <int PENDING> DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------ parameters
// Parameter is a per-channel vector of any floating dtype, or null. `code` packs the dtypes of a launch's vectors, 2 bits
// each.
enum Dtype { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 };

// Convert to double and back. Subnormal numbers are kept; in float32 arithmetic CuPy has the compiler flush them to zero.
DEVICE double widen(float v) {
  double wide;
  asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(v));
  return wide;
}
DEVICE float narrow(double v) {
  float near;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(near) : "d"(v));
  return near;
}

struct Parameter {
  const void* data;
  u32 dtype;

  __device__ __forceinline__ Parameter(const void* data, u32 code, int slot) : data(data), dtype(code >> 2 * slot & 3u) {}

  __device__ __forceinline__ double get(i64 i, double absent = 0.) const {
    if (!data) return absent;
    if (dtype == FLOAT32) return widen(((const float*)data)[i]);
    if (dtype == FLOAT64) return ((const double*)data)[i];
    const u16 bits = ((const u16*)data)[i];
    return widen(dtype == FLOAT16 ? F16::up(bits) : BF16::up(bits));
  }

  __device__ __forceinline__ void set(i64 i, double value) const {
    if (!data) return;
    if (dtype == FLOAT32) ((float*)data)[i] = narrow(value);
    else if (dtype == FLOAT64) ((double*)data)[i] = value;
    else ((u16*)data)[i] = dtype == FLOAT16 ? F16::down(narrow(value)) : BF16::down(narrow(value));
  }
};
