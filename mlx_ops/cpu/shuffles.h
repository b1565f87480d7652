// Lanes of vectors put together anew. Of one instruction set, as vector.h is.

#pragma once

#include <utility> // of which only a type is used: see tile_kernels.h

#include "mlx_ops/cpu/vector.h"

// Not in GCC before 12.
#define MLX_DEFORM_HAS_SHUFFLES __has_builtin(__builtin_shufflevector)

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

#if MLX_DEFORM_HAS_SHUFFLES
template <int (*from)(int), typename V, int... i>
static inline auto shuffle(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, from(i)...);
}

// Lane i of the result, of as many, is lane from(i) of a and b in a row.
template <int lanes, int (*from)(int), typename V>
static inline auto shuffle(V a, V b) {
  return shuffle<from>(a, b, std::make_integer_sequence<int, lanes>());
}
#endif

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
