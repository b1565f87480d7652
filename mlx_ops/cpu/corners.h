// Loops along the four corners of a sample at once. Of one instruction set, as
// vector.h is.

#pragma once

#include "mlx_ops/cpu/lane_sums.h"
#include "mlx_ops/cpu/lanes.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// corner_sums() of short rows of whole vectors, in half vectors, whose lanes
// take fewer steps to add up.
template <int length, typename R>
static inline void
corner_sums_in_halves(const R* const (&from)[4], const R* row, R (&sums)[4]) {
  constexpr int width = VectorOf<R>::width / 2;
  HalfVector<R> s[4];
  const HalfVector<R> first = load_half(row);
  for (int i = 0; i < 4; ++i) {
    s[i] = first * load_half(from[i]);
  }
  MLX_DEFORM_UNROLL(8)
  for (int q = width; q < length; q += width) {
    const HalfVector<R> g = load_half(row + q);
    for (int i = 0; i < 4; ++i) {
      s[i] += g * load_half(from[i] + q);
    }
  }
  lane_sums(s, sums);
}

// A row times each corner, summed over n channels.
template <int length = any_length, typename T, typename G, typename R>
static inline void
corner_sums(const T* const (&from)[4], const G* row, int n, R (&sums)[4]) {
  constexpr int width = VectorOf<R>::width;
  constexpr bool has_vectors = length <= 0 || length >= width;
  constexpr bool has_last = length == any_length || length % width > 0;
  if constexpr (
      !has_last && width >= 8 && length > 0 && length <= 4 * width &&
      sizeof(T) == sizeof(R) && sizeof(G) == sizeof(R)) {
    return corner_sums_in_halves<length>(from, row, sums);
  }
  // Two sums each, for the next addition not to wait for the last.
  Vector<R> s[4]{}, t[4]{};
  int q = 0;
  MLX_DEFORM_UNROLL(4)
  for (; q + 2 * width <= n; q += 2 * width) {
    const Vector<R> g = load(row + q);
    const Vector<R> h = load(row + q + width);
    for (int i = 0; i < 4; ++i) {
      s[i] += g * load(from[i] + q);
      t[i] += h * load(from[i] + q + width);
    }
  }
  if (q + width <= n) {
    const Vector<R> g = load(row + q);
    for (int i = 0; i < 4; ++i) {
      s[i] += g * load(from[i] + q);
    }
    q += width;
  }
  R last[4]{};
  if constexpr (has_last) {
    for_last_lanes<R>(q, n, [&](auto lanes, int q) {
      const auto g = lanes.load_from(row + q);
      for (int i = 0; i < 4; ++i) {
        if constexpr (lanes.is_vector) {
          s[i] += g * lanes.load_from(from[i] + q);
        } else {
          last[i] += g * lanes.load_from(from[i] + q);
        }
      }
    });
  }
  if constexpr (has_vectors || has_masks) {
    for (int i = 0; i < 4; ++i) {
      s[i] += t[i];
    }
    lane_sums(s, sums);
  } else {
    sums[0] = sums[1] = sums[2] = sums[3] = R(0);
  }
  if constexpr (has_last) {
    for (int i = 0; i < 4; ++i) {
      sums[i] += last[i];
    }
  }
}

// Adds a row of n channels, weighted, to each corner. Vectors of all corners
// are loaded before any is stored, so that no load waits for a store in a row
// of the same place in the cache.
template <int length = any_length, typename G, typename R>
static MLX_DEFORM_INLINE void
add_to_corners(const G* row, int n, const R (&w)[4], R* const (&to)[4]) {
  const R w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  R *to0 = to[0], *to1 = to[1], *to2 = to[2], *to3 = to[3];
  for_lanes<R, length>(n, [&](auto lanes, int q) {
    const auto g = lanes.load_from(row + q);
    const auto v0 = lanes.load_from(to0 + q) + w0 * g;
    const auto v1 = lanes.load_from(to1 + q) + w1 * g;
    const auto v2 = lanes.load_from(to2 + q) + w2 * g;
    const auto v3 = lanes.load_from(to3 + q) + w3 * g;
    lanes.store_to(to0 + q, v0);
    lanes.store_to(to1 + q, v1);
    lanes.store_to(to2 + q, v2);
    lanes.store_to(to3 + q, v3);
  });
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
