#include "mlx_ops/deform_conv2d/im2col.h"

#include "mlx_ops/arrays.h"
#include "mlx_ops/deform_conv2d/gpu_kernels.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform {

void DeformIm2col::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  mx::array& columns = outputs[0];
  if (gpu::in_place(stream())) {
    allocate(columns);
  }
  gpu::im2col(
      params(inputs),
      inputs[0],
      inputs[1],
      has_mask_ ? &inputs[2] : nullptr,
      columns,
      stream());
}

void DeformIm2colVJP::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const bool in_place = gpu::in_place(stream());
  if (in_place) {
    allocate(outputs);
  }
  size_t next = 0;
  const auto take = [&](bool wanted) {
    return wanted ? &outputs[next++] : nullptr;
  };
  mx::array* grad_input = take(wanted_.input);
  mx::array* grad_offset = take(wanted_.offset);
  mx::array* grad_mask = take(wanted_.mask);

  const DeformConv2dParams p = params(inputs);
  const mx::array* mask = has_mask_ ? &inputs[3] : nullptr;
  if (grad_input) {
    if (in_place) {
      gpu::zero_fill(*grad_input, inputs[0].dtype(), stream());
    }
    gpu::col2im(
        p,
        {&inputs[2]},
        inputs[1],
        mask,
        *grad_input,
        gpu::deterministic(),
        stream());
  }
  if (grad_offset || grad_mask) {
    gpu::offset_grad(
        p,
        inputs[0],
        inputs[1],
        mask,
        {&inputs[2]},
        grad_offset,
        grad_mask,
        stream());
  }
}

} // namespace mlx_deform
