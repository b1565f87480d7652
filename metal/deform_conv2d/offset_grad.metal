// Gradients of the columns by offset and mask: sums over the channels that
// share a sample. A segment of 1 to 32 neighbouring lanes of a SIMD group takes
// one sample and adds up by shuffles: no atomics, no shared memory, the same
// order of additions on every run.
//
// Value and slopes are three combinations of the same four numbers, so a lane
// sums grad * pixel per corner and the weights are applied once at the end.

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/deform_conv2d/column_cotangent.h"
#include "metal/deform_conv2d/function_constants.h"
#include "metal/kernel_names.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

using namespace mlx_deform;

// Samples are numbered in the order of the columns; a threadgroup takes
// group_size.x / segment_lanes of them.
template <typename T, int V, typename Index>
[[kernel]] void deform_offset_grad(
    const device T* input [[buffer(0)]], // (N, H, W, C)
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    const device T* grad_columns
    [[buffer(3), function_constant(has_columns)]], // by column_index
    device float* grad_offset
    [[buffer(4), function_constant(wants_offset)]], // as offset
    device float* grad_mask
    [[buffer(5), function_constant(wants_mask)]], // as mask
    constant DeformConv2dParams& p [[buffer(6)]],
    const device T* cotangent
    [[buffer(7), function_constant(is_direct)]], // (N, Ho, Wo, O)
    const device T* weight
    [[buffer(8), function_constant(is_direct)]], // (O, kH, kW, C / G)
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
  const Index sample = simd_index * Index(segments) + Index(segment);

  const int samples_per_pixel = p.kH * p.kW * p.DG;
  const Index pixel = sample / Index(samples_per_pixel);
  const int rest = int(sample - pixel * Index(samples_per_pixel));
  SampleId<Index> id;
  id.pixel = Index(p.pixel_begin) + pixel;
  id.tap = rest / p.DG;
  id.group = rest - id.tap * p.DG;
  // Lanes without a sample stay for the shuffles.
  const bool active = id.pixel < Index(p.pixel_end);

  BilinearCell<float> cell =
      bilinear_cell<float>(not_a_number(), not_a_number(), p.H, p.W);
  CornerWeights<float> sums; // over the lane's channels, of grad * corner
  for (int i = 0; i < 4; ++i) {
    sums.w[i] = 0.0f;
  }
  if (active) {
    const SamplePosition<Index> position =
        sample_position<Index>(id, p, offset);
    cell = bilinear_cell<float>(position.y, position.x, p.H, p.W);
    if (cell.inside) {
      const Index corners = cell_index<Index>(position.image, cell, p);
      const int width = p.C / p.DG;
      for (int c = lane * V; c < width; c += segment_lanes * V) {
        const int channel = id.group * width + c;
        const Channels<V> grad = column_cotangent<T, V, Index>(
            grad_columns, cotangent, weight, id, channel, p);
        const Corners<V> pixels =
            load_corners<T, V, Index>(input, cell, corners, channel, p);
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
    const Index at = sample_index<Index>(id, p);
    const float outside = cell.nan ? not_a_number() : 0.0f;
    if (wants_offset) {
      float scale = 1.0f;
      if (has_mask) {
        scale = mask[at];
      }
      grad_offset[2 * at] = cell.inside
          ? scale * weighted_sum(slope_weights_y<float>(cell), sums)
          : outside;
      grad_offset[2 * at + 1] = cell.inside
          ? scale * weighted_sum(slope_weights_x<float>(cell), sums)
          : outside;
    }
    if (wants_mask) {
      grad_mask[at] = cell.inside
          ? weighted_sum(value_weights<float>(cell), sums)
          : outside;
    }
  }
}

MLX_DEFORM_INSTANTIATE(
    deform_offset_grad_v1,
    deform_offset_grad<MLX_DEFORM_T, 1, MLX_DEFORM_INDEX>)
MLX_DEFORM_INSTANTIATE(
    deform_offset_grad_v4,
    deform_offset_grad<MLX_DEFORM_T, 4, MLX_DEFORM_INDEX>)
#if MLX_DEFORM_T_BYTES == 2
MLX_DEFORM_INSTANTIATE(
    deform_offset_grad_v8,
    deform_offset_grad<MLX_DEFORM_T, 8, MLX_DEFORM_INDEX>)
#endif
