// Vectors of the instruction set that a source file is compiled for. The file
// defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES; what is
// here has internal linkage, so that the linker can't mix instruction sets.

#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The loop that follows is written out n times, for fewer instructions: where
// another thread shares the core, those are what a loop's time goes by.
#define MLX_DEFORM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MLX_DEFORM_UNROLL(n) MLX_DEFORM_PRAGMA(clang loop unroll_count(n))
#else
#define MLX_DEFORM_UNROLL(n) MLX_DEFORM_PRAGMA(GCC unroll n)
#endif

#define MLX_DEFORM_INLINE __attribute__((always_inline)) inline

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

template <typename R, int bytes = MLX_DEFORM_VECTOR_BYTES>
struct VectorOf {
  typedef R type __attribute__((vector_size(bytes)));
  static constexpr int width = bytes / sizeof(R);
};
template <typename R>
using Vector = typename VectorOf<R>::type;
template <typename R>
using HalfVector = typename VectorOf<R, MLX_DEFORM_VECTOR_BYTES / 2>::type;

template <typename R>
static inline Vector<R> load(const R* p) {
  Vector<R> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename R>
static inline HalfVector<R> load_half(const R* p) {
  HalfVector<R> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename R>
static inline void store(R* p, Vector<R> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// A vector of the first `count` elements alone, 0 < count < width: the lanes
// beyond are read as 0, and not written. Worth it where the machine has masks.
constexpr bool has_masks = MLX_DEFORM_VECTOR_BYTES == 64;

template <typename R>
static inline Vector<R> load_first(const R* p, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8) {
    return _mm512_maskz_loadu_pd((1u << count) - 1, p);
  } else {
    return _mm512_maskz_loadu_ps((1u << count) - 1, p);
  }
#else
  Vector<R> v{};
  for (int i = 0; i < count; ++i) {
    v[i] = p[i];
  }
  return v;
#endif
}

template <typename R>
static inline void store_first(R* p, int count, Vector<R> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 8) {
    _mm512_mask_storeu_pd(p, (1u << count) - 1, v);
  } else {
    _mm512_mask_storeu_ps(p, (1u << count) - 1, v);
  }
#else
  for (int i = 0; i < count; ++i) {
    p[i] = v[i];
  }
#endif
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
