// The two ways through a convolution on a GPU, one for kernels that write in
// place and one for kernels with outputs of their own (gpu/run.h). On
// either, the memory beside the results is bounded, whatever the sizes.

#pragma once

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform::gpu {

namespace mx = mlx::core;

// What a convolution is given, row-contiguous; absent ones are null.
struct ConvArguments {
  DeformConv2dParams p; // its pixels are those to work on
  const mx::array& input; // (N, H, W, C)
  const mx::array& offset; // (N, Ho, Wo, DG * kH * kW * 2)
  const mx::array& weight; // (O, kH, kW, C / G)
  const mx::array* bias; // (O)
  const mx::array* mask; // (N, Ho, Wo, DG * kH * kW)
};

// What the caller wants, float32 and of the arguments' shapes; null: not this
// one.
struct Gradients {
  mx::array* input;
  mx::array* offset;
  mx::array* weight;
  mx::array* mask;
};

// Kernels write in place: into `out`, and into gradients that have memory.
// grad_input and grad_weight are added to; the others are written.
namespace in_place_route {
void forward(const ConvArguments& at, mx::array& out, mx::Stream stream);
void backward(
    const ConvArguments& at,
    const mx::array& cotangent, // (N, Ho, Wo, O)
    const Gradients& gradients,
    mx::Stream stream);
} // namespace in_place_route

// Kernels have outputs of their own. Of all pixels at once; `out` and the
// gradients get their memory here.
namespace own_outputs_route {
void forward(const ConvArguments& at, mx::array& out, mx::Stream stream);
void backward(
    const ConvArguments& at,
    const mx::array& cotangent, // (N, Ho, Wo, O)
    const Gradients& gradients,
    mx::Stream stream);
} // namespace own_outputs_route

// `shape` elements of the buffer of `x`, from element `offset` on.
mx::array view_of(
    const mx::array& x,
    const mx::Shape& shape,
    const mx::Strides& strides,
    int64_t offset = 0);

// The params of one chunk, whose columns lie as (G, pixels, kH * kW * C / G).
DeformConv2dParams
with_pixels(const DeformConv2dParams& params, int64_t begin, int64_t end);

// An array of another type, at once; itself where it has that type.
mx::array as_type(const mx::array& x, mx::Dtype dtype, mx::Stream stream);

} // namespace mlx_deform::gpu
