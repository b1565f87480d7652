#include "mlx_ops/gpu/plan_arithmetic.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace mlx_deform::gpu {

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t out = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(out, factor, &out)) {
      refuse("the number of elements must fit into 64 bits");
    }
  }
  return out;
}

int64_t sum(std::initializer_list<int64_t> terms) {
  int64_t out = 0;
  for (int64_t term : terms) {
    if (__builtin_add_overflow(out, term, &out)) {
      refuse("the number of elements must fit into 64 bits");
    }
  }
  return out;
}

int64_t itemsize_of(const std::string& dtype) {
  if (dtype == "float32") {
    return 4;
  }
  if (dtype == "float16" || dtype == "bfloat16") {
    return 2;
  }
  refuse("dtype must be float32, float16 or bfloat16; got ", dtype);
}

void check_grid(const Launch& launch) {
  for (int64_t threads : launch.grid) {
    if (threads > kMaxGrid) {
      refuse(
          "a launch must have fewer than 2^31 threads along each axis; got ",
          threads,
          ": work in smaller chunks");
    }
  }
}

// For tests on a machine without arrays of 2^31 elements.
static bool forces_wide_index() {
  const char* text = std::getenv("MLX_DEFORM_INDEX_BITS");
  if (text == nullptr || *text == '\0' || std::string(text) == "32") {
    return false;
  }
  if (std::string(text) != "64") {
    refuse("MLX_DEFORM_INDEX_BITS must be 32 or 64; got ", text);
  }
  return true;
}

int index_bits_for(int64_t largest, const PlanOptions& options) {
  switch (options.index_bits) {
    case 0:
      return largest <= kMaxInt32 && !forces_wide_index() ? 32 : 64;
    case 64:
      return 64;
    case 32:
      if (largest > kMaxInt32) {
        refuse("32-bit positions must hold every index; got ", largest);
      }
      return 32;
    default:
      refuse("index_bits must be 0, 32 or 64; got ", options.index_bits);
  }
}

std::array<int64_t, 3> group_for(const std::array<int64_t, 3>& grid) {
  std::array<int64_t, 3> group{};
  int64_t left = kGroupThreads;
  for (int axis = 0; axis < 3; ++axis) {
    group[axis] = std::clamp<int64_t>(grid[axis], 1, left);
    left /= group[axis];
  }
  return group;
}

void name_kernel(
    Launch& launch,
    const std::string& stem,
    int64_t vector_width) {
  launch.stem = launch.kernel = stem;
  if (vector_width != 0) {
    launch.kernel += "_v" + std::to_string(vector_width);
  }
  launch.kernel += "_i" + std::to_string(launch.library.index_bits) + "_" +
      launch.library.dtype;
}

} // namespace mlx_deform::gpu
