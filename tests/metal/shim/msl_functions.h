// Functions of Metal's standard library that the kernels use.

#pragma once

#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()

namespace metal {

// ---- arithmetic

inline float floor(float x) {
  return __builtin_floorf(x);
}
inline half floor(half x) {
  return half(__builtin_floorf(float(x)));
}
inline uint ctz(uint x) {
  return x == 0 ? 32 : uint(__builtin_ctz(x));
}

#define MSL_MIN_MAX(T)     \
  inline T min(T a, T b) { \
    return b < a ? b : a;  \
  }                        \
  inline T max(T a, T b) { \
    return a < b ? b : a;  \
  }
MSL_MIN_MAX(short)
MSL_MIN_MAX(ushort)
MSL_MIN_MAX(int)
MSL_MIN_MAX(uint)
MSL_MIN_MAX(long)
MSL_MIN_MAX(ulong)
MSL_MIN_MAX(half)
MSL_MIN_MAX(float)
#undef MSL_MIN_MAX

// ---- atomics: Metal adds floats in device memory only, and has relaxed order
// only

enum memory_order { memory_order_relaxed };

struct atomic_float {
  float value;
};

inline float atomic_fetch_add_explicit(
    volatile device atomic_float* at,
    float value,
    memory_order) {
#ifdef MSL_TSAN
  // A true atomic, so that ThreadSanitizer knows it for one.
  volatile uint* bits = (volatile uint*)&at->value;
  uint seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
  float old;
  do {
    old = as_type<float>(seen);
  } while (!__atomic_compare_exchange_n(
      bits,
      &seen,
      as_type<uint>(old + value),
      true,
      __ATOMIC_RELAXED,
      __ATOMIC_RELAXED));
#else
  const float old = at->value;
  at->value = old + value;
#endif
  return old;
}

// ---- barriers

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

inline void threadgroup_barrier(mem_flags flags) {
  msl::barrier(flags != mem_flags::mem_none);
}

// Also orders memory between the lanes of a SIMD group.
inline void simdgroup_barrier(mem_flags flags) {
  msl::simd_barrier(flags != mem_flags::mem_none);
}

// ---- SIMD groups

template <class T>
inline T simd_sum(T value) {
  msl::Peers peers = msl::meet("simd_sum", &value, sizeof(T));
  T sum = T(0);
  for (uint i = 0; i < msl::kSimdLanes; ++i) {
    if (peers.has(i)) {
      sum += *static_cast<const T*>(peers.value(i));
    }
  }
  return sum;
}

template <class T>
inline T simd_or(T value) {
  msl::Peers peers = msl::meet("simd_or", &value, sizeof(T));
  T bits = T(0);
  for (uint i = 0; i < msl::kSimdLanes; ++i) {
    if (peers.has(i)) {
      bits |= *static_cast<const T*>(peers.value(i));
    }
  }
  return bits;
}

template <class T>
inline T simd_from(const char* op, T value, uint lane) {
  msl::Peers peers = msl::meet(op, &value, sizeof(T));
  if (!peers.has(lane)) {
    msl::fail("reads the value of a lane that takes no part");
  }
  return *static_cast<const T*>(peers.value(lane));
}

template <class T>
inline T simd_broadcast(T value, ushort lane) {
  return simd_from("simd_broadcast", value, lane);
}

template <class T>
inline T simd_shuffle_xor(T value, ushort mask) {
  return simd_from("simd_shuffle_xor", value, msl::lane() ^ mask);
}

} // namespace metal
