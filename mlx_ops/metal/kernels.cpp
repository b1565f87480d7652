// Encodes the launches of the dispatch plan with MLX's Metal command encoder.

#include "mlx_ops/gpu/kernels.h"

#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <variant>

#include "mlx/backend/metal/device.h"
#include "mlx/stream.h"

#include "mlx_ops/gpu/dispatch.h"
#include "mlx_ops/gpu/plan_inputs.h"
#include "mlx_ops/metal/sources.h"

namespace mlx_deform::gpu {

namespace {

// What a launch's buffer roles stand for.
struct Arguments {
  std::map<std::string, const mx::array*> inputs;
  std::map<std::string, mx::array*> outputs;
  const DeformConv2dParams* params = nullptr;
  int64_t size = 0;
};

// A slice may start anywhere; Metal's buffers start at a multiple of 16.
int64_t place_of(const mx::array& a) {
  return a.offset();
}

MTL::Library* library_for(mx::metal::Device& device, const Library& library) {
  static const std::string hash = hash_of(metal::kernel_source);
  // NaN and infinite coordinates have defined results, which fast math breaks.
  mx::CompileOptions options;
  options.math_mode = mx::MathMode::Safe;
  return device.get_library(library_name(library, hash), options, [&]() {
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

void encode(const Launch& launch, Arguments arguments, mx::Stream stream) {
  if (launch.empty()) {
    return;
  }
  mx::metal::Device& device = mx::metal::device(stream.device);
  mx::metal::CommandEncoder& encoder = mx::metal::get_command_encoder(stream);
  MTL::ComputePipelineState* pipeline = pipeline_for(device, launch);
  encoder.set_compute_pipeline_state(pipeline);
  for (const Binding& binding : launch.buffers) {
    if (binding.role == "params") {
      encoder.set_bytes(*arguments.params, binding.index);
    } else if (binding.role == "size") {
      encoder.set_bytes(arguments.size, binding.index);
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

} // namespace

bool in_place(mx::Stream) {
  return true;
}

void im2col(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& columns,
    mx::Stream stream) {
  encode(
      plan_im2col(
          params,
          dtype_name(input),
          options_for({place_of(input), place_of(columns)})),
      {{{"input", &input}, {"offset", &offset}, {"mask", mask}},
       {{"columns", &columns}},
       &params},
      stream);
}

void col2im(
    const DeformConv2dParams& params,
    const ColumnCotangent& grad_columns,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& grad_input_f32,
    bool deterministic,
    mx::Stream stream) {
  PlanOptions options;
  options.direct = grad_columns.columns == nullptr;
  const mx::array& source =
      options.direct ? *grad_columns.cotangent : *grad_columns.columns;
  encode(
      plan_col2im(params, dtype_name(source), deterministic, options),
      {{{"grad_columns", grad_columns.columns},
        {"cotangent", grad_columns.cotangent},
        {"weight", grad_columns.weight},
        {"offset", &offset},
        {"mask", mask}},
       {{"grad_input", &grad_input_f32}},
       &params},
      stream);
}

void offset_grad(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const ColumnCotangent& grad_columns,
    mx::array* grad_offset,
    mx::array* grad_mask,
    mx::Stream stream) {
  const bool direct = grad_columns.columns == nullptr;
  PlanOptions options = options_for(
      {place_of(input), direct ? 0 : place_of(*grad_columns.columns)});
  options.direct = direct;
  encode(
      plan_offset_grad(
          params,
          dtype_name(input),
          grad_offset != nullptr,
          grad_mask != nullptr,
          options),
      {{{"input", &input},
        {"offset", &offset},
        {"mask", mask},
        {"grad_columns", grad_columns.columns},
        {"cotangent", grad_columns.cotangent},
        {"weight", grad_columns.weight}},
       {{"grad_offset", grad_offset}, {"grad_mask", grad_mask}},
       &params},
      stream);
}

void output_product(
    const DeformConv2dParams& params,
    const mx::array& columns,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream) {
  encode(
      plan_output_product(
          params,
          dtype_name(columns),
          bias != nullptr,
          options_for({place_of(columns), place_of(weight)})),
      {{{"columns", &columns}, {"weight", &weight}, {"bias", bias}},
       {{"out", &out}},
       &params},
      stream);
}

void column_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& weight,
    mx::array& grad_columns,
    mx::Stream stream) {
  encode(
      plan_column_product(
          params,
          dtype_name(cotangent),
          options_for({place_of(cotangent), place_of(weight)})),
      {{{"cotangent", &cotangent}, {"weight", &weight}},
       {{"grad_columns", &grad_columns}},
       &params},
      stream);
}

void weight_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& columns,
    mx::array& grad_weight_f32,
    bool deterministic,
    mx::Stream stream) {
  encode(
      plan_weight_product(
          params,
          dtype_name(cotangent),
          deterministic,
          options_for({place_of(cotangent), place_of(columns)})),
      {{{"cotangent", &cotangent}, {"columns", &columns}},
       {{"grad_weight", &grad_weight_f32}},
       &params},
      stream);
}

void direct_output(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream) {
  encode(
      plan_direct_output(
          params,
          dtype_name(input),
          bias != nullptr,
          options_for({place_of(input), place_of(weight)})),
      {{{"input", &input},
        {"offset", &offset},
        {"mask", mask},
        {"weight", &weight},
        {"bias", bias}},
       {{"out", &out}},
       &params},
      stream);
}

void direct_weight(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& cotangent,
    mx::array& grad_weight_f32,
    bool deterministic,
    mx::Stream stream) {
  encode(
      plan_direct_weight(
          params,
          dtype_name(input),
          deterministic,
          options_for({place_of(input)})),
      {{{"input", &input},
        {"offset", &offset},
        {"mask", mask},
        {"cotangent", &cotangent}},
       {{"grad_weight", &grad_weight_f32}},
       &params},
      stream);
}

void zero_fill(mx::array& out, mx::Dtype library, mx::Stream stream) {
  Arguments arguments;
  arguments.outputs = {{"out", &out}};
  arguments.size = int64_t(out.size());
  encode(
      plan_zero_fill(arguments.size, dtype_name(library)), arguments, stream);
}

void keep(const mx::array& x, mx::Stream stream) {
  // Not add_temporary: the encoder would take the buffer for its own and not
  // wait for whoever else writes it.
  mx::metal::get_command_encoder(stream)
      .get_command_buffer()
      ->addCompletedHandler(
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

bool deterministic() {
  return environment_flag("MLX_DEFORM_DETERMINISTIC");
}

} // namespace mlx_deform::gpu
