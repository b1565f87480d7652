#include "mlx_ops/deform_conv2d/gpu_kernels.h"

#include "mlx_ops/deform_conv2d/dispatch.h"
#include "mlx_ops/gpu/plan_inputs.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform::gpu {

void im2col(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& columns,
    mx::Stream stream) {
  run(plan_im2col(
          params,
          dtype_name(input),
          options_for({place_of(input), place_of(columns)})),
      {{{"input", &input}, {"offset", &offset}, {"mask", mask}},
       {{"columns", &columns}},
       bytes_of(params)},
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
  const bool direct = grad_columns.columns == nullptr;
  const mx::array& source =
      direct ? *grad_columns.cotangent : *grad_columns.columns;
  run(plan_col2im(params, dtype_name(source), deterministic, direct),
      {{{"grad_columns", grad_columns.columns},
        {"cotangent", grad_columns.cotangent},
        {"weight", grad_columns.weight},
        {"offset", &offset},
        {"mask", mask}},
       {{"grad_input", &grad_input_f32}},
       bytes_of(params)},
      stream,
      /* sums */ true);
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
  run(plan_offset_grad(
          params,
          dtype_name(input),
          grad_offset != nullptr,
          grad_mask != nullptr,
          direct,
          options_for(
              {place_of(input), direct ? 0 : place_of(*grad_columns.columns)})),
      {{{"input", &input},
        {"offset", &offset},
        {"mask", mask},
        {"grad_columns", grad_columns.columns},
        {"cotangent", grad_columns.cotangent},
        {"weight", grad_columns.weight}},
       {{"grad_offset", grad_offset}, {"grad_mask", grad_mask}},
       bytes_of(params)},
      stream);
}

void output_product(
    const DeformConv2dParams& params,
    const mx::array& columns,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream) {
  run(plan_output_product(
          params,
          dtype_name(columns),
          bias != nullptr,
          options_for({place_of(columns), place_of(weight)})),
      {{{"columns", &columns}, {"weight", &weight}, {"bias", bias}},
       {{"out", &out}},
       bytes_of(params)},
      stream);
}

void column_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& weight,
    mx::array& grad_columns,
    mx::Stream stream) {
  run(plan_column_product(
          params,
          dtype_name(cotangent),
          options_for({place_of(cotangent), place_of(weight)})),
      {{{"cotangent", &cotangent}, {"weight", &weight}},
       {{"grad_columns", &grad_columns}},
       bytes_of(params)},
      stream);
}

void weight_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& columns,
    mx::array& grad_weight_f32,
    bool deterministic,
    mx::Stream stream) {
  run(plan_weight_product(
          params,
          dtype_name(cotangent),
          deterministic,
          options_for({place_of(cotangent), place_of(columns)})),
      {{{"cotangent", &cotangent}, {"columns", &columns}},
       {{"grad_weight", &grad_weight_f32}},
       bytes_of(params)},
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
  run(plan_direct_output(
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
       bytes_of(params)},
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
  run(plan_direct_weight(
          params,
          dtype_name(input),
          deterministic,
          options_for({place_of(input)})),
      {{{"input", &input},
        {"offset", &offset},
        {"mask", mask},
        {"cotangent", &cotangent}},
       {{"grad_weight", &grad_weight_f32}},
       bytes_of(params)},
      stream);
}

} // namespace mlx_deform::gpu
