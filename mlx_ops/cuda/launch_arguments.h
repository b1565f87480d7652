// What a CUDA kernel is told besides its arrays, read by C++ and CUDA alike.

#pragma once

#include "mlx_ops/deform_conv2d_params.h"

namespace mlx_deform {

struct LaunchArguments {
  DeformConv2dParams params;
  // The dispatch plan's grid, in threads, and the blocks along its axes. CUDA
  // allows few blocks along y and z, so they are launched in one long row.
  int grid[3];
  int blocks[3];
  // Lanes that share a sample, in offset_grad: a power of two up to 32. Told
  // and not compiled in, for compiling takes seconds.
  int segment_lanes;
  // Neighbouring pixels that a thread takes, in col2im.
  int pixels_per_thread;
};

// It travels as 64-bit words: see mlx_ops/cuda/kernels.cpp.
inline constexpr int kLaunchWords = sizeof(LaunchArguments) / sizeof(long);
inline constexpr int kFirstWords = 10; // of them with a kernel's first array
static_assert(sizeof(LaunchArguments) % sizeof(long) == 0, "whole words");

} // namespace mlx_deform
