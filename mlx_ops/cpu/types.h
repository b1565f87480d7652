// How an array's type at run time picks a kernel's template.

#pragma once

#include "mlx/array.h"
#include "mlx_ops/cpu/tile_kernels.h"

namespace mlx_deform::cpu {

namespace mx = mlx::core;

// Calls f.template operator()<T, R>() for the storage type `dtype`.
template <typename F>
void dispatch_types(mx::Dtype dtype, F&& f) {
  if (dtype == mx::float64) {
    f.template operator()<double, double>();
  } else if (dtype == mx::float32) {
    f.template operator()<float, float>();
  } else if (dtype == mx::float16) {
    f.template operator()<Float16, float>();
  } else {
    f.template operator()<BFloat16, float>();
  }
}

} // namespace mlx_deform::cpu
