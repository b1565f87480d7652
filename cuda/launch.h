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

// Reads words from the strides of a kernel's first arrays, which carry them.
template <typename Params, typename... Strides>
__device__ inline LaunchArguments<Params> launch_arguments(
    const Strides&... carriers) {
  constexpr int count = sizeof(LaunchArguments<Params>) / sizeof(long);
  static_assert(
      count <= kCarrierWords * static_cast<int>(sizeof...(Strides)),
      "too few carriers");
  long words[count];
  int at = 0;
  const auto take = [&words, &at](const auto& carrier) {
    for (int i = 0; i < kCarrierWords && at < count; ++i) {
      words[at] = carrier[i];
      ++at;
    }
  };
  (take(carriers), ...);
  LaunchArguments<Params> out;
  memcpy(&out, words, sizeof(out));
  return out;
}

// This block's place among the plan's; z is beyond them in the blocks that fill
// up the launch's last row.
__device__ inline Position block_position(const LaunchGrid& grid) {
  const unsigned int number = blockIdx.y * gridDim.x + blockIdx.x;
  const unsigned int row = number / static_cast<unsigned int>(grid.blocks[0]);
  const unsigned int plane = row / static_cast<unsigned int>(grid.blocks[1]);
  Position out;
  out.x = static_cast<int>(number - row * grid.blocks[0]);
  out.y = static_cast<int>(row - plane * grid.blocks[1]);
  out.z = static_cast<int>(plane);
  return out;
}

__device__ inline Position thread_position(const LaunchGrid& grid) {
  const Position block = block_position(grid);
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
__device__ inline bool in_grid(Position at, const LaunchGrid& grid) {
  return at.x < grid.threads[0] && at.y < grid.threads[1] &&
      at.z < grid.threads[2];
}

__device__ inline float not_a_number() {
  return __int_as_float(0x7fc00000);
}

} // namespace mlx_deform
