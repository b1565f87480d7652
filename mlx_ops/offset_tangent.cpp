#include "mlx_ops/offset_tangent.h"

#include "mlx/ops.h"

namespace mlx_deform {

namespace {

// Where the undisplaced taps lie along one axis, [output][tap], in the shape
// that broadcasts against (N, Ho, Wo, DG, kH, kW).
mx::array grid(
    int outputs,
    int taps,
    int stride,
    int padding,
    int dilation,
    const mx::Shape& output_shape,
    const mx::Shape& tap_shape,
    mx::Dtype dtype,
    mx::Stream s) {
  const mx::array starts = mx::subtract(
      mx::multiply(mx::arange(outputs, s), mx::array(stride), s),
      mx::array(padding),
      s);
  const mx::array steps =
      mx::multiply(mx::arange(taps, s), mx::array(dilation), s);
  return mx::astype(
      mx::add(
          mx::reshape(starts, output_shape, s),
          mx::reshape(steps, tap_shape, s),
          s),
      dtype,
      s);
}

} // namespace

std::vector<SamplingTerm> offset_tangent_terms(
    const Geometry& geometry,
    const Pair& kernel_size,
    const mx::array& offset,
    const std::optional<mx::array>& mask,
    const mx::array& tangent,
    mx::Stream s) {
  const int n = offset.shape(0);
  const int ho = offset.shape(1);
  const int wo = offset.shape(2);
  const auto [kh, kw] = kernel_size;
  const int groups = offset.shape(3) / (2 * kh * kw);
  const mx::Shape samples{n, ho, wo, groups, kh, kw};
  const mx::Shape mask_shape{n, ho, wo, groups * kh * kw};

  // The two coordinates of an array laid out as the offsets are.
  const auto split = [&](const mx::array& x) {
    mx::Shape shape = samples;
    shape.push_back(2);
    const auto parts = mx::split(mx::reshape(x, shape, s), 2, -1, s);
    return std::pair{
        mx::reshape(parts[0], samples, s), mx::reshape(parts[1], samples, s)};
  };
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
    const mx::array flat = mx::reshape(direction, mask_shape, s);
    return mask ? mx::multiply(*mask, flat, s) : flat;
  };

  const mx::Dtype dtype = offset.dtype();
  const mx::array rows = grid(
      ho,
      kh,
      geometry.stride.first,
      geometry.padding.first,
      geometry.dilation.first,
      {1, ho, 1, 1, 1, 1},
      {1, 1, 1, 1, kh, 1},
      dtype,
      s);
  const mx::array cols = grid(
      wo,
      kw,
      geometry.stride.second,
      geometry.padding.second,
      geometry.dilation.second,
      {1, 1, wo, 1, 1, 1},
      {1, 1, 1, 1, 1, kw},
      dtype,
      s);
  const auto [y, x] = split(offset);
  const auto [along_y, along_x] = split(tangent);
  const mx::array low_y = to_edge(y, rows);
  const mx::array low_x = to_edge(x, cols);
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
