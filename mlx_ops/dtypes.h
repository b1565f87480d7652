// Element types: what a call computes in, and how a type at run time picks a
// template.

#pragma once

#include <optional>
#include <vector>

#include "mlx/dtype.h"
#include "mlx/ops.h"
#include "mlx/utils.h"

namespace mlx_deform {

namespace mx = mlx::core;

// The types of one call. Coordinates, interpolation weights and sums are held
// in `compute` (float32 at least: a half cannot hold 700.3), image, columns and
// output in `storage`. The result is cast to `result`, which differs from
// `storage` only where a float64 offset or mask meets a narrower image.
struct CallTypes {
  mx::Dtype result;
  mx::Dtype storage;
  mx::Dtype compute;
};

// `values` are the arrays that promote together (input, weight, bias), `plans`
// those that say where to sample (offset, mask).
inline CallTypes call_types(
    const std::vector<mx::array>& values,
    const std::vector<mx::array>& plans) {
  const mx::Dtype result = mx::result_type(values);
  bool wide = result == mx::float64;
  for (const auto& x : plans) {
    wide = wide || x.dtype() == mx::float64;
  }
  return {
      result, wide ? mx::float64 : result, wide ? mx::float64 : mx::float32};
}

// An array as the kernels want it: of that type and row-contiguous. Copies only
// where it must.
inline mx::array
as_operand(const mx::array& x, mx::Dtype dtype, mx::Stream stream) {
  return mx::contiguous(mx::astype(x, dtype, stream), false, stream);
}

} // namespace mlx_deform
