// The three products of a convolution with the weight, for each weight group,
// with sums in float32: every result goes where it belongs at once, into the
// output, the buffer that chunks share, or the sum over all chunks.
//
// The columns of a group are (pixels x width), width being kH * kW * C / G; its
// weight is (outputs x width), outputs being O / G.

#include <metal_stdlib>

#include "metal/deform_conv2d/function_constants.h"
#include "metal/deform_conv2d/product_tile.h"
#include "metal/kernel_names.h"
#include "mlx_ops/deform_conv2d/params.h"

using namespace mlx_deform;

// Sizes of a group's matrices.
struct GroupSizes {
  int outputs;
  int width;
  long pixels;
};

inline GroupSizes group_sizes(constant DeformConv2dParams& p) {
  GroupSizes out;
  out.outputs = p.O / p.G;
  out.width = p.kH * p.kW * (p.C / p.G);
  out.pixels = p.pixel_end - p.pixel_begin;
  return out;
}

// How many sides of a factor a tile has that starts at `begin`.
template <typename Index>
inline int sides_from(Index begin, Index all) {
  return int(metal::min(all - begin, Index(tile_side)));
}

template <typename T, typename Index>
struct OutputPlace {
  device T* out; // of the tile's first pixel and output
  const device T* bias; // of the tile's first output
  Index stride;

  void write(int row, int column, float sum) {
    if (has_bias) {
      sum += static_cast<float>(bias[column]);
    }
    out[Index(row) * stride + Index(column)] = static_cast<T>(sum);
  }
};

// out = columns * weight^T + bias
//
// grid: (tiles of outputs * group size, tiles of pixels, G)
template <typename T, int V, typename Index>
[[kernel]] void deform_output_product(
    const device T* columns [[buffer(0)]], // (G, pixels, kH * kW * C / G)
    const device T* weight [[buffer(1)]], // (O, kH, kW, C / G)
    const device T* bias [[buffer(2), function_constant(has_bias)]], // (O)
    device T* out [[buffer(3)]], // (N, Ho, Wo, O)
    constant DeformConv2dParams& p [[buffer(4)]],
    metal::uint3 tile_at [[threadgroup_position_in_grid]],
    metal::uint3 group_size [[threads_per_threadgroup]],
    uint thread_at [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float left_tile[tile_floats];
  threadgroup float right_tile[tile_floats];
  const GroupSizes size = group_sizes(p);
  const int g = int(tile_at.z);
  const int output = int(tile_at.x) * tile_side;
  const Index pixel = Index(tile_at.y) * Index(tile_side);
  const int channel = g * size.outputs + output;

  Factor<T, Index> left;
  left.at =
      columns + Index(g) * Index(p.column_group) + pixel * Index(size.width);
  left.stride = Index(size.width);
  left.sides = sides_from<Index>(pixel, Index(size.pixels));
  Factor<T, Index> right;
  right.at = weight + Index(channel) * Index(size.width);
  right.stride = Index(size.width);
  right.sides = sides_from<int>(output, size.outputs);

  OutputPlace<T, Index> place;
  place.stride = Index(p.O);
  place.out =
      out + (Index(p.pixel_begin) + pixel) * place.stride + Index(channel);
  if (has_bias) {
    place.bias = bias + channel;
  }
  make_tile<T, V, true, true, Index>(
      left,
      right,
      Index(0),
      Index(size.width),
      place,
      left_tile,
      right_tile,
      int(group_size.x),
      int(thread_at),
      int(lane));
}

template <typename T, typename Index>
struct ColumnPlace {
  device T* columns; // of the tile's first pixel and column
  Index stride;

  void write(int row, int column, float sum) {
    columns[Index(row) * stride + Index(column)] = static_cast<T>(sum);
  }
};

// grad_columns = cotangent * weight
//
// grid: (tiles of columns * group size, tiles of pixels, G)
template <typename T, int V, typename Index>
[[kernel]] void deform_column_product(
    const device T* cotangent [[buffer(0)]], // (N, Ho, Wo, O)
    const device T* weight [[buffer(1)]], // (O, kH, kW, C / G)
    device T* grad_columns [[buffer(2)]], // (G, pixels, kH * kW * C / G)
    constant DeformConv2dParams& p [[buffer(3)]],
    metal::uint3 tile_at [[threadgroup_position_in_grid]],
    metal::uint3 group_size [[threads_per_threadgroup]],
    uint thread_at [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float left_tile[tile_floats];
  threadgroup float right_tile[tile_floats];
  const GroupSizes size = group_sizes(p);
  const int g = int(tile_at.z);
  const int column = int(tile_at.x) * tile_side;
  const Index pixel = Index(tile_at.y) * Index(tile_side);

  Factor<T, Index> left;
  left.stride = Index(p.O);
  left.at = cotangent + (Index(p.pixel_begin) + pixel) * left.stride +
      Index(g * size.outputs);
  left.sides = sides_from<Index>(pixel, Index(size.pixels));
  Factor<T, Index> right;
  right.stride = Index(size.width);
  right.at = weight + Index(g * size.outputs) * right.stride + Index(column);
  right.sides = sides_from<int>(column, size.width);

  ColumnPlace<T, Index> place;
  place.stride = Index(size.width);
  place.columns = grad_columns + Index(g) * Index(p.column_group) +
      pixel * place.stride + Index(column);
  make_tile<T, V, true, false, Index>(
      left,
      right,
      Index(0),
      Index(size.outputs),
      place,
      left_tile,
      right_tile,
      int(group_size.x),
      int(thread_at),
      int(lane));
}

template <typename Index>
struct WeightPlace {
  device metal::atomic_float* weight; // of the tile's first output and column
  Index stride;

  void write(int row, int column, float sum) {
    metal::atomic_fetch_add_explicit(
        weight + Index(row) * stride + Index(column),
        sum,
        metal::memory_order_relaxed);
  }
};

// grad_weight += cotangent^T * columns, in float32. The pixels are shared out
// among `depth_splits` threadgroups a tile, so that a small weight keeps a GPU
// busy; with one, the order of the additions is fixed.
//
// grid: (tiles of columns * group size, tiles of outputs, G * depth_splits)
template <typename T, int V, typename Index>
[[kernel]] void deform_weight_product(
    const device T* cotangent [[buffer(0)]], // (N, Ho, Wo, O)
    const device T* columns [[buffer(1)]], // (G, pixels, kH * kW * C / G)
    device metal::atomic_float* grad_weight [[buffer(2)]], // (O, kH, kW, C / G)
    constant DeformConv2dParams& p [[buffer(3)]],
    metal::uint3 tile_at [[threadgroup_position_in_grid]],
    metal::uint3 group_size [[threads_per_threadgroup]],
    uint thread_at [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float left_tile[tile_floats];
  threadgroup float right_tile[tile_floats];
  const GroupSizes size = group_sizes(p);
  const int g = int(tile_at.z) / depth_splits;
  const int split = int(tile_at.z) - g * depth_splits;
  const int column = int(tile_at.x) * tile_side;
  const int output = int(tile_at.y) * tile_side;
  const int channel = g * size.outputs + output;

  Factor<T, Index> left;
  left.stride = Index(p.O);
  left.at = cotangent + Index(p.pixel_begin) * left.stride + Index(channel);
  left.sides = sides_from<int>(output, size.outputs);
  Factor<T, Index> right;
  right.stride = Index(size.width);
  right.at = columns + Index(g) * Index(p.column_group) + Index(column);
  right.sides = sides_from<int>(column, size.width);

  // The split's pixels, in whole steps of the tile's depth.
  const Index pixels = Index(size.pixels);
  const Index steps = (pixels + Index(tile_depth - 1)) / Index(tile_depth);
  const Index share = (steps + Index(depth_splits - 1)) / Index(depth_splits) *
      Index(tile_depth);
  const Index begin = Index(split) * share;

  WeightPlace<Index> place;
  place.stride = Index(size.width);
  place.weight = grad_weight + Index(channel) * place.stride + Index(column);
  make_tile<T, V, false, false, Index>(
      left,
      right,
      begin,
      metal::min(begin + share, pixels),
      place,
      left_tile,
      right_tile,
      int(group_size.x),
      int(thread_at),
      int(lane));
}

#define MLX_DEFORM_INSTANTIATE_PRODUCTS(V)                      \
  MLX_DEFORM_INSTANTIATE(                                       \
      deform_output_product_v##V,                               \
      deform_output_product<MLX_DEFORM_T, V, MLX_DEFORM_INDEX>) \
  MLX_DEFORM_INSTANTIATE(                                       \
      deform_column_product_v##V,                               \
      deform_column_product<MLX_DEFORM_T, V, MLX_DEFORM_INDEX>) \
  MLX_DEFORM_INSTANTIATE(                                       \
      deform_weight_product_v##V,                               \
      deform_weight_product<MLX_DEFORM_T, V, MLX_DEFORM_INDEX>)

MLX_DEFORM_INSTANTIATE_PRODUCTS(1)
MLX_DEFORM_INSTANTIATE_PRODUCTS(4)
