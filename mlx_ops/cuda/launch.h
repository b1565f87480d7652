// A dispatch plan's launch in the terms of MLX's fast::cuda_kernel. Pure
// arithmetic and text, so that a test on any machine can read it, compile it
// and run it.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "mlx_ops/cuda/launch_arguments.h"
#include "mlx_ops/gpu/dispatch.h"

namespace mlx_deform::cuda {

struct CustomKernel {
  std::string name;
  std::vector<std::string> inputs; // roles, in the order of the arguments
  std::vector<std::string> outputs;
  const char* header; // the kernel's functions
  std::string source; // the kernel's body, which calls one of them
  bool wide_index; // the body's type Index is int64_t, else int32_t
  int vector_width; // the body's constant V
  std::vector<std::pair<std::string, bool>> flags; // its other constants
  std::array<int, 3> grid; // threads, whole blocks
  std::array<int, 3> group; // threads of a block
  // LaunchArguments, which the body takes from the strides of the first two
  // inputs: kFirstWords words from the first one's, the rest from the other's.
  std::array<int64_t, kLaunchWords> words;
};

// Of a launch that is not empty, of im2col, col2im or offset_grad. Raises
// std::invalid_argument where it needs more blocks than CUDA can count.
CustomKernel custom_kernel(
    const gpu::Launch& launch,
    const DeformConv2dParams& params);

} // namespace mlx_deform::cuda
