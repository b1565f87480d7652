// What a dispatch plan asks of MLX's arrays.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "mlx/array.h"
#include "mlx_ops/gpu/launch.h"

namespace mlx_deform::gpu {

namespace mx = mlx::core;

inline std::string dtype_name(mx::Dtype dtype) {
  switch (dtype) {
    case mx::float16:
      return "float16";
    case mx::bfloat16:
      return "bfloat16";
    default: // float32, or float64 on a stand-in, which is planned alike
      return "float32";
  }
}

inline std::string dtype_name(const mx::array& a) {
  return dtype_name(a.dtype());
}

// Vector accesses need aligned arrays. `places` are where arrays start, in
// bytes from an address that is aligned.
inline PlanOptions options_for(std::initializer_list<int64_t> places) {
  PlanOptions out;
  for (const int64_t place : places) {
    while (place % out.alignment != 0) {
      out.alignment /= 2;
    }
  }
  return out;
}

} // namespace mlx_deform::gpu
