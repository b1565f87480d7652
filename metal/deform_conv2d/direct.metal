// Convolutions whose weight groups are small, depthwise ones above all, without
// columns: a thread samples what it needs and multiplies at once. Columns would
// be written a few channels apart and make products too small for a tile.
//
// The columns' cotangent is made likewise where it is needed: see
// column_cotangent.h.

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/deform_conv2d/function_constants.h"
#include "metal/kernel_names.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

using namespace mlx_deform;

constant constexpr int most_outputs = 4; // of outputs_per_thread

// V channels of the columns of one output pixel and tap.
template <typename T, int V, typename Index>
inline Channels<V> sample_channels(
    const device T* input, // (N, H, W, C)
    const device float* offset, // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask, // (N, Ho, Wo, DG, kH, kW), where has_mask
    Index pixel,
    int tap,
    int channel,
    constant DeformConv2dParams& p) {
  SampleId<Index> id;
  id.pixel = pixel;
  id.tap = tap;
  id.group = channel / (p.C / p.DG);
  const SamplePosition<Index> position = sample_position<Index>(id, p, offset);
  const BilinearCell<float> cell =
      bilinear_cell<float>(position.y, position.x, p.H, p.W);
  const Index corners = cell_index<Index>(position.image, cell, p);
  float scale = cell.nan ? not_a_number() : 1.0f;
  if (has_mask) {
    scale *= mask[sample_index<Index>(id, p)];
  }
  return interpolate<V>(
      value_weights<float>(cell),
      load_corners<T, V, Index>(input, cell, corners, channel, p),
      scale);
}

inline long weight_index(
    int output,
    int tap,
    int group_channel,
    constant DeformConv2dParams& p) {
  return (long(output) * long(p.kH * p.kW) + long(tap)) * long(p.C / p.G) +
      long(group_channel);
}

// The output, for groups of several channels: a thread makes
// outputs_per_thread outputs of one group, from vectors of its channels.
//
// grid: (O / outputs_per_thread, pixels)
template <typename T, int V, typename Index>
[[kernel]] void deform_grouped_output(
    const device T* input [[buffer(0)]], // (N, H, W, C)
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    const device T* weight [[buffer(3)]], // (O, kH, kW, C / G)
    const device T* bias [[buffer(4), function_constant(has_bias)]], // (O)
    device T* out [[buffer(5)]], // (N, Ho, Wo, O)
    constant DeformConv2dParams& p [[buffer(6)]],
    metal::uint3 at [[thread_position_in_grid]]) {
  const int group_width = p.C / p.G;
  const int output = int(at.x) * outputs_per_thread;
  const int group = output / (p.O / p.G);
  const Index pixel = Index(p.pixel_begin) + Index(at.y);
  float sums[most_outputs];
  for (int o = 0; o < outputs_per_thread; ++o) {
    sums[o] = 0.0f;
    if (has_bias) {
      sums[o] = static_cast<float>(bias[output + o]);
    }
  }
  for (int tap = 0; tap < p.kH * p.kW; ++tap) {
    for (int c = 0; c < group_width; c += V) {
      const Channels<V> column = sample_channels<T, V, Index>(
          input, offset, mask, pixel, tap, group * group_width + c, p);
      for (int o = 0; o < outputs_per_thread; ++o) {
        const Channels<V> w =
            ChannelIO<T, V>::load(weight + weight_index(output + o, tap, c, p));
        for (int v = 0; v < V; ++v) {
          sums[o] += w.at[v] * column.at[v];
        }
      }
    }
  }
  for (int o = 0; o < outputs_per_thread; ++o) {
    out[pixel * Index(p.O) + Index(output + o)] = static_cast<T>(sums[o]);
  }
}

// The output, for groups of one channel: a thread takes V neighbouring
// channels, each a group, and one output of each.
//
// grid: (C / V * O / G, pixels)
template <typename T, int V, typename Index>
[[kernel]] void deform_depthwise_output(
    const device T* input [[buffer(0)]], // (N, H, W, C)
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    const device T* weight [[buffer(3)]], // (O, kH, kW, 1)
    const device T* bias [[buffer(4), function_constant(has_bias)]], // (O)
    device T* out [[buffer(5)]], // (N, Ho, Wo, O)
    constant DeformConv2dParams& p [[buffer(6)]],
    metal::uint3 at [[thread_position_in_grid]]) {
  const int outputs = p.O / p.G;
  const int channel = int(at.x) / outputs * V;
  // Of the first channel; the next one's is `outputs` further.
  const int output = channel * outputs + int(at.x) % outputs;
  const Index pixel = Index(p.pixel_begin) + Index(at.y);
  float sums[V];
  for (int v = 0; v < V; ++v) {
    sums[v] = 0.0f;
    if (has_bias) {
      sums[v] = static_cast<float>(bias[output + v * outputs]);
    }
  }
  for (int tap = 0; tap < p.kH * p.kW; ++tap) {
    const Channels<V> column = sample_channels<T, V, Index>(
        input, offset, mask, pixel, tap, channel, p);
    for (int v = 0; v < V; ++v) {
      sums[v] += column.at[v] *
          static_cast<float>(
                     weight[weight_index(output + v * outputs, tap, 0, p)]);
    }
  }
  for (int v = 0; v < V; ++v) {
    out[pixel * Index(p.O) + Index(output + v * outputs)] =
        static_cast<T>(sums[v]);
  }
}

inline void
add_to(device metal::atomic_float* grad_weight, long at, float value) {
  metal::atomic_fetch_add_explicit(
      grad_weight + at, value, metal::memory_order_relaxed);
}

// The weight's gradient, added to grad_weight in float32: a thread sums over
// pixels_per_thread pixels, for outputs_per_thread outputs of a group and V of
// its channels at one tap.
//
// grid: (C / V, kH * kW * O / G / outputs_per_thread, shares of the pixels)
template <typename T, int V, typename Index>
[[kernel]] void deform_grouped_weight(
    const device T* input [[buffer(0)]], // (N, H, W, C)
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    const device T* cotangent [[buffer(3)]], // (N, Ho, Wo, O)
    device metal::atomic_float* grad_weight [[buffer(4)]], // (O, kH, kW, C / G)
    constant DeformConv2dParams& p [[buffer(5)]],
    metal::uint3 at [[thread_position_in_grid]]) {
  const int group_width = p.C / p.G;
  const int blocks = p.O / p.G / outputs_per_thread;
  const int channel = int(at.x) * V;
  const int group = channel / group_width;
  const int tap = int(at.y) / blocks;
  const int output =
      group * (p.O / p.G) + (int(at.y) - tap * blocks) * outputs_per_thread;
  float sums[most_outputs * V];
  for (int i = 0; i < outputs_per_thread * V; ++i) {
    sums[i] = 0.0f;
  }
  const Index begin =
      Index(p.pixel_begin) + Index(at.z) * Index(pixels_per_thread);
  const Index end =
      metal::min(begin + Index(pixels_per_thread), Index(p.pixel_end));
  for (Index pixel = begin; pixel < end; ++pixel) {
    const Channels<V> column = sample_channels<T, V, Index>(
        input, offset, mask, pixel, tap, channel, p);
    for (int o = 0; o < outputs_per_thread; ++o) {
      const float grad =
          static_cast<float>(cotangent[pixel * Index(p.O) + Index(output + o)]);
      for (int v = 0; v < V; ++v) {
        sums[o * V + v] += grad * column.at[v];
      }
    }
  }
  for (int o = 0; o < outputs_per_thread; ++o) {
    for (int v = 0; v < V; ++v) {
      add_to(
          grad_weight,
          weight_index(output + o, tap, channel - group * group_width + v, p),
          sums[o * V + v]);
    }
  }
}

// The same for groups of one channel: V neighbouring ones, one output of each.
//
// grid: (C / V * O / G, kH * kW, shares of the pixels)
template <typename T, int V, typename Index>
[[kernel]] void deform_depthwise_weight(
    const device T* input [[buffer(0)]], // (N, H, W, C)
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    const device T* cotangent [[buffer(3)]], // (N, Ho, Wo, O)
    device metal::atomic_float* grad_weight [[buffer(4)]], // (O, kH, kW, 1)
    constant DeformConv2dParams& p [[buffer(5)]],
    metal::uint3 at [[thread_position_in_grid]]) {
  const int outputs = p.O / p.G;
  const int channel = int(at.x) / outputs * V;
  const int output = channel * outputs + int(at.x) % outputs;
  const int tap = int(at.y);
  float sums[V];
  for (int v = 0; v < V; ++v) {
    sums[v] = 0.0f;
  }
  const Index begin =
      Index(p.pixel_begin) + Index(at.z) * Index(pixels_per_thread);
  const Index end =
      metal::min(begin + Index(pixels_per_thread), Index(p.pixel_end));
  for (Index pixel = begin; pixel < end; ++pixel) {
    const Channels<V> column = sample_channels<T, V, Index>(
        input, offset, mask, pixel, tap, channel, p);
    for (int v = 0; v < V; ++v) {
      sums[v] +=
          column.at[v] *
          static_cast<float>(
              cotangent[pixel * Index(p.O) + Index(output + v * outputs)]);
    }
  }
  for (int v = 0; v < V; ++v) {
    add_to(grad_weight, weight_index(output + v * outputs, tap, 0, p), sums[v]);
  }
}

#define MLX_DEFORM_INSTANTIATE_DIRECT(stem, V) \
  MLX_DEFORM_INSTANTIATE(stem##_v##V, stem<MLX_DEFORM_T, V, MLX_DEFORM_INDEX>)
#define MLX_DEFORM_INSTANTIATE_ALL_DIRECT(V)                \
  MLX_DEFORM_INSTANTIATE_DIRECT(deform_grouped_output, V)   \
  MLX_DEFORM_INSTANTIATE_DIRECT(deform_depthwise_output, V) \
  MLX_DEFORM_INSTANTIATE_DIRECT(deform_grouped_weight, V)   \
  MLX_DEFORM_INSTANTIATE_DIRECT(deform_depthwise_weight, V)

MLX_DEFORM_INSTANTIATE_ALL_DIRECT(1)
MLX_DEFORM_INSTANTIATE_ALL_DIRECT(4)
#if MLX_DEFORM_T_BYTES == 2
MLX_DEFORM_INSTANTIATE_ALL_DIRECT(8)
#endif
