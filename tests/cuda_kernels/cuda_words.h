// CUDA's words for a C++ compiler, over the runtime that runs Metal's kernels:
// a warp is a SIMD group, a block a threadgroup.

#pragma once

#define __CUDACC__ 1
#define __device__
#define __global__
#define __grid_constant__

typedef int int32_t;
typedef long int64_t;

extern "C" void* memcpy(void*, const void*, unsigned long);

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
  explicit operator float() const {
    return static_cast<float>(value);
  }
};

struct __nv_bfloat16 {
  __bf16 value;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : value(static_cast<__bf16>(x)) {}
  explicit operator float() const {
    return static_cast<float>(value);
  }
};

#define blockIdx (msl::threadgroup_position_in_grid().at)
#define gridDim (msl::threadgroups_per_grid().at)
#define blockDim (msl::threads_per_threadgroup().at)
#define threadIdx (thread_in_block())

inline msl::Uint3 thread_in_block() {
  const msl::Uint3 at = msl::thread_position_in_grid().at;
  return {
      at.x - blockIdx.x * blockDim.x,
      at.y - blockIdx.y * blockDim.y,
      at.z - blockIdx.z * blockDim.z};
}

inline float floorf(float x) {
  return __builtin_floorf(x);
}
inline double floor(double x) {
  return __builtin_floor(x);
}
inline float __int_as_float(int bits) {
  return as_type<float>(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

inline float atomicAdd(float* at, float value) {
  return metal::atomic_fetch_add_explicit(
      (metal::atomic_float*)at, value, metal::memory_order_relaxed);
}

inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) {
    msl::fail("calls a warp's operation for a part of it");
  }
}
inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  whole_warp(mask);
  return metal::simd_shuffle_xor(value, ushort(lanes));
}
inline float __shfl_sync(unsigned mask, float value, int lane) {
  whole_warp(mask);
  return metal::simd_broadcast(value, ushort(lane));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  whole_warp(mask);
  return metal::simd_or(
      predicate ? 1u << msl::thread_index_in_simdgroup() : 0u);
}

namespace cooperative_groups {}

namespace mlx::core::cu {
struct Strides {
  long at[10];
  long operator[](int i) const {
    return at[i];
  }
};
} // namespace mlx::core::cu
