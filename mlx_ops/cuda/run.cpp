// Runs the launches of the dispatch plan through MLX's fast::cuda_kernel, which
// compiles a source for the GPU at hand when it first runs. Nothing of CUDA is
// needed to build this, and it links and loads beside MLX's CPU-only library,
// where no GPU stream gets here.
//
// A cuda_kernel is a node of MLX's graph that allocates its outputs, so kernels
// do not write in place (gpu/run.h). That is also what MLX's encoder is
// made for: it orders the nodes of a CUDA graph by who wrote a buffer, not by
// who read it, so a buffer that is written anew while an earlier kernel may
// still read it would be a race. Fresh outputs have no earlier reader.

#include "mlx_ops/gpu/run.h"

#include <functional>
#include <optional>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/fast.h"
#include "mlx/ops.h"

#include "mlx_ops/cuda/launch.h"
#include "mlx_ops/cuda/launch_arguments.h"
#include "mlx_ops/gpu/plan_inputs.h"
#include "mlx_ops/gpu/run_now.h"
#include "mlx_ops/mlx_version.h"
#include "mlx_ops/stand_in/registry.h"

// Two functions of MLX's CUDA library, declared here because the header that
// has them (mlx/backend/cuda/device.h) needs CUDA's own. Weak: MLX's CPU-only
// library has neither.
namespace mlx::core::cu {

class CommandEncoder {
 public:
  // Called when the stream has run what is encoded so far.
  __attribute__((weak)) void add_completed_handler(std::function<void()> task);
};

__attribute__((weak)) CommandEncoder& get_command_encoder(Stream stream);

} // namespace mlx::core::cu

namespace mlx_deform::gpu {

namespace {

bool on_cpu(mx::Stream stream) {
  return stream.device == mx::Device::cpu;
}

// `x` with these words as its strides, which cuda_kernel passes on by value.
// Sizes in an array of their own would have to reach the GPU first, through
// memory that the host has just written.
mx::array with_words(const mx::array& x, const int64_t* begin, int count) {
  mx::array view(mx::Shape(count, 1), x.dtype(), nullptr, {});
  view.copy_shared_buffer(
      x, mx::Strides(begin, begin + count), x.flags(), x.data_size());
  view.set_status(mx::array::Status::available);
  return view;
}

void zeros(mx::array& out, mx::Stream stream) {
  const mx::array result = mx::zeros(out.shape(), out.dtype(), stream);
  run_now(result, stream);
  out.copy_shared_buffer(result);
}

mx::Dtype dtype_of(const Library& library) {
  return library.dtype == "float16" ? mx::float16
      : library.dtype == "bfloat16" ? mx::bfloat16
                                    : mx::float32;
}

} // namespace

bool in_place(mx::Stream stream) {
  return on_cpu(stream) && stand_in::in_place();
}

void run(
    const Launch& launch,
    const Arguments& arguments,
    mx::Stream stream,
    bool sums) {
  if (on_cpu(stream)) {
    return stand_in::run(launch, arguments, stream, sums);
  }
  if (launch.empty()) {
    for (const auto& [role, out] : arguments.outputs) {
      if (out) {
        zeros(*out, stream);
      }
    }
    return;
  }
  const cuda::CustomKernel kernel =
      cuda::custom_kernel(launch, arguments.params);

  std::vector<mx::array> arrays;
  for (const std::string& role : kernel.inputs) {
    arrays.push_back(*arguments.inputs.at(role));
  }
  const int words = static_cast<int>(kernel.words.size());
  for (int at = 0; at < words; at += kCarrierWords) {
    mx::array& carrier = arrays[at / kCarrierWords];
    carrier = with_words(
        carrier, kernel.words.data() + at, std::min(kCarrierWords, words - at));
  }

  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const std::string& role : kernel.outputs) {
    shapes.push_back(arguments.outputs.at(role)->shape());
    dtypes.push_back(arguments.outputs.at(role)->dtype());
  }
  std::vector<std::pair<std::string, mx::fast::TemplateArg>> constants = {
      {"T", dtype_of(launch.library)},
      {"Index", kernel.wide_index ? mx::int64 : mx::int32},
      {"V", kernel.vector_width}};
  constants.insert(constants.end(), kernel.flags.begin(), kernel.flags.end());

  const auto [gx, gy, gz] = kernel.grid;
  const auto [bx, by, bz] = kernel.group;
  const std::vector<mx::array> results = mx::fast::cuda_kernel(
      kernel.name,
      kernel.inputs,
      kernel.outputs,
      kernel.source,
      kernel.header,
      /* ensure_row_contiguous */ false)(
      arrays,
      shapes,
      dtypes,
      {gx, gy, gz},
      {bx, by, bz},
      constants,
      sums ? std::optional(0.0f) : std::nullopt,
      /* verbose */ false,
      stream);
  run_now(results[0], stream);
  for (size_t i = 0; i < results.size(); ++i) {
    arguments.outputs.at(kernel.outputs[i])->copy_shared_buffer(results[i]);
  }
}

void zero_fill(mx::array& out, mx::Dtype, mx::Stream stream) {
  if (!on_cpu(stream)) {
    return zeros(out, stream);
  }
  stand_in::zero_fill(out, stream);
}

int64_t place_of(const mx::array& x) {
  // A slice may start anywhere, and so may memory that is not MLX's own.
  if (x.data_shared_ptr() == nullptr) { // memory of its own, to come
    return 0;
  }
  return owns_memory(x) ? x.offset() : x.itemsize();
}

void keep(const mx::array& x, mx::Stream stream) {
  if (on_cpu(stream)) {
    return stand_in::keep(x, stream);
  }
  mx::cu::get_command_encoder(stream).add_completed_handler(
      [data = x.data_shared_ptr()]() {});
}

void drain(mx::Stream stream) {
  if (on_cpu(stream)) {
    return stand_in::drain(stream);
  }
  mx::synchronize(stream);
}

bool available() {
  return kHasCudaEncoder && mx::cu::get_command_encoder != nullptr &&
      mx::cu::is_available() && mx::is_available(mx::Device::gpu);
}

bool stands_in_on_cpu() {
  return environment_flag("MLX_DEFORM_STAND_IN");
}

} // namespace mlx_deform::gpu
