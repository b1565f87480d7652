#include "mlx_ops/deform_conv2d/offset_tangent.h"

#include "mlx/ops.h"
#include "mlx_ops/deform_conv2d/sampling_grid.h"

namespace mlx_deform {

std::vector<SamplingTerm> offset_tangent_terms(
    const Geometry& geometry,
    const Pair& kernel_size,
    const mx::array& offset,
    const std::optional<mx::array>& mask,
    const mx::array& tangent,
    mx::Stream s) {
  const auto [kh, kw] = kernel_size;
  const mx::Dtype dtype = offset.dtype();
  const SamplingGrid grid(
      geometry,
      kernel_size,
      offset.shape(0),
      offset.shape(1),
      offset.shape(2),
      offset.shape(3) / (2 * kh * kw),
      dtype,
      s);
  const auto join = [&](const mx::array& y, const mx::array& x) {
    return mx::reshape(mx::stack({y, x}, -1, s), offset.shape(), s);
  };
  // The displacement that moves a sample to the lower edge of its cell; the
  // derivative of floor is 0.
  const auto to_edge = [&](const mx::array& displacement,
                           const mx::array& base) {
    return mx::stop_gradient(
        mx::subtract(mx::floor(mx::add(displacement, base, s), s), base, s), s);
  };
  const auto weigh = [&](const mx::array& direction) {
    const mx::array flat = mx::flatten(direction, 3, -1, s);
    return mask ? mx::multiply(*mask, flat, s) : flat;
  };

  const auto [y, x] = grid.split(offset);
  const auto [along_y, along_x] = grid.split(tangent);
  const mx::array low_y = to_edge(y, grid.rows);
  const mx::array low_x = to_edge(x, grid.columns);
  const mx::array one(1.0f, dtype);
  const mx::array weight_y = weigh(along_y);
  const mx::array weight_x = weigh(along_x);
  return {
      {join(mx::add(low_y, one, s), x), weight_y},
      {join(low_y, x), mx::negative(weight_y, s)},
      {join(y, mx::add(low_x, one, s)), weight_x},
      {join(y, low_x), mx::negative(weight_x, s)}};
}

} // namespace mlx_deform
