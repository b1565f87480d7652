// What the GPU kernels of multi-scale deformable attention share, in Metal and
// in CUDA: the levels, a sample's cell, and where its elements are. Each
// language includes its own Channels and ChannelIO before this.
//
// A sample is one (query, head, sample number): one location, one weight, one
// cell, four corners, shared by the D channels of the head. Index is the type
// of an element's position in an array, int or long.

#pragma once

#include "mlx_ops/deform_conv2d/gpu_sample.h"
#include "mlx_ops/multi_scale_deformable_attention/cell.h"
#include "mlx_ops/multi_scale_deformable_attention/params.h"

namespace mlx_deform {

struct Level {
  int H;
  int W;
  int start; // its first pixel in S
  int first_sample; // of K
  int last_sample; // beyond the last one
};

// The table is the same for all threads: Metal's constant memory is made for
// that.
MLX_DEFORM_FN Level level_at(
    MLX_DEFORM_CONSTANT int* levels, // (L, 4)
    int l,
    MLX_DEFORM_CONSTANT MsdaParams& p) {
  Level out;
  out.H = levels[4 * l];
  out.W = levels[4 * l + 1];
  out.start = levels[4 * l + 2];
  out.first_sample = levels[4 * l + 3];
  out.last_sample = l + 1 < p.L ? levels[4 * (l + 1) + 3] : p.K;
  return out;
}

// The level that sample k lies on.
MLX_DEFORM_FN Level level_of_sample(
    MLX_DEFORM_CONSTANT int* levels, // (L, 4)
    int k,
    MLX_DEFORM_CONSTANT MsdaParams& p) {
  int l = 0;
  while (l + 1 < p.L && levels[4 * (l + 1) + 3] <= k) {
    ++l;
  }
  return level_at(levels, l, p);
}

// Of sample 0 of a query and head, in the weights; twice that in the locations.
template <typename Index>
MLX_DEFORM_FN Index
samples_index(Index row, int head, MLX_DEFORM_CONSTANT MsdaParams& p) {
  return (row * Index(p.M) + Index(head)) * Index(p.K);
}

// Of channel 0 of a query and head, in the output and its cotangent.
template <typename Index>
MLX_DEFORM_FN Index
query_index(Index row, int head, MLX_DEFORM_CONSTANT MsdaParams& p) {
  return (row * Index(p.M) + Index(head)) * Index(p.D);
}

template <typename Index>
MLX_DEFORM_FN BilinearCell<float> sample_cell(
    const MLX_DEFORM_DEVICE float* locations, // (N, Q, M, K, 2)
    Index sample,
    Level level,
    bool discrete) {
  const float x = locations[2 * sample];
  const float y = locations[2 * sample + 1];
  return location_cell<float>(y, x, level.H, level.W, discrete);
}

// Channel 0 of one head in corner 0. The corner may lie outside the map and the
// index be negative: head_corner_index is meaningful for corners inside only.
template <typename Index>
MLX_DEFORM_FN Index head_cell_index(
    Index image,
    int head,
    Level level,
    BilinearCell<float> cell,
    MLX_DEFORM_CONSTANT MsdaParams& p) {
  const Index pixel = image * Index(p.S) + Index(level.start) +
      Index(cell.y) * Index(level.W) + Index(cell.x);
  return (pixel * Index(p.M) + Index(head)) * Index(p.D);
}

template <typename Index>
MLX_DEFORM_FN Index head_corner_index(
    Index cell_at,
    int corner,
    Level level,
    MLX_DEFORM_CONSTANT MsdaParams& p) {
  const int below = corner >> 1;
  const int right = corner & 1;
  return cell_at + Index(below * level.W + right) * Index(p.M * p.D);
}

// V channels of the four corners, all on their way before the first is used. A
// corner outside the map is 0 and not read, see load_corners.
template <typename T, int V, typename Index>
MLX_DEFORM_FN Corners<V> load_head_corners(
    const MLX_DEFORM_DEVICE T* value, // (N, S, M, D)
    Index cell_at,
    int channel,
    Level level,
    BilinearCell<float> cell,
    MLX_DEFORM_CONSTANT MsdaParams& p) {
  Corners<V> out;
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < V; ++v) {
      out.at[i].at[v] = 0.0f;
    }
    if (cell.corner[i]) {
      out.at[i] = ChannelIO<T, V>::load(
          value + head_corner_index<Index>(cell_at, i, level, p) +
          Index(channel));
    }
  }
  return out;
}

} // namespace mlx_deform
