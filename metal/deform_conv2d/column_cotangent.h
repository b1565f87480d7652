// The cotangent of a column element where weight groups are small: not read,
// but made of the output's cotangent and the weight when it is needed.

#pragma once

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/deform_conv2d/function_constants.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

namespace mlx_deform {

// The sum over the group's outputs of cotangent * weight.
template <typename T, typename Index>
inline float direct_column_cotangent(
    const device T* cotangent, // (N, Ho, Wo, O)
    const device T* weight, // (O, kH, kW, C / G)
    SampleId<Index> id,
    int channel,
    constant DeformConv2dParams& p) {
  const int group_width = p.C / p.G;
  const int outputs = p.O / p.G;
  const int g = channel / group_width;
  const int taps = p.kH * p.kW;
  const Index pixel = id.pixel * Index(p.O);
  float sum = 0.0f;
  for (int o = g * outputs; o < (g + 1) * outputs; ++o) {
    const Index at =
        (Index(o) * Index(taps) + Index(id.tap)) * Index(group_width) +
        Index(channel - g * group_width);
    sum += static_cast<float>(cotangent[pixel + Index(o)]) *
        static_cast<float>(weight[at]);
  }
  return sum;
}

// V channels of it, from wherever the launch has it.
template <typename T, int V, typename Index>
inline Channels<V> column_cotangent(
    const device T* grad_columns, // by column_index, where has_columns
    const device T* cotangent, // where is_direct
    const device T* weight, // where is_direct
    SampleId<Index> id,
    int channel,
    constant DeformConv2dParams& p) {
  Channels<V> out;
  if (is_direct) {
    for (int v = 0; v < V; ++v) {
      out.at[v] = direct_column_cotangent<T, Index>(
          cotangent, weight, id, channel + v, p);
    }
  } else {
    out = ChannelIO<T, V>::load(
        grad_columns + column_index<Index>(id, channel, p));
  }
  return out;
}

} // namespace mlx_deform
