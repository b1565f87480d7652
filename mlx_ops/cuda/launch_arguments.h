// What a CUDA kernel is told besides its arrays, read by C++ and CUDA alike.

#pragma once

namespace mlx_deform {

struct LaunchGrid {
  // The dispatch plan's grid, in threads, and the blocks along its axes. CUDA
  // allows few blocks along y and z, so they are launched in one long row.
  int threads[3];
  int blocks[3];
  // The plan's numbers, told and not compiled in, for compiling takes seconds:
  // the lanes that share a sample, a power of two up to 32, and the neighbours
  // that a thread walks over (the plan's ..._per_thread).
  int segment_lanes;
  int walk;
};

// Params is the op's struct of sizes.
template <typename Params>
struct LaunchArguments {
  Params params;
  LaunchGrid grid;
  static_assert(sizeof(Params) % sizeof(long) == 0, "whole words");
};

// They travel as 64-bit words in the strides of a kernel's first arrays, each
// of which carries this many: see mlx_ops/cuda/run.cpp.
inline constexpr int kCarrierWords = 10;

} // namespace mlx_deform
