// Forward mode from reverse mode, for primitives whose VJP is known.

#pragma once

#include <functional>
#include <vector>

#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx_deform {

// J * t, given v -> J^T * v. That function is linear in v, so its own VJP with
// the cotangent t is J * t, wherever v is.
inline std::vector<mlx::core::array> jvp_from_vjp(
    const std::function<std::vector<mlx::core::array>(
        const std::vector<mlx::core::array>&)>& vjp,
    const std::vector<mlx::core::array>& outputs, // for their shapes and types
    const std::vector<mlx::core::array>& tangents,
    mlx::core::Stream stream) {
  std::vector<mlx::core::array> zeros;
  for (const auto& x : outputs) {
    zeros.push_back(mlx::core::zeros(x.shape(), x.dtype(), stream));
  }
  return mlx::core::vjp(vjp, zeros, tangents).second;
}

} // namespace mlx_deform
