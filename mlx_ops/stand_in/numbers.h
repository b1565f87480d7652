// How the stand-ins read arrays of half types.

#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx_ops/cpu/tile_kernels.h"

namespace mlx_deform::stand_in {

namespace mx = mlx::core;

// Numbers of type R from an array of type T.
template <typename T, typename R>
std::vector<R> numbers(const mx::array& x) {
  std::vector<R> out(x.size());
  cpu::tile_kernels<T, R>().to_compute(x.data<T>(), out.data(), x.size());
  return out;
}

} // namespace mlx_deform::stand_in
