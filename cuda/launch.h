// A thread's place in the dispatch plan's grid, as Metal would tell it, and the
// launch's arguments.

#pragma once

#include "mlx_ops/cuda/launch_arguments.h"

namespace mlx_deform {

inline constexpr unsigned int kAllLanes = 0xffffffffu;

struct Position {
  int x;
  int y;
  int z;
};

// The arguments from the strides of a kernel's first two arrays, which carry
// them as words.
template <typename Strides>
__device__ inline LaunchArguments launch_arguments(
    const Strides& first,
    const Strides& second) {
  long words[kLaunchWords];
  for (int i = 0; i < kLaunchWords; ++i) {
    words[i] = i < kFirstWords ? first[i] : second[i - kFirstWords];
  }
  LaunchArguments out;
  memcpy(&out, words, sizeof(out));
  return out;
}

// This block's place among the plan's; z is beyond them in the blocks that fill
// up the launch's last row.
__device__ inline Position block_position(const LaunchArguments& a) {
  const unsigned int number = blockIdx.y * gridDim.x + blockIdx.x;
  const unsigned int row = number / static_cast<unsigned int>(a.blocks[0]);
  const unsigned int plane = row / static_cast<unsigned int>(a.blocks[1]);
  Position out;
  out.x = static_cast<int>(number - row * a.blocks[0]);
  out.y = static_cast<int>(row - plane * a.blocks[1]);
  out.z = static_cast<int>(plane);
  return out;
}

__device__ inline Position thread_position(const LaunchArguments& a) {
  const Position block = block_position(a);
  Position out;
  out.x =
      block.x * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  out.y =
      block.y * static_cast<int>(blockDim.y) + static_cast<int>(threadIdx.y);
  out.z =
      block.z * static_cast<int>(blockDim.z) + static_cast<int>(threadIdx.z);
  return out;
}

// Whole blocks are launched, so some threads lie beyond the plan's grid.
__device__ inline bool in_grid(Position at, const LaunchArguments& a) {
  return at.x < a.grid[0] && at.y < a.grid[1] && at.z < a.grid[2];
}

__device__ inline float not_a_number() {
  return __int_as_float(0x7fc00000);
}

} // namespace mlx_deform
