// Shapes of a deformable convolution and their checks, stated once: the ops
// call them before anything is scheduled, the primitives to derive their sizes
// from the arrays at hand.

#pragma once

#include <optional>
#include <string>
#include <utility>

#include "mlx/array.h"
#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform {

namespace mx = mlx::core;

using Pair = std::pair<int, int>; // (rows, columns)

struct Geometry {
  Pair stride{1, 1};
  Pair padding{0, 0};
  Pair dilation{1, 1};

  bool operator==(const Geometry&) const = default;
};

// Throws std::invalid_argument (a ValueError in Python) that reads
// "[tag] rule; got value" unless the shapes fit together.
DeformConv2dParams check_deform_conv2d(
    const std::string& tag,
    const Geometry& geometry,
    const mx::Shape& input,
    const mx::Shape& offset,
    const mx::Shape& weight,
    const std::optional<mx::Shape>& bias,
    const std::optional<mx::Shape>& mask);

DeformConv2dParams check_deform_im2col(
    const std::string& tag,
    const Geometry& geometry,
    const Pair& kernel_size,
    const mx::Shape& input,
    const mx::Shape& offset,
    const std::optional<mx::Shape>& mask);

} // namespace mlx_deform
