// Sums over the lanes of vectors. Of one instruction set, as vector.h is.

#pragma once

#include "mlx_ops/cpu/shuffles.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

#if MLX_DEFORM_HAS_SHUFFLES
// In each quad, two neighbouring lanes of a and b, from the quad's `first` on:
// by turns, (a, b, a, b),
template <int width, int first>
constexpr int by_turns(int i) {
  return i / 4 * 4 + first + i % 4 / 2 + i % 2 * width;
}
// or (a, a, b, b).
template <int width, int first>
constexpr int pair_by_pair(int i) {
  return i / 4 * 4 + first + i % 2 + i % 4 / 2 * width;
}

template <int first>
constexpr int lane_from(int i) {
  return first + i;
}

// The sum of a vector's quads.
template <int width, typename V>
static inline auto sum_of_quads(V v) {
  if constexpr (width == 4) {
    return v;
  } else {
    constexpr int half = width / 2;
    return sum_of_quads<half>(
        shuffle<half, lane_from<0>>(v, v) +
        shuffle<half, lane_from<half>>(v, v));
  }
}
#endif

// The sums of four vectors' lanes, always in the same order.
template <typename V, typename R>
static inline void lane_sums(const V (&v)[4], R (&sums)[4]) {
  constexpr int width = sizeof(V) / sizeof(R);
#if MLX_DEFORM_HAS_SHUFFLES
  if constexpr (width >= 4) {
    // First inside quads, where a lane needn't cross the vector.
    const auto pairs = [](V a, V b) {
      return shuffle<width, by_turns<width, 0>>(a, b) +
          shuffle<width, by_turns<width, 2>>(a, b);
    };
    const V ab = pairs(v[0], v[1]);
    const V cd = pairs(v[2], v[3]);
    const auto all = sum_of_quads<width>(
        shuffle<width, pair_by_pair<width, 0>>(ab, cd) +
        shuffle<width, pair_by_pair<width, 2>>(ab, cd));
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
