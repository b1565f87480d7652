// What this op's plans share: its sizes, and what must hold of them.

#pragma once

#include <cstdint>

#include "mlx_ops/deform_conv2d/params.h"
#include "mlx_ops/gpu/plan_arithmetic.h"

namespace mlx_deform::gpu {

inline int64_t taps(const DeformConv2dParams& p) {
  return product({p.kH, p.kW});
}

inline int64_t all_pixels(const DeformConv2dParams& p) {
  return product({p.N, p.Ho, p.Wo});
}

inline int64_t chunk_pixels(const DeformConv2dParams& p) {
  return p.pixel_end - p.pixel_begin;
}

void check(const DeformConv2dParams& p);
void check_outputs(const DeformConv2dParams& p); // of a weight

// The elements of the largest array that a kernel of samples may index.
int64_t largest_array(const DeformConv2dParams& p);

} // namespace mlx_deform::gpu
