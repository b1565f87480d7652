#include "mlx_ops/cuda/launch.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "mlx_ops/cuda/launch_arguments.h"
#include "mlx_ops/cuda/sources.h"
#include "mlx_ops/gpu/plan_arithmetic.h"

namespace mlx_deform::cuda {

namespace {

// Blocks in a row of the launch. CUDA counts 2^31 along x, MLX 2^31 threads; a
// row of 2^20 blocks is below both for every block size, and its rows are few.
constexpr int64_t kBlocksPerRow = int64_t(1) << 20;

// The text that defines the kernel.
const char* header_of(const std::string& stem) {
  for (const char* const* source = sources; *source != nullptr; ++source) {
    if (std::strstr(*source, (" void " + stem + "(").c_str())) {
      return *source;
    }
  }
  gpu::refuse("a kernel must exist in CUDA; got ", stem);
}

void append_words(std::vector<int64_t>& words, const void* from, size_t bytes) {
  if (bytes % sizeof(int64_t) != 0) {
    gpu::refuse("params must be whole words; got ", bytes, " bytes");
  }
  const size_t begin = words.size();
  words.resize(begin + bytes / sizeof(int64_t));
  std::memcpy(words.data() + begin, from, bytes);
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() &&
      text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Places blocks in rows, as CUDA counts them.
LaunchGrid place_blocks(const gpu::Launch& launch, CustomKernel& out) {
  LaunchGrid grid{};
  int64_t blocks = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t along = gpu::ceil_div(launch.grid[axis], launch.group[axis]);
    grid.threads[axis] = int(launch.grid[axis]);
    grid.blocks[axis] = int(along);
    if (__builtin_mul_overflow(blocks, along, &blocks) ||
        blocks > std::numeric_limits<int32_t>::max()) {
      gpu::refuse(
          "a launch must have fewer than 2^31 blocks: work in smaller chunks");
    }
    out.group[axis] = int(launch.group[axis]);
  }
  const int64_t row = std::min(blocks, kBlocksPerRow);
  out.grid = {
      int(row * out.group[0]),
      int(gpu::ceil_div(blocks, row) * out.group[1]),
      out.group[2]};
  return grid;
}

} // namespace

CustomKernel custom_kernel(
    const gpu::Launch& launch,
    const std::vector<char>& params) {
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

  LaunchGrid grid = place_blocks(launch, out);
  out.vector_width = launch.vector_width;
  std::string constants = "V";
  for (const gpu::FunctionConstant& constant : launch.constants) {
    if (constant.name == "is_direct" || constant.name == "has_columns") {
      // CUDA's kernels always have columns.
    } else if (constant.is_bool) {
      constants += ", " + constant.name;
      out.flags.emplace_back(constant.name, constant.value != 0);
    } else if (constant.name == "segment_lanes") {
      grid.segment_lanes = constant.value;
    } else if (ends_with(constant.name, "_per_thread")) {
      grid.walk = constant.value;
    } else {
      gpu::refuse("a constant must be known in CUDA; got ", constant.name);
    }
  }
  append_words(out.words, params.data(), params.size());
  append_words(out.words, &grid, sizeof(grid));

  std::string carriers;
  const int64_t count = gpu::ceil_div(int64_t(out.words.size()), kCarrierWords);
  for (int64_t i = 0; i < count; ++i) {
    carriers += (i ? ", " : "") + out.inputs.at(i) + "_strides";
  }
  out.source = "  mlx_deform::" + launch.stem + "<T, Index, " + constants +
      ">(\n      " + arguments +
      "mlx_deform::launch_arguments<mlx_deform::LaunchParams>(" + carriers +
      "));\n";
  return out;
}

} // namespace mlx_deform::cuda
