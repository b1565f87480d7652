// How a deformable convolution is laid out on a GPU. Pure arithmetic on sizes,
// see gpu/launch.h.

#pragma once

#include <string>

#include "mlx_ops/deform_conv2d/params.h"
#include "mlx_ops/gpu/launch.h"

namespace mlx_deform::gpu {

// Columns of the pixels [pixel_begin, pixel_end).
Launch plan_im2col(
    const DeformConv2dParams& params,
    const std::string& dtype,
    const PlanOptions& options = {});

// Adds to grad_input, in float32. `direct`: this kernel and the next one make
// the columns' cotangent themselves, of the output's and the weight: see
// is_direct. The deterministic kernel adds in a fixed
// order, so its result is bitwise the same on every run; it is slower.
Launch plan_col2im(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool deterministic,
    bool direct = false,
    const PlanOptions& options = {});

// Writes grad_offset, grad_mask or both, of the pixels [pixel_begin,
// pixel_end). Deterministic.
Launch plan_offset_grad(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool wants_offset,
    bool wants_mask,
    bool direct = false,
    const PlanOptions& options = {});

// The three products with the weight, of the pixels [pixel_begin, pixel_end):
// the output, from the columns; the columns' cotangent, from the output's; and
// the weight's gradient, which is added to grad_weight in float32. The columns
// lie as (G, pixels, kH * kW * C / G).
Launch plan_output_product(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool has_bias,
    const PlanOptions& options = {});
Launch plan_column_product(
    const DeformConv2dParams& params,
    const std::string& dtype,
    const PlanOptions& options = {});
// Deterministic: one threadgroup adds up an element, however few there are.
Launch plan_weight_product(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options = {});

// Whether weight groups are so small, depthwise ones above all, that kernels
// do without columns.
bool is_direct(const DeformConv2dParams& params);

// Then: the output, and the weight's gradient, added to grad_weight in float32.
Launch plan_direct_output(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool has_bias,
    const PlanOptions& options = {});
// Deterministic: one thread adds up an element.
Launch plan_direct_weight(
    const DeformConv2dParams& params,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options = {});

} // namespace mlx_deform::gpu
