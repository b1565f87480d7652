// A dispatch plan's launch in the terms of MLX's fast::cuda_kernel. Pure
// arithmetic and text, so that a test on any machine can read it, compile it
// and run it.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "mlx_ops/gpu/launch.h"

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
  // LaunchArguments, which the body takes from the strides of the first inputs:
  // kCarrierWords words from each, as many as are needed.
  std::vector<int64_t> words;
};

// Of a launch that is not empty, and the bytes of its op's sizes. Raises
// std::invalid_argument where it needs more blocks than CUDA can count, or
// where no file of cuda/ has the kernel.
CustomKernel custom_kernel(
    const gpu::Launch& launch,
    const std::vector<char>& params);

} // namespace mlx_deform::cuda
