// The four kernels of multi-scale deformable attention as plain loops, for the
// stand-in of a GPU (mlx_ops/stand_in). R is float or double, the type of all
// sums; half types are converted before and after. Arrays are row-contiguous,
// and indexed as the kernels index them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "mlx_ops/multi_scale_deformable_attention/cell.h"
#include "mlx_ops/multi_scale_deformable_attention/params.h"

namespace mlx_deform::stand_in {

// Calls f(row, head, sample, level, cell) for each sample of the launch's rows.
template <typename R, typename F>
void for_each_msda_sample(
    const MsdaParams& p,
    const R* locations, // (N, Q, M, K, 2)
    const int* levels, // (L, 4)
    const F& f) {
  for (int64_t row = p.query_begin; row < p.query_end; ++row) {
    for (int m = 0; m < p.M; ++m) {
      int l = 0;
      for (int k = 0; k < p.K; ++k) {
        while (l + 1 < p.L && levels[4 * (l + 1) + 3] <= k) {
          ++l;
        }
        const MsdaLevel level = {
            levels[4 * l],
            levels[4 * l + 1],
            levels[4 * l + 2],
            levels[4 * l + 3]};
        const int64_t sample = (row * p.M + m) * p.K + k;
        const R* at = locations + 2 * sample;
        f(row,
          m,
          sample,
          level,
          location_cell<R>(at[1], at[0], level.H, level.W, p.is_discrete != 0));
      }
    }
  }
}

// Channel 0 of the head in a corner that lies inside.
template <typename R>
int64_t msda_corner(
    const MsdaParams& p,
    int64_t row,
    int head,
    const MsdaLevel& level,
    const BilinearCell<R>& cell,
    int corner) {
  const int64_t y = cell.y + (corner >> 1);
  const int64_t x = cell.x + (corner & 1);
  const int64_t pixel = row / p.Q * p.S + level.start + y * level.W + x;
  return (pixel * p.M + head) * p.D;
}

template <typename R>
void msda_forward(
    const MsdaParams& p,
    const R* value, // (N, S, M, D)
    const R* locations, // (N, Q, M, K, 2)
    const R* weights, // (N, Q, M, K)
    const int* levels, // (L, 4)
    R* out) { // (N, Q, M, D)
  std::fill(
      out + p.query_begin * p.M * p.D, out + p.query_end * p.M * p.D, R(0));
  for_each_msda_sample<R>(
      p,
      locations,
      levels,
      [&](int64_t row,
          int head,
          int64_t sample,
          const MsdaLevel& level,
          const BilinearCell<R>& cell) {
        R* sum = out + (row * p.M + head) * p.D;
        const CornerWeights<R> corners = value_weights<R>(cell);
        const R weight =
            cell.nan ? std::numeric_limits<R>::quiet_NaN() : weights[sample];
        for (int c = 0; c < p.D; ++c) {
          R sampled = 0;
          for (int i = 0; i < 4; ++i) {
            if (cell.corner[i]) {
              sampled += corners.w[i] *
                  value[msda_corner(p, row, head, level, cell, i) + c];
            }
          }
          sum[c] += weight * sampled;
        }
      });
}

// Of either stem: the order here is fixed.
template <typename R>
void msda_grad_value(
    const MsdaParams& p,
    const R* cotangent, // (N, Q, M, D)
    const R* locations, // (N, Q, M, K, 2)
    const R* weights, // (N, Q, M, K)
    const int* levels, // (L, 4)
    R* grad_value) { // (N, S, M, D)
  for_each_msda_sample<R>(
      p,
      locations,
      levels,
      [&](int64_t row,
          int head,
          int64_t sample,
          const MsdaLevel& level,
          const BilinearCell<R>& cell) {
        const R* grad = cotangent + (row * p.M + head) * p.D;
        const CornerWeights<R> corners = value_weights<R>(cell);
        for (int i = 0; i < 4; ++i) {
          if (cell.corner[i]) {
            R* to = grad_value + msda_corner(p, row, head, level, cell, i);
            for (int c = 0; c < p.D; ++c) {
              to[c] += weights[sample] * corners.w[i] * grad[c];
            }
          }
        }
      });
}

// Either gradient may be null.
template <typename R>
void msda_grad_samples(
    const MsdaParams& p,
    const R* value, // (N, S, M, D)
    const R* cotangent, // (N, Q, M, D)
    const R* locations, // (N, Q, M, K, 2)
    const R* weights, // (N, Q, M, K), where grad_locations is wanted
    const int* levels, // (L, 4)
    R* grad_locations, // as locations
    R* grad_weights) { // as weights
  for_each_msda_sample<R>(
      p,
      locations,
      levels,
      [&](int64_t row,
          int head,
          int64_t sample,
          const MsdaLevel& level,
          const BilinearCell<R>& cell) {
        const R* grad = cotangent + (row * p.M + head) * p.D;
        const CornerWeights<R> along_y = slope_weights_y<R>(cell);
        const CornerWeights<R> along_x = slope_weights_x<R>(cell);
        const CornerWeights<R> corners = value_weights<R>(cell);
        const R outside = cell.nan ? std::numeric_limits<R>::quiet_NaN() : R(0);
        R slope_y = p.is_discrete ? R(0) : outside;
        R slope_x = slope_y;
        R sampled = outside;
        for (int i = 0; i < 4; ++i) {
          if (cell.corner[i]) {
            const R* from = value + msda_corner(p, row, head, level, cell, i);
            R sum = 0;
            for (int c = 0; c < p.D; ++c) {
              sum += grad[c] * from[c];
            }
            sampled += corners.w[i] * sum;
            if (!p.is_discrete) {
              slope_y += along_y.w[i] * sum;
              slope_x += along_x.w[i] * sum;
            }
          }
        }
        if (grad_locations) {
          grad_locations[2 * sample] = weights[sample] * R(level.W) * slope_x;
          grad_locations[2 * sample + 1] =
              weights[sample] * R(level.H) * slope_y;
        }
        if (grad_weights) {
          grad_weights[sample] = sampled;
        }
      });
}

} // namespace mlx_deform::stand_in
