// Derivatives of a VJP primitive, from what is known of the op itself.

#pragma once

#include <functional>
#include <vector>

#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx_deform {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// The VJP of a VJP. The gradients g are those of L = <u, f(x)> with the
// cotangent u. Paired with cotangents v of their own, <v, g> is the derivative
// of L along v, that is <u, D_v f>. So its gradient in u is D_v f, and those in
// x are the VJP of D_v f with the cotangent u.
//
// `primals` are those of the VJP primitive, u among them at cotangent_index;
// `derivative` maps such primals to D_v f, of type `compute`.
inline Arrays vjp_of_vjp(
    const std::function<mx::array(const Arrays&)>& derivative,
    const Arrays& primals,
    int cotangent_index,
    const std::vector<int>& argnums,
    mx::Dtype compute,
    mx::Stream stream) {
  std::vector<int> varied;
  Arrays values;
  for (int index : argnums) {
    if (index != cotangent_index) {
      varied.push_back(index);
      values.push_back(primals[index]);
    }
  }
  const mx::array& cotangent = primals[cotangent_index];
  Arrays gradients;
  if (!varied.empty()) {
    const auto along = [&](const Arrays& at) {
      Arrays all = primals;
      for (size_t i = 0; i < varied.size(); ++i) {
        all[varied[i]] = at[i];
      }
      return Arrays{derivative(all)};
    };
    gradients =
        mx::vjp(along, values, {mx::astype(cotangent, compute, stream)}).second;
  }
  Arrays out;
  size_t next = 0;
  for (int index : argnums) {
    out.push_back(
        index == cotangent_index
            ? mx::astype(derivative(primals), cotangent.dtype(), stream)
            : gradients[next++]);
  }
  return out;
}

// J * t, given v -> J^T * v. That function is linear in v, so its own VJP with
// the cotangent t is J * t, wherever v is.
inline Arrays jvp_from_vjp(
    const std::function<Arrays(const Arrays&)>& vjp,
    const std::vector<mx::Shape>& shapes, // of v
    mx::Dtype dtype,
    const Arrays& tangents,
    mx::Stream stream) {
  Arrays zeros;
  for (const mx::Shape& shape : shapes) {
    zeros.push_back(mx::zeros(shape, dtype, stream));
  }
  return mx::vjp(vjp, zeros, tangents).second;
}

} // namespace mlx_deform
