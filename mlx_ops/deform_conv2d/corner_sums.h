// How col2im spares atomics, in Metal and in CUDA: a thread walks neighbouring
// output pixels, whose samples share corners wherever neighbouring offsets are
// alike, and holds a corner's sum until the walk leaves it. Each language
// includes its Channels before this, and brings a Destination with
// add(index, k, sum), an atomic addition to an element and its k-th channel.

#pragma once

#include "mlx_ops/deform_conv2d/gpu_sample.h"

namespace mlx_deform {

// Of V channels, for the corners of one cell.
template <int V, typename Index>
struct CornerSums {
  Index cell; // see cell_index
  float at[4][V];
};

template <int V, typename Index>
MLX_DEFORM_FN CornerSums<V, Index> no_sums() {
  CornerSums<V, Index> out;
  out.cell = 0;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < V; ++k) {
      out.at[i][k] = 0.0f;
    }
  }
  return out;
}

// Adds a corner's sums to memory. Integer offsets, zero ones above all, leave
// corners without a share: no atomic for those. A NaN is not equal to zero.
template <int V, typename Index, typename Destination>
MLX_DEFORM_FN CornerSums<V, Index> let_go(
    CornerSums<V, Index> sums,
    int corner,
    int channel,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p,
    Destination destination) {
  for (int k = 0; k < V; ++k) {
    if (sums.at[corner][k] != 0.0f) {
      destination.add(
          corner_index<Index>(sums.cell, corner, channel, p),
          k,
          sums.at[corner][k]);
    }
    sums.at[corner][k] = 0.0f;
  }
  return sums;
}

// Goes on to another cell, with what the two share. Cells are told apart by the
// place of corner 0 alone: two with the same place also have the same corners
// in memory, though one may lie left of a row and the other right of the row
// above.
template <int V, typename Index, typename Destination>
MLX_DEFORM_FN CornerSums<V, Index> move_to(
    Index cell,
    CornerSums<V, Index> sums,
    int channel,
    MLX_DEFORM_CONSTANT DeformConv2dParams& p,
    Destination destination) {
  if (cell == sums.cell) {
    return sums;
  }
  const bool to_right = cell == sums.cell + Index(p.C);
  const bool to_left = cell == sums.cell - Index(p.C);
  for (int row = 0; row < 4; row += 2) {
    if (!to_left) {
      sums = let_go<V, Index>(sums, row, channel, p, destination);
    }
    if (!to_right) {
      sums = let_go<V, Index>(sums, row + 1, channel, p, destination);
    }
    for (int k = 0; k < V; ++k) {
      if (to_right) {
        sums.at[row][k] = sums.at[row + 1][k];
        sums.at[row + 1][k] = 0.0f;
      }
      if (to_left) {
        sums.at[row + 1][k] = sums.at[row][k];
        sums.at[row][k] = 0.0f;
      }
    }
  }
  sums.cell = cell;
  return sums;
}

} // namespace mlx_deform
