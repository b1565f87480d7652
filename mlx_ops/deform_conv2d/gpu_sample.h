// What the GPU kernels of a deformable convolution share, in Metal and in CUDA:
// which sample a thread works on, where the sample lies, and where its elements
// are. Each language includes its own Channels and ChannelIO before this.
//
// A sample is one (output pixel, kernel tap, offset group): one offset, one
// cell, four corners, shared by C / DG channels. Index is the type of an
// element's position in an array, int or long.

#pragma once

#include "mlx_ops/deform_conv2d/params.h"
#include "mlx_ops/sampling.h"

namespace mlx_deform {

template <typename Index>
struct SampleId {
  Index pixel; // n * Ho * Wo + ho * Wo + wo
  int tap; // i * kW + j
  int group; // offset group
};

template <typename Index>
struct SamplePosition {
  Index image;
  float y;
  float x;
};

// Where the sample's offset pair, halved, and its mask lie.
template <typename Index>
MLX_DEFORM_FN Index
sample_index(SampleId<Index> id, MLX_DEFORM_CONSTANT DeformConv2dParams& p) {
  const int taps = p.kH * p.kW;
  return (id.pixel * Index(p.DG) + Index(id.group)) * Index(taps) +
      Index(id.tap);
}

template <typename Index>
MLX_DEFORM_FN SamplePosition<Index> sample_position(
    SampleId<Index> id,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p,
    const MLX_DEFORM_DEVICE float* offset) {
  const Index row = id.pixel / Index(p.Wo);
  const int wo = int(id.pixel - row * Index(p.Wo));
  SamplePosition<Index> out;
  out.image = row / Index(p.Ho);
  const int ho = int(row - out.image * Index(p.Ho));
  const int i = id.tap / p.kW;
  const int j = id.tap - i * p.kW;
  const Index at = 2 * sample_index<Index>(id, p);
  out.y = sample_coordinate<float>(
      ho, p.stride_h, p.pad_h, i, p.dilation_h, offset[at]);
  out.x = sample_coordinate<float>(
      wo, p.stride_w, p.pad_w, j, p.dilation_w, offset[at + 1]);
  return out;
}

// The first channel of corner 0. The corner may lie outside the image and the
// index be negative: corner_index is meaningful for corners inside only.
template <typename Index>
MLX_DEFORM_FN Index cell_index(
    Index image,
    BilinearCell<float> cell,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p) {
  const Index row = image * Index(p.H) + Index(cell.y);
  return (row * Index(p.W) + Index(cell.x)) * Index(p.C);
}

template <typename Index>
MLX_DEFORM_FN Index corner_index(
    Index cell,
    int corner,
    int channel,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p) {
  const int below = corner >> 1;
  const int right = corner & 1;
  return cell + Index(below * p.W + right) * Index(p.C) + Index(channel);
}

template <int V>
struct Corners {
  Channels<V> at[4];
};

// V channels of the four corners, all on their way before the first is used. A
// corner outside the image is 0 and not read: at a clamped address, an infinite
// pixel would leak as 0 * Inf.
template <typename T, int V, typename Index>
MLX_DEFORM_FN Corners<V> load_corners(
    const MLX_DEFORM_DEVICE T* input,
    BilinearCell<float> cell,
    Index cell_at,
    int channel,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p) {
  Corners<V> out;
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < V; ++v) {
      out.at[i].at[v] = 0.0f;
    }
    if (cell.corner[i]) {
      out.at[i] = ChannelIO<T, V>::load(
          input + corner_index<Index>(cell_at, i, channel, p));
    }
  }
  return out;
}

// The sample's V channels: the corners' weighted sum, times `scale`.
template <int V>
MLX_DEFORM_FN Channels<V>
interpolate(CornerWeights<float> weights, Corners<V> pixels, float scale) {
  Channels<V> out;
  for (int v = 0; v < V; ++v) {
    float value = 0.0f;
    for (int i = 0; i < 4; ++i) {
      value += weights.w[i] * pixels.at[i].at[v];
    }
    out.at[v] = scale * value;
  }
  return out;
}

// One combination of four corners that were summed over channels.
MLX_DEFORM_FN float weighted_sum(
    CornerWeights<float> weights,
    CornerWeights<float> sums) {
  return weights.w[0] * sums.w[0] + weights.w[1] * sums.w[1] +
      weights.w[2] * sums.w[2] + weights.w[3] * sums.w[3];
}

template <typename Index>
MLX_DEFORM_FN Index column_index(
    SampleId<Index> id,
    int channel,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p) {
  const int group_width = p.C / p.G;
  const int g = p.G == 1 ? 0 : channel / group_width;
  return Index(g) * Index(p.column_group) +
      (id.pixel - Index(p.pixel_begin)) * Index(p.column_pixel) +
      Index(id.tap) * Index(p.column_tap) + Index(channel - g * group_width);
}

} // namespace mlx_deform
