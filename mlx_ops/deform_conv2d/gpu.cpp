#include "mlx_ops/deform_conv2d/op.h"

#include "mlx/ops.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/deform_conv2d/chunks.h"
#include "mlx_ops/deform_conv2d/gpu_kernels.h"
#include "mlx_ops/deform_conv2d/routes.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/gpu/run_now.h"

namespace mlx_deform {

namespace gpu {

mx::array view_of(
    const mx::array& x,
    const mx::Shape& shape,
    const mx::Strides& strides,
    int64_t offset) {
  mx::array view(shape, x.dtype(), nullptr, {});
  bool row_contiguous = true;
  int64_t size = 1;
  for (int i = static_cast<int>(shape.size()) - 1; i >= 0; --i) {
    row_contiguous = row_contiguous && (shape[i] == 1 || strides[i] == size);
    size *= shape[i];
  }
  view.copy_shared_buffer(
      x,
      strides,
      {row_contiguous, row_contiguous, row_contiguous && shape.size() == 1},
      size,
      offset);
  view.set_status(mx::array::Status::available);
  return view;
}

DeformConv2dParams
with_pixels(const DeformConv2dParams& params, int64_t begin, int64_t end) {
  DeformConv2dParams p = params;
  p.pixel_begin = begin;
  p.pixel_end = end;
  p.column_tap = p.C / p.G;
  p.column_pixel = p.kH * p.kW * p.column_tap;
  p.column_group = (end - begin) * p.column_pixel;
  return p;
}

mx::array as_type(const mx::array& x, mx::Dtype dtype, mx::Stream stream) {
  const mx::array out = mx::astype(x, dtype, stream);
  run_now(out, stream);
  if (x.dtype() != dtype) {
    keep(out, stream);
  }
  return out;
}

namespace {

DeformConv2dParams piece_params(const DeformConv2dParams& p, Piece piece) {
  const PixelRange range = piece_pixels(p, piece.index, piece.count);
  return with_pixels(p, range.begin, range.end);
}

} // namespace

} // namespace gpu

void DeformConv2d::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const gpu::ConvArguments at{
      gpu::piece_params(params(inputs), piece_),
      inputs[0],
      inputs[1],
      inputs[2],
      has_bias_ ? &inputs[bias_index()] : nullptr,
      has_mask_ ? &inputs[mask_index()] : nullptr};
  mx::array& out = outputs[0];
  if (!gpu::in_place(stream())) {
    gpu::own_outputs_route::forward(at, out, stream());
    return;
  }
  gpu::continue_or_allocate(piece_, inputs, outputs);
  if (out.size() > 0) {
    gpu::in_place_route::forward(at, out, stream());
  }
}

void DeformConv2dVJP::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  size_t next = 0;
  const auto take = [&](bool is_wanted) {
    return is_wanted ? &outputs[next++] : nullptr;
  };
  gpu::Gradients gradients{};
  gradients.input = take(wanted_.input);
  gradients.offset = take(wanted_.offset);
  gradients.weight = take(wanted_.weight);
  gradients.mask = take(wanted_.mask);
  const gpu::ConvArguments at{
      gpu::piece_params(params(inputs), piece_),
      inputs[0],
      inputs[1],
      inputs[2],
      nullptr,
      has_mask_ ? &inputs[4] : nullptr};
  const mx::array& cotangent = inputs[3];
  if (!gpu::in_place(stream())) {
    gpu::own_outputs_route::backward(at, cotangent, gradients, stream());
    return;
  }
  gpu::continue_or_allocate(piece_, inputs, outputs);
  // Sums start at 0; the others are written whole.
  if (piece_.index == 0) {
    for (mx::array* sum : {gradients.input, gradients.weight}) {
      if (sum) {
        gpu::zero_fill(*sum, inputs[0].dtype(), stream());
      }
    }
  }
  if (at.p.pixel_begin < at.p.pixel_end) {
    gpu::in_place_route::backward(at, cotangent, gradients, stream());
  }
}

} // namespace mlx_deform
