#include "mlx_ops/cuda/launch.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>

#include "mlx_ops/cuda/sources.h"

namespace mlx_deform::cuda {

namespace {

// Blocks in a row of the launch. CUDA counts 2^31 along x, MLX 2^31 threads; a
// row of 2^20 blocks is below both for every block size, and its rows are few.
constexpr int64_t kBlocksPerRow = int64_t(1) << 20;

int64_t ceil_div(int64_t a, int64_t b) {
  return a / b + (a % b != 0);
}

const char* header_of(const std::string& stem) {
  static const std::map<std::string, const char*> headers = {
      {"deform_im2col", im2col_source},
      {"deform_col2im", col2im_source},
      {"deform_col2im_ordered", col2im_source},
      {"deform_offset_grad", offset_grad_source}};
  const auto found = headers.find(stem);
  if (found == headers.end()) {
    throw std::invalid_argument(
        "[mlx_deform] a kernel must exist in CUDA; got " + stem);
  }
  return found->second;
}

} // namespace

CustomKernel custom_kernel(
    const gpu::Launch& launch,
    const DeformConv2dParams& params) {
  CustomKernel out;
  out.name = launch.stem;
  out.header = header_of(launch.stem);
  out.wide_index = launch.library.index_bits == 64;

  // The arrays by their places; a place that the plan leaves out gets a null.
  std::string arguments;
  int place = 0;
  for (const gpu::Binding& binding : launch.buffers) {
    for (; place < binding.index; ++place) {
      arguments += "nullptr, ";
    }
    ++place;
    if (binding.role == "params") {
      break;
    }
    (binding.is_output ? out.outputs : out.inputs).push_back(binding.role);
    arguments += binding.role + ", ";
  }

  LaunchArguments words{};
  words.params = params;
  out.vector_width = launch.vector_width;
  std::string constants = "V";
  for (const gpu::FunctionConstant& constant : launch.constants) {
    if (constant.name == "is_direct" || constant.name == "has_columns") {
      // CUDA's kernels always have columns.
    } else if (constant.is_bool) {
      constants += ", " + constant.name;
      out.flags.emplace_back(constant.name, constant.value != 0);
    } else if (constant.name == "segment_lanes") {
      words.segment_lanes = constant.value;
    } else { // the only other one
      words.pixels_per_thread = constant.value;
    }
  }
  out.source = "  mlx_deform::" + launch.stem + "<T, Index, " + constants +
      ">(\n      " + arguments + "mlx_deform::launch_arguments(" +
      out.inputs[0] + "_strides, " + out.inputs[1] + "_strides));\n";

  int64_t blocks = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t along = ceil_div(launch.grid[axis], launch.group[axis]);
    words.grid[axis] = int(launch.grid[axis]);
    words.blocks[axis] = int(along);
    if (__builtin_mul_overflow(blocks, along, &blocks) ||
        blocks > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument(
          "[mlx_deform] a launch must have fewer than 2^31 blocks: work in "
          "smaller chunks");
    }
    out.group[axis] = int(launch.group[axis]);
  }
  std::memcpy(out.words.data(), &words, sizeof(words));

  const int64_t row = std::min(blocks, kBlocksPerRow);
  out.grid = {
      int(row * out.group[0]),
      int(ceil_div(blocks, row) * out.group[1]),
      out.group[2]};
  return out;
}

} // namespace mlx_deform::cuda
