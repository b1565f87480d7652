// Encodes the launches of the dispatch plans with MLX's Metal command encoder.

#include "mlx_ops/gpu/run.h"

#include <sstream>

#include "mlx_ops/gpu/plan_inputs.h"
#include "mlx_ops/metal/sources.h"
#include "mlx_ops/mlx_version.h"

namespace mlx_deform::gpu {

namespace {

MTL::Library* library_for(mx::metal::Device& device, const Library& library) {
  static const std::string hash = hash_of(metal::kernel_source);
  return metal::safe_math_library(device, library_name(library, hash), [&]() {
    return library_header(library) + metal::kernel_source;
  });
}

MTL::ComputePipelineState* pipeline_for(
    mx::metal::Device& device,
    const Launch& launch) {
  std::ostringstream name;
  name << launch.kernel;
  mx::metal::MTLFCList constants;
  for (const FunctionConstant& constant : launch.constants) {
    name << "_" << constant.name << "_" << constant.value;
    // A bool's byte is the first one of a little-endian 0 or 1.
    constants.emplace_back(
        &constant.value,
        constant.is_bool ? MTL::DataType::DataTypeBool
                         : MTL::DataType::DataTypeInt,
        constant.index);
  }
  return device.get_kernel(
      launch.kernel,
      library_for(device, launch.library),
      name.str(),
      constants);
}

} // namespace

bool in_place(mx::Stream) {
  return true;
}

void run(
    const Launch& launch,
    const Arguments& arguments,
    mx::Stream stream,
    bool) {
  if (launch.empty()) {
    return;
  }
  mx::metal::Device& device = mx::metal::device(stream.device);
  mx::metal::CommandEncoder& encoder = metal::command_encoder(stream);
  MTL::ComputePipelineState* pipeline = pipeline_for(device, launch);
  encoder.set_compute_pipeline_state(pipeline);
  for (const Binding& binding : launch.buffers) {
    if (binding.role == "params") {
      encoder.set_bytes(
          arguments.params.data(), int(arguments.params.size()), binding.index);
    } else if (binding.is_output) {
      encoder.set_output_array(
          *arguments.outputs.at(binding.role), binding.index);
    } else {
      encoder.set_input_array(
          *arguments.inputs.at(binding.role), binding.index);
    }
  }
  const auto group =
      fit_group(launch, int64_t(pipeline->maxTotalThreadsPerThreadgroup()));
  encoder.dispatch_threads(
      MTL::Size::Make(launch.grid[0], launch.grid[1], launch.grid[2]),
      MTL::Size::Make(group[0], group[1], group[2]));
}

void zero_fill(mx::array& out, mx::Dtype library, mx::Stream stream) {
  const int64_t size = int64_t(out.size());
  run(plan_zero_fill(size, dtype_name(library)),
      {{}, {{"out", &out}}, bytes_of(size)},
      stream);
}

int64_t place_of(const mx::array& x) {
  // A slice may start anywhere; Metal's buffers start at a multiple of 16.
  return x.offset();
}

void keep(const mx::array& x, mx::Stream stream) {
  // Not add_temporary: the encoder would take the buffer for its own and not
  // wait for whoever else writes it.
  metal::command_buffer(stream)->addCompletedHandler(
      [data = x.data_shared_ptr()](MTL::CommandBuffer*) {});
}

void drain(mx::Stream stream) {
  mx::synchronize(stream);
}

bool available() {
  return true;
}

bool stands_in_on_cpu() {
  return false;
}

} // namespace mlx_deform::gpu
