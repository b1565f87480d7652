// Vectors of the instruction set that a source file is compiled for. The file
// defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES; what is
// here has internal linkage, so that the linker can't mix instruction sets.

#pragma once

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
