// The derivative of sampling along a direction of the offsets, written with the
// sampling itself, so that it runs on every backend and can be differentiated
// again.

#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_ops/deform_conv2d/shapes.h"

namespace mlx_deform {

// A sampling with this offset and mask. The mask carries the sign.
struct SamplingTerm {
  mx::array offset;
  mx::array mask;
};

// Inside its cell the bilinear surface is linear along each axis, so its slope
// is the difference of two samples on the cell's edges:
//   d S(y, x) / d y = S(floor(y) + 1, x) - S(floor(y), x)
// and the same for x. The tangent of the columns is the sum of these terms.
std::vector<SamplingTerm> offset_tangent_terms(
    const Geometry& geometry,
    const Pair& kernel_size,
    const mx::array& offset, // (N, Ho, Wo, 2 * DG * kH * kW)
    const std::optional<mx::array>& mask, // (N, Ho, Wo, DG * kH * kW)
    const mx::array& tangent, // as offset
    mx::Stream stream);

} // namespace mlx_deform
