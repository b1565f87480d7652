// Vectors of the instruction set that a source file is compiled for. The file
// defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES; what is
// here has internal linkage, so that the linker can't mix instruction sets.

#pragma once

// The loop that follows is written out n times, for fewer instructions: where
// another thread shares the core, those are what a loop's time goes by.
#define MLX_DEFORM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MLX_DEFORM_UNROLL(n) MLX_DEFORM_PRAGMA(clang loop unroll_count(n))
#else
#define MLX_DEFORM_UNROLL(n) MLX_DEFORM_PRAGMA(GCC unroll n)
#endif

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

template <typename R>
struct VectorOf {
  typedef R type __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES)));
  static constexpr int width = MLX_DEFORM_VECTOR_BYTES / sizeof(R);
};
template <typename R>
using Vector = typename VectorOf<R>::type;

template <typename R>
static inline Vector<R> load(const R* p) {
  Vector<R> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename R>
static inline void store(R* p, Vector<R> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
