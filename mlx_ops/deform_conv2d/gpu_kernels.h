// The kernels of a deformable convolution, encoded on a stream: a plan each,
// and the arrays that its roles stand for. Arrays are row-contiguous, and the
// caller keeps them alive until the stream has run. offset and mask are
// float32; input, columns and grad_columns share one type of float32, float16,
// bfloat16.
//
// Where kernels do not write in place (gpu/run.h), outputs have the shapes of
// the launch's pixels alone, and grad_input holds their share alone.

#pragma once

#include "mlx/array.h"
#include "mlx/stream.h"

#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform::gpu {

namespace mx = mlx::core;

// Writes the columns of the pixels [params.pixel_begin, params.pixel_end).
// `mask` is null exactly where params.has_mask is 0.
void im2col(
    const DeformConv2dParams& params,
    const mx::array& input, // (N, H, W, C)
    const mx::array& offset, // (N, Ho, Wo, DG * kH * kW * 2)
    const mx::array* mask, // (N, Ho, Wo, DG * kH * kW)
    mx::array& columns, // strides in params
    mx::Stream stream);

// The cotangent of the columns: an array, or, where that is null, what the
// cotangent of the output and the weight make of a small weight group.
struct ColumnCotangent {
  const mx::array* columns = nullptr; // strides in params
  const mx::array* cotangent = nullptr; // (N, Ho, Wo, O)
  const mx::array* weight = nullptr; // (O, kH, kW, C / G)
};

// Adds the pixels' share to grad_input, which in place holds zeros or an
// earlier sum.
// Without `deterministic` the order of the additions varies from run to run.
void col2im(
    const DeformConv2dParams& params,
    const ColumnCotangent& grad_columns,
    const mx::array& offset, // (N, Ho, Wo, DG * kH * kW * 2)
    const mx::array* mask, // (N, Ho, Wo, DG * kH * kW)
    mx::array& grad_input_f32, // (N, H, W, C), float32
    bool deterministic,
    mx::Stream stream);

// Writes the pixels' elements of grad_offset and grad_mask, both float32;
// either may be null. Deterministic.
void offset_grad(
    const DeformConv2dParams& params,
    const mx::array& input, // (N, H, W, C)
    const mx::array& offset, // (N, Ho, Wo, DG * kH * kW * 2)
    const mx::array* mask, // (N, Ho, Wo, DG * kH * kW)
    const ColumnCotangent& grad_columns,
    mx::array* grad_offset, // as offset, or the pixels' rows of it
    mx::array* grad_mask, // as mask, or the pixels' rows of it
    mx::Stream stream);

// ---- only where kernels write in place; elsewhere MLX's matmul multiplies

// The products with the weight, of the pixels in params, whose columns lie as
// (G, pixels, kH * kW * C / G). Sums are float32.
void output_product(
    const DeformConv2dParams& params,
    const mx::array& columns,
    const mx::array& weight, // (O, kH, kW, C / G)
    const mx::array* bias, // (O)
    mx::array& out, // (N, Ho, Wo, O)
    mx::Stream stream);
void column_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent, // (N, Ho, Wo, O)
    const mx::array& weight, // (O, kH, kW, C / G)
    mx::array& grad_columns,
    mx::Stream stream);
// Adds to grad_weight.
void weight_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent, // (N, Ho, Wo, O)
    const mx::array& columns,
    mx::array& grad_weight_f32, // (O, kH, kW, C / G), float32
    bool deterministic,
    mx::Stream stream);

// The same where weight groups are small, without columns: see is_direct.
void direct_output(
    const DeformConv2dParams& params,
    const mx::array& input, // (N, H, W, C)
    const mx::array& offset, // (N, Ho, Wo, DG * kH * kW * 2)
    const mx::array* mask, // (N, Ho, Wo, DG * kH * kW)
    const mx::array& weight, // (O, kH, kW, C / G)
    const mx::array* bias, // (O)
    mx::array& out, // (N, Ho, Wo, O)
    mx::Stream stream);
// Adds to grad_weight.
void direct_weight(
    const DeformConv2dParams& params,
    const mx::array& input, // (N, H, W, C)
    const mx::array& offset, // (N, Ho, Wo, DG * kH * kW * 2)
    const mx::array* mask, // (N, Ho, Wo, DG * kH * kW)
    const mx::array& cotangent, // (N, Ho, Wo, O)
    mx::array& grad_weight_f32, // (O, kH, kW, C / G), float32
    bool deterministic,
    mx::Stream stream);

} // namespace mlx_deform::gpu
