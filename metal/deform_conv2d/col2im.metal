// Gradient of the columns by the input: every sample's gradient, times its
// mask, is added to the four corners it came from. grad_input is accumulated in
// float32, whatever T is, and must hold zeros or an earlier sum.

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/deform_conv2d/column_cotangent.h"
#include "metal/deform_conv2d/function_constants.h"
#include "metal/kernel_names.h"
#include "mlx_ops/deform_conv2d/corner_sums.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

using namespace mlx_deform;

template <typename Index>
struct ImagePlace {
  device metal::atomic_float* grad_input;
  int step; // between the channels of a thread

  void add(Index at, int k, float sum) {
    metal::atomic_fetch_add_explicit(
        grad_input + at + Index(k * step), sum, metal::memory_order_relaxed);
  }
};

// Scatter with atomics: the order of the additions, and with it the rounding,
// varies from run to run. Neighbouring threads take neighbouring channels: they
// then add to neighbouring words, one cache line for a whole SIMD group, where
// vectors would spread each addition over several lines. A thread takes V
// channels, a row of threads apart, of pixels_per_thread pixels.
//
// grid: (lanes * blocks of V channels, kH * kW * DG, runs of pixels)
template <typename T, int V, typename Index>
[[kernel]] void deform_col2im(
    const device T* grad_columns
    [[buffer(0), function_constant(has_columns)]], // by column_index
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    device metal::atomic_float* grad_input [[buffer(3)]], // (N, H, W, C)
    constant DeformConv2dParams& p [[buffer(4)]],
    const device T* cotangent
    [[buffer(5), function_constant(is_direct)]], // (N, Ho, Wo, O)
    const device T* weight
    [[buffer(6), function_constant(is_direct)]], // (O, kH, kW, C / G)
    metal::uint3 at [[thread_position_in_grid]],
    metal::uint3 grid [[threads_per_grid]]) {
  SampleId<Index> id;
  id.tap = int(at.y) / p.DG;
  id.group = int(at.y) - id.tap * p.DG;
  const int width = p.C / p.DG;
  const int first = id.group * width; // channel of the group
  const int channel = first + int(at.x);
  ImagePlace<Index> place;
  place.grad_input = grad_input;
  place.step = int(grid.x);

  const Index begin =
      Index(p.pixel_begin) + Index(at.z) * Index(pixels_per_thread);
  const Index end =
      metal::min(begin + Index(pixels_per_thread), Index(p.pixel_end));
  CornerSums<V, Index> sums = no_sums<V, Index>();
  for (id.pixel = begin; id.pixel < end; ++id.pixel) {
    const SamplePosition<Index> position =
        sample_position<Index>(id, p, offset);
    const BilinearCell<float> cell =
        bilinear_cell<float>(position.y, position.x, p.H, p.W);
    if (!cell.inside) { // beyond the image or NaN: no pixel has a share
      continue;
    }
    sums = move_to<V, Index>(
        cell_index<Index>(position.image, cell, p), sums, channel, p, place);
    const CornerWeights<float> weights = value_weights<float>(cell);
    float scale = 1.0f;
    if (has_mask) {
      scale = mask[sample_index<Index>(id, p)];
    }
    for (int k = 0; k < V; ++k) {
      if (channel + k * place.step < first + width) {
        const float grad = scale *
            column_cotangent<T, 1, Index>(
                grad_columns,
                cotangent,
                weight,
                id,
                channel + k * place.step,
                p)
                .at[0];
        for (int i = 0; i < 4; ++i) {
          // An infinite gradient leaves a corner without weight alone.
          if (cell.corner[i] && weights.w[i] != 0.0f) {
            sums.at[i][k] += weights.w[i] * grad;
          }
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    sums = let_go<V, Index>(sums, i, channel, p, place);
  }
}

// The same sum in a fixed order, without atomics: bitwise equal on every run.
// A SIMD group owns one image row of 32 channels of an offset group, one
// channel a lane, and nobody else writes there. It walks the image's samples in
// the order of the columns: its lanes look at 32 samples at once, and those
// that touch the row are taken up one by one, all lanes adding their channel.
//
// grid: (groups of 32 lanes * group size, ...): `tasks` SIMD groups, see below
template <typename T, typename Index>
[[kernel]] void deform_col2im_ordered(
    const device T* grad_columns
    [[buffer(0), function_constant(has_columns)]], // by column_index
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    device float* grad_input [[buffer(3)]], // (N, H, W, C)
    constant DeformConv2dParams& p [[buffer(4)]],
    const device T* cotangent
    [[buffer(5), function_constant(is_direct)]], // (N, Ho, Wo, O)
    const device T* weight
    [[buffer(6), function_constant(is_direct)]], // (O, kH, kW, C / G)
    metal::uint3 group_at [[threadgroup_position_in_grid]],
    metal::uint3 group_size [[threads_per_threadgroup]],
    uint simd_at [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int width = p.C / p.DG;
  const int blocks = (width + 31) / 32;

  // Which row and channels: x counts the channel blocks of all offset groups,
  // y the rows of all images.
  const int task = int(group_at.x * (group_size.x / 32) + simd_at);
  const int group = task / blocks;
  const int c = (task - group * blocks) * 32 + int(lane);
  if (group >= p.DG) { // a whole SIMD group, so no lane is missed below
    return;
  }
  const Index image = Index(group_at.y) / Index(p.H);
  const int row = int(Index(group_at.y) - image * Index(p.H));
  const int channel = group * width + c;
  const Index row_index =
      Index(group_at.y) * Index(p.W) * Index(p.C) + Index(channel);

  // The image's pixels among those of this launch.
  const int taps = p.kH * p.kW;
  const Index plane = Index(p.Ho) * Index(p.Wo);
  const Index first = metal::max(Index(p.pixel_begin), image * plane);
  const Index last = metal::min(Index(p.pixel_end), (image + 1) * plane);

  SampleId<Index> id;
  id.group = group;
  // 32 samples from (pixel, tap) on; a block may end in a later pixel.
  Index pixel = first;
  int tap = 0;
  while (pixel < last) {
    int mine = tap + int(lane);
    id.pixel = pixel + Index(mine / taps);
    id.tap = mine % taps;
    bool touches = false;
    float y = 0.0f;
    float x = 0.0f;
    if (id.pixel < last) {
      const SamplePosition<Index> position =
          sample_position<Index>(id, p, offset);
      y = position.y;
      x = position.x;
      const BilinearCell<float> cell = bilinear_cell<float>(y, x, p.H, p.W);
      touches = cell.inside && (cell.y == row || cell.y + 1 == row);
    }
    uint hits = metal::simd_or(touches ? 1u << lane : 0u);
    while (hits != 0u) {
      const ushort source = ushort(metal::ctz(hits));
      hits &= hits - 1u;
      const float hit_y = metal::simd_broadcast(y, source);
      const float hit_x = metal::simd_broadcast(x, source);
      if (c < width) {
        const int hit = tap + int(source);
        SampleId<Index> hit_id;
        hit_id.group = group;
        hit_id.pixel = pixel + Index(hit / taps);
        hit_id.tap = hit % taps;
        const BilinearCell<float> cell =
            bilinear_cell<float>(hit_y, hit_x, p.H, p.W);
        const CornerWeights<float> weights = value_weights<float>(cell);
        float grad = column_cotangent<T, 1, Index>(
                         grad_columns, cotangent, weight, hit_id, channel, p)
                         .at[0];
        if (has_mask) {
          grad *= mask[sample_index<Index>(hit_id, p)];
        }
        for (int i = 0; i < 4; ++i) {
          const bool touches_row = cell.y + (i >> 1) == row;
          if (cell.corner[i] && touches_row && weights.w[i] != 0.0f) {
            const Index x_at = Index(cell.x + (i & 1));
            grad_input[row_index + x_at * Index(p.C)] += weights.w[i] * grad;
          }
        }
      }
    }
    tap += 32;
    pixel += Index(tap / taps);
    tap = tap % taps;
  }
}

MLX_DEFORM_INSTANTIATE(
    deform_col2im_v1,
    deform_col2im<MLX_DEFORM_T, 1, MLX_DEFORM_INDEX>)
MLX_DEFORM_INSTANTIATE(
    deform_col2im_v2,
    deform_col2im<MLX_DEFORM_T, 2, MLX_DEFORM_INDEX>)
#if MLX_DEFORM_INDEX_BITS == 32
MLX_DEFORM_INSTANTIATE(
    deform_col2im_v4,
    deform_col2im<MLX_DEFORM_T, 4, MLX_DEFORM_INDEX>)
#endif
MLX_DEFORM_INSTANTIATE(
    deform_col2im_ordered,
    deform_col2im_ordered<MLX_DEFORM_T, MLX_DEFORM_INDEX>)
