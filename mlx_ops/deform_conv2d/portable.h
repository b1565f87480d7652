// The ops in MLX's own primitives, see mlx_ops/portable.h. The columns are kept
// whole.

#pragma once

#include <optional>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform {

namespace mx = mlx::core;

// As deform_im2col and deform_conv2d compute, but for the result's type:
// columns come in that of `offset`, the type of all sums, and outputs in that
// of `input`.
mx::array portable_im2col(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const std::optional<mx::array>& mask,
    mx::Stream stream);

mx::array portable_conv2d(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& mask,
    mx::Stream stream);

} // namespace mlx_deform
