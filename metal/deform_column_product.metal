// The cotangent of the columns: for each weight group the cotangent's rows
// times the weight, (pixels x O / G) (O / G x columns). MLX's matmul would
// allocate a result for every chunk; this one writes into the buffer that all
// chunks share.
//
// A threadgroup makes a tile of 64 pixels by 64 columns from tiles of both
// factors in threadgroup memory, a thread 4 by 4 of it. Sums are float32.
//
// grid: (column tiles * group size, pixel tiles, G)

#include <metal_stdlib>

#include "metal/kernel_names.h"
#include "mlx_ops/deform_conv2d_params.h"

using namespace mlx_deform;

constant constexpr int product_tile = 64;
constant constexpr int product_depth = 16;
constant constexpr int product_side = 4; // of a thread's part
constant constexpr int product_threads =
    (product_tile / product_side) * (product_tile / product_side);

template <typename T, typename Index>
[[kernel]] void deform_column_product(
    const device T* cotangent [[buffer(0)]], // (N, Ho, Wo, O)
    const device T* weight [[buffer(1)]], // (G, O / G, kH * kW * C / G)
    device T* grad_columns [[buffer(2)]], // strides in params
    constant DeformConv2dParams& p [[buffer(3)]],
    metal::uint3 tile_at [[threadgroup_position_in_grid]],
    metal::uint3 group_size [[threads_per_threadgroup]],
    uint thread_at [[thread_index_in_threadgroup]]) {
  threadgroup float rows[product_depth * product_tile]; // [depth][pixel]
  threadgroup float cols[product_depth * product_tile]; // [depth][column]

  const int threads = int(group_size.x);
  const int group_width = p.C / p.G;
  const int width = p.kH * p.kW * group_width;
  const int depth = p.O / p.G;
  const int g = int(tile_at.z);
  const int column = int(tile_at.x) * product_tile;
  const Index pixel = Index(tile_at.y) * Index(product_tile);
  const Index pixels = Index(p.pixel_end - p.pixel_begin);

  // One pass, unless the pipeline allows fewer threads than the tile has parts.
  for (int first = 0; first < product_threads; first += threads) {
    const int part = first + int(thread_at);
    const int part_row = part / (product_tile / product_side) * product_side;
    const int part_col = part % (product_tile / product_side) * product_side;
    float sums[product_side * product_side];
    for (int i = 0; i < product_side * product_side; ++i) {
      sums[i] = 0.0f;
    }

    for (int k = 0; k < depth; k += product_depth) {
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      for (int i = int(thread_at); i < product_depth * product_tile;
           i += threads) {
        // Neighbouring threads read neighbouring words of either factor.
        const int row_k = k + i % product_depth;
        const int row_pixel = i / product_depth;
        float value = 0.0f;
        if (row_k < depth && pixel + Index(row_pixel) < pixels) {
          const Index at = Index(p.pixel_begin) + pixel + Index(row_pixel);
          value = static_cast<float>(
              cotangent[at * Index(p.O) + Index(g * depth + row_k)]);
        }
        rows[(i % product_depth) * product_tile + row_pixel] = value;

        const int col_k = k + i / product_tile;
        const int col = column + i % product_tile;
        value = 0.0f;
        if (col_k < depth && col < width) {
          value = static_cast<float>(
              weight[Index(g * depth + col_k) * Index(width) + Index(col)]);
        }
        cols[i] = value;
      }
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      if (part < product_threads) {
        for (int i = 0; i < product_depth; ++i) {
          for (int r = 0; r < product_side; ++r) {
            const float row = rows[i * product_tile + part_row + r];
            for (int c = 0; c < product_side; ++c) {
              sums[r * product_side + c] +=
                  row * cols[i * product_tile + part_col + c];
            }
          }
        }
      }
    }

    if (part < product_threads) {
      for (int r = 0; r < product_side; ++r) {
        for (int c = 0; c < product_side; ++c) {
          const int col = column + part_col + c;
          const Index row = pixel + Index(part_row + r);
          if (row < pixels && col < width) {
            const int tap = col / group_width;
            grad_columns
                [Index(g) * Index(p.column_group) +
                 row * Index(p.column_pixel) +
                 Index(tap) * Index(p.column_tap) +
                 Index(col - tap * group_width)] =
                    static_cast<T>(sums[r * product_side + c]);
          }
        }
      }
    }
  }
}

MLX_DEFORM_INSTANTIATE(
    deform_column_product,
    deform_column_product<MLX_DEFORM_T, MLX_DEFORM_INDEX>)
