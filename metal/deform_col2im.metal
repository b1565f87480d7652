// Gradient of the columns by the input: every sample's gradient, times its
// mask, is added to the four corners it came from. grad_input is accumulated in
// float32, whatever T is, and must hold zeros or an earlier sum.

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/function_constants.h"
#include "metal/kernel_names.h"
#include "mlx_ops/gpu/deform_sample.h"

using namespace mlx_deform;

// Scatter with atomics: the order of the additions, and with it the rounding,
// varies from run to run. A thread takes single channels: neighbouring threads
// then add to neighbouring words, one cache line for a whole SIMD group, where
// vectors would spread each addition over several lines.
//
// grid: (lanes, kH * kW * DG, pixels)
template <typename T, typename Index>
[[kernel]] void deform_col2im(
    const device T* grad_columns [[buffer(0)]], // by column_index
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    device metal::atomic_float* grad_input [[buffer(3)]], // (N, H, W, C)
    constant DeformConv2dParams& p [[buffer(4)]],
    metal::uint3 at [[thread_position_in_grid]],
    metal::uint3 grid [[threads_per_grid]]) {
  SampleId<Index> id;
  id.pixel = Index(p.pixel_begin) + Index(at.z);
  id.tap = int(at.y) / p.DG;
  id.group = int(at.y) - id.tap * p.DG;

  const SamplePosition<Index> position = sample_position<Index>(id, p, offset);
  const BilinearCell<float> cell =
      bilinear_cell<float>(position.y, position.x, p.H, p.W);
  if (!cell.inside) { // beyond the image or NaN: no pixel has a share
    return;
  }
  const CornerWeights<float> weights = value_weights<float>(cell);
  const Index corners = cell_index<Index>(position.image, cell, p);
  float scale = 1.0f;
  if (has_mask) {
    scale = mask[sample_index<Index>(id, p)];
  }

  const int width = p.C / p.DG;
  for (int c = int(at.x); c < width; c += int(grid.x)) {
    const int channel = id.group * width + c;
    const float grad = scale *
        static_cast<float>(grad_columns[column_index<Index>(id, channel, p)]);
    for (int i = 0; i < 4; ++i) {
      const float share = weights.w[i] * grad;
      // Integer offsets, zero ones above all, leave three corners without a
      // share: no atomic for those. A NaN is not equal to zero and is added.
      if (cell.corner[i] && share != 0.0f) {
        metal::atomic_fetch_add_explicit(
            grad_input + corner_index<Index>(corners, i, channel, p),
            share,
            metal::memory_order_relaxed);
      }
    }
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
    const device T* grad_columns [[buffer(0)]], // by column_index
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    device float* grad_input [[buffer(3)]], // (N, H, W, C)
    constant DeformConv2dParams& p [[buffer(4)]],
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
        float grad = static_cast<float>(
            grad_columns[column_index<Index>(hit_id, channel, p)]);
        if (has_mask) {
          grad *= mask[sample_index<Index>(hit_id, p)];
        }
        for (int i = 0; i < 4; ++i) {
          const bool touches_row = cell.y + (i >> 1) == row;
          if (cell.corner[i] && touches_row) {
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
    deform_col2im,
    deform_col2im<MLX_DEFORM_T, MLX_DEFORM_INDEX>)
MLX_DEFORM_INSTANTIATE(
    deform_col2im_ordered,
    deform_col2im_ordered<MLX_DEFORM_T, MLX_DEFORM_INDEX>)
