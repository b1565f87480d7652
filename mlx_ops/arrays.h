// Small things that every primitive's evaluation does with MLX arrays.

#pragma once

#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"

namespace mlx_deform {

namespace mx = mlx::core;

inline void allocate(mx::array& x) {
  x.set_data(mx::allocator::malloc(x.nbytes()));
}

inline void allocate(std::vector<mx::array>& arrays) {
  for (mx::array& x : arrays) {
    allocate(x);
  }
}

// What a task on a CPU stream takes along. The arrays outlive it: MLX keeps a
// primitive's inputs and outputs until its stream is past them.
inline std::vector<mx::array> weak_copies(
    const std::vector<mx::array>& arrays) {
  std::vector<mx::array> out;
  for (const mx::array& x : arrays) {
    out.push_back(mx::array::unsafe_weak_copy(x));
  }
  return out;
}

} // namespace mlx_deform
