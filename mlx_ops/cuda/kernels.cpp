// Runs the launches of the dispatch plan through MLX's fast::cuda_kernel, which
// compiles a source for the GPU at hand when it first runs. Nothing of CUDA is
// needed to build this, and it links and loads beside MLX's CPU-only library,
// where no GPU stream gets here.
//
// A cuda_kernel is a node of MLX's graph that allocates its outputs, so kernels
// do not write in place (gpu/kernels.h). That is also what MLX's encoder is
// made for: it orders the nodes of a CUDA graph by who wrote a buffer, not by
// who read it, so a buffer that is written anew while an earlier kernel may
// still read it would be a race. Fresh outputs have no earlier reader.

#include "mlx_ops/gpu/kernels.h"

#include <functional>
#include <map>
#include <optional>
#include <string>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/stream.h"

#include "mlx_ops/cuda/launch.h"
#include "mlx_ops/gpu/dispatch.h"
#include "mlx_ops/gpu/plan_inputs.h"
#include "mlx_ops/gpu/run_now.h"
#include "mlx_ops/stand_in/kernels.h"

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

using Inputs = std::map<std::string, const mx::array*>;
using Outputs = std::map<std::string, mx::array*>;

bool on_cpu(mx::Stream stream) {
  return stream.device == mx::Device::cpu;
}

// A slice may start anywhere, and so may memory that is not MLX's own.
int64_t place_of(const mx::array& a) {
  return a.data_shared_ptr()->is_owned() ? a.offset() : a.itemsize();
}

// `x` with `count` words as its strides, which cuda_kernel passes on by value.
// Sizes in an array of their own would have to reach the GPU first, through
// memory that the host has just written.
mx::array with_words(const mx::array& x, const int64_t* words, int count) {
  mx::array view(mx::Shape(count, 1), x.dtype(), nullptr, {});
  view.copy_shared_buffer(
      x, mx::Strides(words, words + count), x.flags(), x.data_size());
  view.set_status(mx::array::Status::available);
  return view;
}

// Gives an output the memory of an array that was just computed for it.
void give(mx::array& out, const mx::array& result) {
  out.copy_shared_buffer(result);
}

void zeros(mx::array& out, mx::Stream stream) {
  const mx::array result = mx::zeros(out.shape(), out.dtype(), stream);
  run_now(result, stream);
  give(out, result);
}

// `dtype` is T of the kernel. Outputs start as `initial`, if given.
void run(
    const Launch& launch,
    const DeformConv2dParams& params,
    mx::Dtype dtype,
    const Inputs& inputs,
    const Outputs& outputs,
    std::optional<float> initial,
    mx::Stream stream) {
  if (launch.empty()) {
    for (const auto& [role, out] : outputs) {
      if (out) {
        zeros(*out, stream);
      }
    }
    return;
  }
  const cuda::CustomKernel kernel = cuda::custom_kernel(launch, params);

  std::vector<mx::array> arrays;
  for (const std::string& role : kernel.inputs) {
    arrays.push_back(*inputs.at(role));
  }
  const int64_t* words = kernel.words.data();
  arrays[0] = with_words(arrays[0], words, kFirstWords);
  arrays[1] =
      with_words(arrays[1], words + kFirstWords, kLaunchWords - kFirstWords);

  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const std::string& role : kernel.outputs) {
    shapes.push_back(outputs.at(role)->shape());
    dtypes.push_back(outputs.at(role)->dtype());
  }
  std::vector<std::pair<std::string, mx::fast::TemplateArg>> constants = {
      {"T", dtype},
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
      initial,
      /* verbose */ false,
      stream);
  run_now(results[0], stream);
  for (size_t i = 0; i < results.size(); ++i) {
    give(*outputs.at(kernel.outputs[i]), results[i]);
  }
}

} // namespace

bool in_place(mx::Stream stream) {
  return on_cpu(stream) && stand_in::in_place();
}

void im2col(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& columns,
    mx::Stream stream) {
  if (on_cpu(stream)) {
    return stand_in::im2col(params, input, offset, mask, columns, stream);
  }
  run(plan_im2col(params, dtype_name(input), options_for({place_of(input)})),
      params,
      input.dtype(),
      {{"input", &input}, {"offset", &offset}, {"mask", mask}},
      {{"columns", &columns}},
      std::nullopt,
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
  if (on_cpu(stream)) {
    return stand_in::col2im(
        params, grad_columns, offset, mask, grad_input_f32, stream);
  }
  const mx::array& columns = *grad_columns.columns;
  run(plan_col2im(params, dtype_name(columns), deterministic),
      params,
      columns.dtype(),
      {{"grad_columns", &columns}, {"offset", &offset}, {"mask", mask}},
      {{"grad_input", &grad_input_f32}},
      0.0f,
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
  if (on_cpu(stream)) {
    return stand_in::offset_grad(
        params,
        input,
        offset,
        mask,
        grad_columns,
        grad_offset,
        grad_mask,
        stream);
  }
  const mx::array& columns = *grad_columns.columns;
  run(plan_offset_grad(
          params,
          dtype_name(input),
          grad_offset != nullptr,
          grad_mask != nullptr,
          options_for({place_of(input), place_of(columns)})),
      params,
      input.dtype(),
      {{"input", &input},
       {"offset", &offset},
       {"mask", mask},
       {"grad_columns", &columns}},
      {{"grad_offset", grad_offset}, {"grad_mask", grad_mask}},
      std::nullopt,
      stream);
}

// Kernels that write in place: never on a CUDA stream.

void output_product(
    const DeformConv2dParams& params,
    const mx::array& columns,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream) {
  stand_in::output_product(params, columns, weight, bias, out, stream);
}

void column_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& weight,
    mx::array& grad_columns,
    mx::Stream stream) {
  stand_in::column_product(params, cotangent, weight, grad_columns, stream);
}

void weight_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& columns,
    mx::array& grad_weight_f32,
    bool,
    mx::Stream stream) {
  stand_in::weight_product(params, cotangent, columns, grad_weight_f32, stream);
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
  stand_in::direct_output(
      params, input, offset, mask, weight, bias, out, stream);
}

void direct_weight(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& cotangent,
    mx::array& grad_weight_f32,
    bool,
    mx::Stream stream) {
  stand_in::direct_weight(
      params, input, offset, mask, cotangent, grad_weight_f32, stream);
}

void zero_fill(mx::array& out, mx::Dtype, mx::Stream stream) {
  if (on_cpu(stream)) {
    return stand_in::zero_fill(out, stream);
  }
  zeros(out, stream);
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
  return mx::cu::get_command_encoder != nullptr && mx::cu::is_available() &&
      mx::is_available(mx::Device::gpu);
}

bool stands_in_on_cpu() {
  return environment_flag("MLX_DEFORM_STAND_IN");
}

bool deterministic() {
  return environment_flag("MLX_DEFORM_DETERMINISTIC");
}

} // namespace mlx_deform::gpu
