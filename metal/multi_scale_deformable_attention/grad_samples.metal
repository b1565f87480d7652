// Gradients of multi-scale deformable attention by its locations and weights:
// sums over the D channels that share a sample. A segment of 1 to 32
// neighbouring lanes of a SIMD group takes one sample and adds up by shuffles:
// no atomics, no shared memory, the same order of additions on every run.
//
// Value and slopes are three combinations of the same four numbers, so a lane
// sums cotangent * pixel per corner and the corners' weights come once at the
// end.

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/deform_conv2d/function_constants.h"
#include "metal/kernel_names.h"
#include "metal/multi_scale_deformable_attention/function_constants.h"
#include "mlx_ops/multi_scale_deformable_attention/gpu_sample.h"

using namespace mlx_deform;

// Samples of a head are numbered by (row, k), and a threadgroup takes
// group_size.x / segment_lanes of them; its number is y * groups.x + x.
//
// grid: (threads, rows of threadgroups, M)
template <typename T, int V, typename Index>
[[kernel]] void msda_grad_samples(
    const device T* value [[buffer(0)]], // (N, S, M, D)
    const device T* cotangent [[buffer(1)]], // (N, Q, M, D)
    const device float* locations [[buffer(2)]], // (N, Q, M, K, 2)
    const device float* weights
    [[buffer(3), function_constant(wants_locations)]], // (N, Q, M, K)
    constant int* levels [[buffer(4)]], // (L, 4)
    device float* grad_locations
    [[buffer(5), function_constant(wants_locations)]], // as locations
    device float* grad_weights
    [[buffer(6), function_constant(wants_weights)]], // as weights
    constant MsdaParams& p [[buffer(7)]],
    metal::uint3 group_at [[threadgroup_position_in_grid]],
    metal::uint3 groups [[threadgroups_per_grid]],
    metal::uint3 group_size [[threads_per_threadgroup]],
    uint simd_at [[simdgroup_index_in_threadgroup]],
    uint simd_lane [[thread_index_in_simdgroup]]) {
  const int segments = 32 / segment_lanes; // in a SIMD group
  const int segment = int(simd_lane) / segment_lanes;
  const int lane = int(simd_lane) - segment * segment_lanes;
  const Index group_index =
      Index(group_at.y) * Index(groups.x) + Index(group_at.x);
  const Index simd_index =
      group_index * Index(group_size.x / 32) + Index(simd_at);
  const Index number = simd_index * Index(segments) + Index(segment);

  const int head = int(group_at.z);
  const Index rows_before = number / Index(p.K);
  const Index row = Index(p.query_begin) + rows_before;
  const int k = int(number - rows_before * Index(p.K));
  // Lanes without a sample stay for the shuffles.
  const bool active = row < Index(p.query_end);

  Level level = level_at(levels, 0, p);
  BilinearCell<float> cell = bilinear_cell<float>(NAN, NAN, level.H, level.W);
  CornerWeights<float> sums; // over the lane's channels, of cotangent * corner
  for (int i = 0; i < 4; ++i) {
    sums.w[i] = 0.0f;
  }
  const Index sample =
      active ? samples_index<Index>(row, head, p) + Index(k) : 0;
  if (active) {
    level = level_of_sample(levels, k, p);
    cell = sample_cell<Index>(locations, sample, level, is_discrete);
    if (cell.inside) {
      const Index image = row / Index(p.Q);
      const Index query_at = query_index<Index>(row, head, p);
      const Index cell_at = head_cell_index<Index>(image, head, level, cell, p);
      for (int c = lane * V; c < p.D; c += segment_lanes * V) {
        const Channels<V> grad =
            ChannelIO<T, V>::load(cotangent + query_at + Index(c));
        const Corners<V> pixels =
            load_head_corners<T, V, Index>(value, cell_at, c, level, cell, p);
        for (int i = 0; i < 4; ++i) {
          if (cell.corner[i]) { // Inf * 0 would be NaN
            for (int v = 0; v < V; ++v) {
              sums.w[i] += grad.at[v] * pixels.at[i].at[v];
            }
          }
        }
      }
    }
  }
  for (int step = segment_lanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < 4; ++i) {
      sums.w[i] += metal::simd_shuffle_xor(sums.w[i], ushort(step));
    }
  }

  if (active && lane == 0) {
    const float outside = cell.nan ? NAN : 0.0f;
    if (wants_locations) {
      float grad_x = is_discrete ? 0.0f : outside;
      float grad_y = grad_x;
      if (!is_discrete && cell.inside) {
        const float scale = weights[sample];
        grad_x = scale * float(level.W) *
            weighted_sum(slope_weights_x<float>(cell), sums);
        grad_y = scale * float(level.H) *
            weighted_sum(slope_weights_y<float>(cell), sums);
      }
      grad_locations[2 * sample] = grad_x;
      grad_locations[2 * sample + 1] = grad_y;
    }
    if (wants_weights) {
      grad_weights[sample] = cell.inside
          ? weighted_sum(value_weights<float>(cell), sums)
          : outside;
    }
  }
}

MLX_DEFORM_INSTANTIATE(
    msda_grad_samples_v1,
    msda_grad_samples<MLX_DEFORM_T, 1, MLX_DEFORM_INDEX>)
MLX_DEFORM_INSTANTIATE(
    msda_grad_samples_v4,
    msda_grad_samples<MLX_DEFORM_T, 4, MLX_DEFORM_INDEX>)
#if MLX_DEFORM_T_BYTES == 2
MLX_DEFORM_INSTANTIATE(
    msda_grad_samples_v8,
    msda_grad_samples<MLX_DEFORM_T, 8, MLX_DEFORM_INDEX>)
#endif
