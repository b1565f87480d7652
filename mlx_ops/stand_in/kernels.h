// The kernels of gpu/kernels.h on CPU streams, pixel by pixel and without
// haste. With MLX_DEFORM_STAND_IN=1 the ops take the GPU's route over them, so
// that its chunks and products are tested on any machine; with
// MLX_DEFORM_STAND_IN=own each launch has outputs of its own, as on CUDA.

#pragma once

#include "mlx_ops/gpu/kernels.h"

namespace mlx_deform::stand_in {

namespace mx = mlx::core;

bool in_place();

using gpu::ColumnCotangent;

void im2col(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& columns,
    mx::Stream stream);

void col2im(
    const DeformConv2dParams& params,
    const ColumnCotangent& grad_columns,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& grad_input_f32,
    mx::Stream stream);

void offset_grad(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const ColumnCotangent& grad_columns,
    mx::array* grad_offset,
    mx::array* grad_mask,
    mx::Stream stream);

void output_product(
    const DeformConv2dParams& params,
    const mx::array& columns,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream);

void column_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& weight,
    mx::array& grad_columns,
    mx::Stream stream);

void weight_product(
    const DeformConv2dParams& params,
    const mx::array& cotangent,
    const mx::array& columns,
    mx::array& grad_weight_f32,
    mx::Stream stream);

void direct_output(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream);

void direct_weight(
    const DeformConv2dParams& params,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& cotangent,
    mx::array& grad_weight_f32,
    mx::Stream stream);

void zero_fill(mx::array& out, mx::Stream stream);

void keep(const mx::array& x, mx::Stream stream);

void drain(mx::Stream stream);

} // namespace mlx_deform::stand_in
