// Sums over the lanes of vectors. Of one instruction set, as vector.h is.

#pragma once

#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// The sums of four vectors' lanes, always in the same order.
template <typename R>
static inline void lane_sums(const Vector<R> (&v)[4], R (&sums)[4]) {
  constexpr int width = VectorOf<R>::width;
#if __has_builtin(__builtin_shufflevector)
  if constexpr (width >= 4) {
    typedef R Quad __attribute__((vector_size(4 * sizeof(R))));
    Quad q[4];
    for (int i = 0; i < 4; ++i) {
      q[i] = __builtin_shufflevector(v[i], v[i], 0, 1, 2, 3);
      if constexpr (width >= 8) {
        q[i] += __builtin_shufflevector(v[i], v[i], 4, 5, 6, 7);
      }
      if constexpr (width == 16) {
        q[i] += __builtin_shufflevector(v[i], v[i], 8, 9, 10, 11) +
            __builtin_shufflevector(v[i], v[i], 12, 13, 14, 15);
      }
    }
    const Quad ab = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5) +
        __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
    const Quad cd = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5) +
        __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    const Quad all = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
        __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    __builtin_memcpy(&sums, &all, sizeof(sums));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    sums[i] = v[i][0];
    for (int j = 1; j < width; ++j) {
      sums[i] += v[i][j];
    }
  }
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
