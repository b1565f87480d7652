#include "mlx_ops/deform_conv2d/portable.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "mlx/ops.h"
#include "mlx_ops/deform_conv2d/sampling_grid.h"

namespace mlx_deform {

mx::array portable_im2col(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const std::optional<mx::array>& mask,
    mx::Stream s) {
  const int64_t count = int64_t(p.N) * p.H * p.W * p.DG;
  if (count > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(
        "[portable] N * H * W * DG must be below 2**31; got " +
        std::to_string(count));
  }
  const mx::Dtype dtype = offset.dtype();
  if (count == 0) {
    return mx::zeros({p.N, p.Ho, p.Wo, p.kH * p.kW * p.C}, dtype, s);
  }
  const auto number = [&](double x) { return mx::array(x, dtype); };
  const auto both = [&](const mx::array& a, const mx::array& b) {
    return mx::logical_and(a, b, s);
  };
  const Geometry geometry{
      {p.stride_h, p.stride_w},
      {p.pad_h, p.pad_w},
      {p.dilation_h, p.dilation_w}};
  const SamplingGrid grid(
      geometry, {p.kH, p.kW}, p.N, p.Ho, p.Wo, p.DG, dtype, s);
  const auto [dy, dx] = grid.split(offset);
  const mx::array y = mx::add(grid.rows, dy, s);
  const mx::array x = mx::add(grid.columns, dx, s);

  // The cell, and the place inside it; see sampling.h for the rule.
  const mx::array inside = both(
      both(mx::greater_equal(y, number(-1), s), mx::less(y, number(p.H), s)),
      both(mx::greater_equal(x, number(-1), s), mx::less(x, number(p.W), s)));
  const mx::array nan = mx::logical_or(mx::isnan(y, s), mx::isnan(x, s), s);
  const auto cell_of = [&](const mx::array& at) {
    return mx::stop_gradient(
        mx::where(inside, mx::floor(at, s), number(0), s), s);
  };
  const mx::array y0 = cell_of(y);
  const mx::array x0 = cell_of(x);
  const auto place_of = [&](const mx::array& at, const mx::array& cell) {
    const mx::array place =
        mx::where(inside, mx::subtract(at, cell, s), number(0), s);
    return mx::where(nan, number(std::nan("")), place, s);
  };
  const mx::array ly = place_of(y, y0);
  const mx::array lx = place_of(x, x0);

  // Rows of the channels of one offset group, and which one a corner is.
  const int width = p.C / p.DG;
  const mx::array rows = mx::astype(
      mx::reshape(input, {static_cast<int>(count), width}, s), dtype, s);
  const mx::array image =
      mx::reshape(mx::arange(p.N, s), {p.N, 1, 1, 1, 1, 1}, s);
  const mx::array group =
      mx::reshape(mx::arange(p.DG, s), {1, 1, 1, p.DG, 1, 1}, s);
  const auto times = [&](const mx::array& a, int b) {
    return mx::multiply(a, mx::array(b), s);
  };

  std::optional<mx::array> sum;
  for (int corner = 0; corner < 4; ++corner) {
    const bool below = corner >> 1;
    const bool right = corner & 1;
    const mx::array cy = mx::add(y0, number(below), s);
    const mx::array cx = mx::add(x0, number(right), s);
    const mx::array exists = both(
        both(
            inside,
            both(
                mx::greater_equal(cy, number(0), s),
                mx::less(cy, number(p.H), s))),
        both(
            mx::greater_equal(cx, number(0), s), mx::less(cx, number(p.W), s)));
    const auto index_of = [&](const mx::array& at) {
      return mx::astype(mx::where(exists, at, number(0), s), mx::int32, s);
    };
    mx::array index = mx::add(times(image, p.H), index_of(cy), s);
    index = mx::add(times(index, p.W), index_of(cx), s);
    index = mx::add(times(index, p.DG), group, s);
    const mx::array value = mx::where(
        mx::expand_dims(exists, -1, s),
        mx::take(rows, mx::stop_gradient(index, s), 0, s),
        number(0),
        s);
    const auto side = [&](bool far, const mx::array& place) {
      return far ? place : mx::subtract(number(1), place, s);
    };
    const mx::array weight = mx::multiply(side(below, ly), side(right, lx), s);
    const mx::array term =
        mx::multiply(mx::expand_dims(weight, -1, s), value, s);
    sum = sum ? mx::add(*sum, term, s) : term;
  }
  if (mask) {
    const mx::Shape shape{p.N, p.Ho, p.Wo, p.DG, p.kH, p.kW, 1};
    sum = mx::multiply(
        *sum, mx::astype(mx::reshape(*mask, shape, s), dtype, s), s);
  }
  // (N, Ho, Wo, DG, kH, kW, C / DG) to (N, Ho, Wo, kH, kW, DG, C / DG)
  return mx::reshape(
      mx::moveaxis(*sum, 3, 5, s), {p.N, p.Ho, p.Wo, p.kH * p.kW * p.C}, s);
}

mx::array portable_conv2d(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& mask,
    mx::Stream s) {
  const mx::Dtype dtype = offset.dtype();
  const int taps = p.kH * p.kW;
  const int group = p.C / p.G;
  const mx::array columns = mx::reshape(
      mx::moveaxis(
          mx::reshape(
              portable_im2col(p, input, offset, mask, s),
              {p.N * p.Ho * p.Wo, taps, p.G, group},
              s),
          2,
          0,
          s),
      {p.G, p.N * p.Ho * p.Wo, taps * group},
      s);
  const mx::array kernel = mx::swapaxes(
      mx::reshape(
          mx::astype(weight, dtype, s), {p.G, p.O / p.G, taps * group}, s),
      1,
      2,
      s);
  mx::array out = mx::reshape(
      mx::moveaxis(mx::matmul(columns, kernel, s), 0, 1, s),
      {p.N, p.Ho, p.Wo, p.O},
      s);
  if (bias) {
    out = mx::add(out, mx::astype(*bias, dtype, s), s);
  }
  return mx::astype(out, input.dtype(), s);
}

} // namespace mlx_deform
