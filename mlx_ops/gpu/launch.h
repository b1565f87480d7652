// How work is laid out on a GPU: which kernel runs, with which constants,
// buffers, grid and group. Pure arithmetic on sizes, without
// MLX or Metal, so that a test on any machine can read the plan and run it.
//
// Sizes that do not fit raise std::invalid_argument; nothing here overflows.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace mlx_deform::gpu {

// The kernels of one library share a data type and an index width.
struct Library {
  std::string dtype; // "float32", "float16" or "bfloat16"
  int index_bits = 32; // 32, or 64 where an array has 2^31 elements or more
};

struct FunctionConstant {
  std::string name;
  int index;
  bool is_bool; // else a 32-bit integer
  int value;
};

// "params": the bytes of the op's struct of sizes. Everything else: an array,
// "input", "grad_offset" and so on.
struct Binding {
  std::string role;
  int index;
  bool is_output;
};

struct Launch {
  std::string stem; // the kernel, whatever its types
  std::string kernel; // host name of one of the stem's instantiations
  Library library;
  std::vector<FunctionConstant> constants;
  std::vector<Binding> buffers;
  std::array<int64_t, 3> grid{}; // threads
  std::array<int64_t, 3> group{};
  int vector_width = 1; // channels that a thread reads at once

  bool empty() const {
    return grid[0] == 0 || grid[1] == 0 || grid[2] == 0;
  }
};

struct PlanOptions {
  // Every array starts at a multiple of this, in bytes: a power of two.
  int alignment = 16;
  // For tests: choose what the sizes would choose, 0 leaves it to them. A
  // vector width that does not fit is refused.
  int vector_width = 0;
  int index_bits = 0;
  // The longest row of threadgroups; longer ones are wrapped into rows.
  int64_t groups_per_row = int64_t(1) << 20;
};

// Zeros for `size` floats, by a kernel of that type's library. Its params are
// the size, an int64.
Launch plan_zero_fill(
    int64_t size,
    const std::string& dtype,
    const PlanOptions& options = {});

// The launch's group, made small enough for a pipeline that allows fewer
// threads (Metal's maxTotalThreadsPerThreadgroup). Every kernel gives the same
// result with it.
std::array<int64_t, 3> fit_group(const Launch& launch, int64_t max_threads);

// The macros that choose a library's types, to be put in front of the source.
std::string library_header(const Library& library);

// A name for a library of the kernels whose source has this hash: JIT caches go
// by name alone.
std::string library_name(
    const Library& library,
    const std::string& source_hash);

std::string hash_of(const std::string& source);

// Whether an environment variable is set to something other than 0.
bool environment_flag(const char* name);

} // namespace mlx_deform::gpu
