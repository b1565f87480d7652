// How vmap's axis is folded into an array's own axes and taken out again. An
// axis of -1 marks an array that isn't mapped; it is repeated.

#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/ops.h"

namespace mlx_deform {

namespace mx = mlx::core;

inline int mapped_size(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) {
      return inputs[i].shape(axes[i]);
    }
  }
  return 1;
}

// (size, ...) whether or not `x` is mapped.
inline mx::array
mapped_first(const mx::array& x, int axis, int size, mx::Stream s) {
  if (axis >= 0) {
    return mx::moveaxis(x, axis, 0, s);
  }
  mx::Shape shape = x.shape();
  shape.insert(shape.begin(), size);
  return mx::broadcast_to(mx::expand_dims(x, 0, s), shape, s);
}

// (size * first, ...)
inline mx::array
fold_first(const mx::array& x, int axis, int size, mx::Stream s) {
  return mx::flatten(mapped_first(x, axis, size, s), 0, 1, s);
}
inline mx::array unfold_first(const mx::array& x, int size, mx::Stream s) {
  return mx::unflatten(x, 0, {size, x.shape(0) / size}, s);
}

// (..., size * last)
inline mx::array
fold_last(const mx::array& x, int axis, int size, mx::Stream s) {
  return mx::flatten(
      mx::moveaxis(mapped_first(x, axis, size, s), 0, -2, s), -2, -1, s);
}
inline mx::array unfold_last(const mx::array& x, int size, mx::Stream s) {
  return mx::moveaxis(
      mx::unflatten(x, -1, {size, x.shape(-1) / size}, s), -2, 0, s);
}

} // namespace mlx_deform
