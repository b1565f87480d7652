// How a deformable convolution is laid out on a GPU: which kernel runs, with
// which constants, buffers, grid and group. Pure arithmetic on sizes, without
// MLX or Metal, so that a test on any machine can read the plan and run it.
//
// Sizes that do not fit raise std::invalid_argument; nothing here overflows.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "mlx_ops/deform_conv2d_params.h"

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

// "params": the bytes of the DeformConv2dParams. "size": the bytes of an int64,
// the elements of "out". Everything else: an array, "input", "grad_offset" and
// so on.
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
  // Whether col2im and offset_grad make the columns' cotangent themselves, of
  // the output's and the weight: see is_direct.
  bool direct = false;
  // The longest row of threadgroups; longer ones are wrapped into rows.
  int64_t groups_per_row = int64_t(1) << 20;
};

// Columns of the pixels [pixel_begin, pixel_end).
Launch plan_im2col(
    const DeformConv2dParams& params,
    const std::string& dtype,
    const PlanOptions& options = {});

// Adds to grad_input, in float32. The deterministic kernel adds in a fixed
// order, so its result is bitwise the same on every run; it is slower.
Launch plan_col2im(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options = {});

// Writes grad_offset, grad_mask or both, of the pixels [pixel_begin,
// pixel_end). Deterministic.
Launch plan_offset_grad(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool wants_offset,
    bool wants_mask,
    const PlanOptions& options = {});

// The three products with the weight, of the pixels [pixel_begin, pixel_end):
// the output, from the columns; the columns' cotangent, from the output's; and
// the weight's gradient, which is added to grad_weight in float32. The columns
// lie as (G, pixels, kH * kW * C / G).
Launch plan_output_product(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool has_bias,
    const PlanOptions& options = {});
Launch plan_column_product(
    const DeformConv2dParams& params,
    const std::string& dtype,
    const PlanOptions& options = {});
// Deterministic: one threadgroup adds up an element, however few there are.
Launch plan_weight_product(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options = {});

// Whether weight groups are so small, depthwise ones above all, that kernels
// do without columns.
bool is_direct(const DeformConv2dParams& params);

// Then: the output, and the weight's gradient, added to grad_weight in float32.
Launch plan_direct_output(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool has_bias,
    const PlanOptions& options = {});
// Deterministic: one thread adds up an element.
Launch plan_direct_weight(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options = {});

// Zeros for `size` floats, by a kernel of that type's library.
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
