// Products with a depthwise weight, where every channel is a group by itself:
// sums over the taps alone, which run along the channels. Compiled once per
// instruction set, as the tile kernels are.

#pragma once

#include <stdint.h>

#include "mlx_ops/cpu/tile_kernels.h"

namespace mlx_deform::cpu {

// The weight is [O / C][kH * kW][C] here, so that vectors run along its
// channels. Rows of the output and of its cotangent are [C][O / C].
template <typename R>
struct DepthwiseKernels {
  // rows = (accumulate ? rows : 0) + columns * weight, for the block's columns.
  void (*multiply)(
      const DeformConv2dParams& params,
      const Block& block,
      const R* columns, // [pixels][taps][channels]
      int64_t pixel_stride,
      const R* weight,
      R* rows, // of the block's pixels
      bool accumulate);

  // The cotangent of the block's columns. The block spans all channels.
  void (*column_cotangent)(
      const DeformConv2dParams& params,
      const Block& block,
      const R* rows,
      const R* weight,
      R* grad_columns); // [pixels][taps][C]

  // grad_weight = (accumulate ? grad_weight : 0) + what the block adds, at the
  // block's taps and channels.
  void (*weight_grad)(
      const DeformConv2dParams& params,
      const Block& block,
      const R* columns, // [pixels][taps][channels]
      int64_t pixel_stride,
      const R* rows,
      R* grad_weight,
      bool accumulate);
};

// The kernels for this machine.
template <typename R>
const DepthwiseKernels<R>& depthwise_kernels();

} // namespace mlx_deform::cpu
