// What the plans of all kernels share: sizes that do not overflow, checks, and
// how a kernel is named. Of the files that plan, alone.

#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "mlx_ops/gpu/launch.h"

namespace mlx_deform::gpu {

// Enough threads for every GPU to hide latency, and few enough for any
// register count to be likely to fit.
constexpr int64_t kGroupThreads = 256;
constexpr int64_t kSimdLanes = 32;
constexpr int64_t kBusyThreads = 1 << 16; // that keep a large GPU busy
constexpr int64_t kVectorBytes = 16; // the widest access of a thread
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGrid = kMaxInt32; // kernels read positions as int

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "[mlx_deform] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Both raise where the result does not fit into 64 bits.
int64_t product(std::initializer_list<int64_t> factors);
int64_t sum(std::initializer_list<int64_t> terms);

inline int64_t ceil_div(int64_t a, int64_t b) {
  return a / b + (a % b != 0);
}

inline int64_t power_of_two_from(int64_t n) {
  int64_t out = 1;
  while (out < n) {
    out *= 2;
  }
  return out;
}

int64_t itemsize_of(const std::string& dtype);

void check_grid(const Launch& launch);

// Positions run up to `largest`, unless the caller insists.
int index_bits_for(int64_t largest, const PlanOptions& options);

// Whole threadgroups of up to kGroupThreads, as far along x as it goes.
std::array<int64_t, 3> group_for(const std::array<int64_t, 3>& grid);

inline FunctionConstant flag(const std::string& name, int index, bool value) {
  return {name, index, true, value ? 1 : 0};
}

// After the library was chosen; `vector_width` 0: not in the name.
void name_kernel(
    Launch& launch,
    const std::string& stem,
    int64_t vector_width = 0);

} // namespace mlx_deform::gpu
