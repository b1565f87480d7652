// A tile of a matrix product, made by one threadgroup on the matrix units:
// 64 rows by 64 columns, summed in float32 over the depth, 16 at a time. Each
// of four SIMD groups holds a quarter as 4 by 4 fragments of 8 by 8.
//
// A factor lies in device memory with either its depth contiguous (columns, as
// the left factor; a weight that is transposed) or its side (a weight as it is;
// a cotangent that is transposed), and is copied to threadgroup memory as it
// lies, as float32. Rows there are 4 floats longer than what they hold, so that
// the 8 rows of a fragment fall into different banks.

#pragma once

#include <metal_stdlib>

#include "metal/channel_vector.h"

namespace mlx_deform {

constant constexpr int tile_side = 64;
constant constexpr int tile_depth = 16;
constant constexpr int tile_pad = 4;
constant constexpr int tile_floats = tile_side * (tile_depth + tile_pad);
constant constexpr int quarter_side = tile_side / 2;
constant constexpr int fragment_side = 8;
constant constexpr int fragments = quarter_side / fragment_side;
// What a SIMD group hands out at once: a row of fragments.
constant constexpr int strip_row = quarter_side + tile_pad;
constant constexpr int strip_floats = fragment_side * strip_row;

static_assert(
    tile_depth * (tile_side + tile_pad) <= tile_floats &&
        4 * strip_floats <= tile_floats,
    "one array serves every layout");

// The part of a factor that a tile needs.
template <typename T, typename Index>
struct Factor {
  const device T* at; // side 0, depth 0
  Index stride; // between sides where the depth is contiguous, else depths
  int sides; // that exist, up to tile_side
};

// Copies the depths [begin, begin + tile_depth) of a factor; what does not
// exist is 0. V divides what is contiguous.
template <typename T, int V, bool DepthContiguous, typename Index>
inline void load_factor(
    Factor<T, Index> factor,
    Index begin,
    Index end, // of all depths
    threadgroup float* tile,
    int thread_at,
    int threads) {
  const int inner = DepthContiguous ? tile_depth : tile_side; // contiguous
  for (int i = thread_at; i < tile_side * tile_depth / V; i += threads) {
    const int row = i * V / inner;
    const int at = i * V - row * inner;
    const int side = DepthContiguous ? row : at;
    const int depth = DepthContiguous ? at : row;
    Channels<V> values;
    for (int v = 0; v < V; ++v) {
      values.at[v] = 0.0f;
    }
    if (side < factor.sides && begin + Index(depth) < end) {
      values = ChannelIO<T, V>::load(
          factor.at +
          (DepthContiguous
               ? Index(side) * factor.stride + begin + Index(depth)
               : (begin + Index(depth)) * factor.stride + Index(side)));
    }
    for (int v = 0; v < V; ++v) {
      tile[row * (inner + tile_pad) + at + v] = values.at[v];
    }
  }
}

// The fragment whose first side and depth these are, as (sides x depths), or
// transposed.
template <bool DepthContiguous>
inline void load_fragment(
    thread metal::simdgroup_float8x8& fragment,
    const threadgroup float* tile,
    int side,
    int depth,
    bool sides_are_rows) {
  if (DepthContiguous) {
    metal::simdgroup_load(
        fragment,
        tile + side * (tile_depth + tile_pad) + depth,
        ulong(tile_depth + tile_pad),
        metal::ulong2(0, 0),
        !sides_are_rows);
  } else {
    metal::simdgroup_load(
        fragment,
        tile + depth * (tile_side + tile_pad) + side,
        ulong(tile_side + tile_pad),
        metal::ulong2(0, 0),
        sides_are_rows);
  }
}

// Makes the tile and gives every element that exists to
// `destination.write(row, column, sum)`, neighbouring lanes neighbouring
// columns. For all threads of the threadgroup, which are whole SIMD groups.
template <
    typename T,
    int V,
    bool LeftDepthContiguous,
    bool RightDepthContiguous,
    typename Index,
    typename Destination>
inline void make_tile(
    Factor<T, Index> left,
    Factor<T, Index> right,
    Index depth_begin,
    Index depth_end,
    Destination destination,
    threadgroup float* left_tile, // tile_floats
    threadgroup float* right_tile, // tile_floats
    int threads,
    int thread_at,
    int lane) {
  const int simd_groups = threads / 32;
  // One pass, unless the pipeline allows fewer threads than a tile wants.
  for (int first = 0; first < 4; first += simd_groups) {
    const int quarter = first + thread_at / 32;
    const int row = (quarter / 2) * quarter_side;
    const int column = (quarter % 2) * quarter_side;
    metal::simdgroup_float8x8 sums[fragments * fragments];
    for (int i = 0; i < fragments * fragments; ++i) {
      sums[i] = metal::make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }

    for (Index depth = depth_begin; depth < depth_end;
         depth += Index(tile_depth)) {
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      load_factor<T, V, LeftDepthContiguous, Index>(
          left, depth, depth_end, left_tile, thread_at, threads);
      load_factor<T, V, RightDepthContiguous, Index>(
          right, depth, depth_end, right_tile, thread_at, threads);
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      if (quarter < 4) {
        for (int k = 0; k < tile_depth; k += fragment_side) {
          metal::simdgroup_float8x8 lefts[fragments];
          metal::simdgroup_float8x8 rights[fragments];
          for (int i = 0; i < fragments; ++i) {
            load_fragment<LeftDepthContiguous>(
                lefts[i], left_tile, row + i * fragment_side, k, true);
            load_fragment<RightDepthContiguous>(
                rights[i], right_tile, column + i * fragment_side, k, false);
          }
          for (int i = 0; i < fragments; ++i) {
            for (int j = 0; j < fragments; ++j) {
              const int at = i * fragments + j;
              metal::simdgroup_multiply_accumulate(
                  sums[at], lefts[i], rights[j], sums[at]);
            }
          }
        }
      }
    }

    // Every SIMD group hands out its quarter through memory of its own.
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (quarter < 4) {
      threadgroup float* strip = left_tile + (thread_at / 32) * strip_floats;
      for (int i = 0; i < fragments; ++i) {
        for (int j = 0; j < fragments; ++j) {
          metal::simdgroup_store(
              sums[i * fragments + j],
              strip + j * fragment_side,
              ulong(strip_row),
              metal::ulong2(0, 0),
              false);
        }
        metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
        const int at = column + lane;
        for (int r = 0; r < fragment_side; ++r) {
          const int side = row + i * fragment_side + r;
          if (side < left.sides && at < right.sides) {
            destination.write(side, at, strip[r * strip_row + lane]);
          }
        }
        metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
      }
    }
  }
}

} // namespace mlx_deform
