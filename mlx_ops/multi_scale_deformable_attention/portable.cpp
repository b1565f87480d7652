// The op in MLX's own primitives; see mlx_ops/portable.h.

#include "mlx_ops/multi_scale_deformable_attention/op.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "mlx/ops.h"

namespace mlx_deform {

namespace {

struct Portable {
  MsdaParams p;
  mx::Dtype dtype;
  mx::Stream s;

  mx::array number(double x) const {
    return mx::array(x, dtype);
  }
  mx::array both(const mx::array& a, const mx::array& b) const {
    return mx::logical_and(a, b, s);
  }

  // A field of each sample's level, (K).
  mx::array by_sample(const MsdaSettings& settings, int MsdaLevel::* field)
      const {
    std::vector<int> numbers(p.K);
    for (const MsdaLevel& level : settings.levels) {
      // Later levels overwrite what is theirs.
      std::fill(numbers.begin() + level.first, numbers.end(), level.*field);
    }
    return mx::array(numbers.data(), {p.K}, mx::int32);
  }

  mx::array nan_where(const mx::array& condition, const mx::array& x) const {
    return mx::where(condition, number(std::nan("")), x, s);
  }
};

} // namespace

mx::array portable_msda(
    const MsdaSettings& settings,
    const mx::array& value,
    const mx::array& locations,
    const mx::array& weights,
    mx::Stream s) {
  const MsdaParams p = msda_params(settings, value, locations);
  const mx::Dtype dtype = locations.dtype();
  const int64_t count = int64_t(p.N) * p.S * p.M;
  if (count > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(
        "[portable] N * S * M must be below 2**31; got " +
        std::to_string(count));
  }
  if (p.N == 0 || p.Q == 0) {
    return mx::zeros({p.N, p.Q, p.M * p.D}, dtype, s);
  }
  const Portable ops{p, dtype, s};
  const mx::array H = ops.by_sample(settings, &MsdaLevel::H);
  const mx::array W = ops.by_sample(settings, &MsdaLevel::W);
  const mx::array start = ops.by_sample(settings, &MsdaLevel::start);
  const auto real = [&](const mx::array& x) { return mx::astype(x, dtype, s); };
  const std::vector<mx::array> places = mx::split(locations, 2, -1, s);
  const mx::array lx = mx::squeeze(places[0], -1, s);
  const mx::array ly = mx::squeeze(places[1], -1, s);
  const mx::array nan = mx::logical_or(mx::isnan(ly, s), mx::isnan(lx, s), s);

  // The channels of a pixel and head, and which row of them (y, x) is.
  const mx::array rows =
      real(mx::reshape(value, {static_cast<int>(count), p.D}, s));
  const mx::array image = mx::reshape(mx::arange(p.N, s), {p.N, 1, 1, 1}, s);
  const mx::array head = mx::reshape(mx::arange(p.M, s), {p.M, 1}, s);
  const auto pixel = [&](const mx::array& y, const mx::array& x) {
    mx::array index = mx::add(mx::multiply(y, W, s), x, s);
    index = mx::add(index, start, s);
    index = mx::add(index, mx::multiply(image, mx::array(p.S), s), s);
    index = mx::add(mx::multiply(index, mx::array(p.M), s), head, s);
    return mx::take(rows, mx::stop_gradient(index, s), 0, s);
  };

  const auto sampled = [&]() -> mx::array {
    if (settings.is_discrete()) {
      const auto index_of = [&](const mx::array& l, const mx::array& size) {
        const mx::array place = mx::add(
            mx::multiply(mx::stop_gradient(l, s), real(size), s),
            ops.number(0.5),
            s);
        const mx::array last = mx::subtract(size, mx::array(1), s);
        // Clamped while it is a floating-point number; truncation is to 0.
        const mx::array clamped = mx::clip(
            mx::where(nan, ops.number(0), place, s),
            ops.number(0),
            real(last),
            s);
        return mx::minimum(mx::astype(clamped, mx::int32, s), last, s);
      };
      const mx::array there = pixel(index_of(ly, H), index_of(lx, W));
      return ops.nan_where(mx::expand_dims(nan, -1, s), there);
    }

    // The cell, and the place inside it; see sampling.h for the rule.
    const auto pixels_of = [&](const mx::array& l, const mx::array& size) {
      return mx::subtract(mx::multiply(l, real(size), s), ops.number(0.5), s);
    };
    const mx::array y = pixels_of(ly, H);
    const mx::array x = pixels_of(lx, W);
    const auto on_map =
        [&](const mx::array& at, const mx::array& size, double least) {
          return ops.both(
              mx::greater_equal(at, ops.number(least), s),
              mx::less(at, real(size), s));
        };
    const mx::array inside = ops.both(on_map(y, H, -1), on_map(x, W, -1));
    const auto cell_of = [&](const mx::array& at) {
      return mx::stop_gradient(
          mx::where(inside, mx::floor(at, s), ops.number(0), s), s);
    };
    const mx::array y0 = cell_of(y);
    const mx::array x0 = cell_of(x);
    const auto place_of = [&](const mx::array& at, const mx::array& cell) {
      const mx::array place =
          mx::where(inside, mx::subtract(at, cell, s), ops.number(0), s);
      return ops.nan_where(nan, place);
    };
    const mx::array place_y = place_of(y, y0);
    const mx::array place_x = place_of(x, x0);

    std::optional<mx::array> sum;
    for (int corner = 0; corner < 4; ++corner) {
      const bool below = corner >> 1;
      const bool right = corner & 1;
      const mx::array cy = mx::add(y0, ops.number(below), s);
      const mx::array cx = mx::add(x0, ops.number(right), s);
      const mx::array exists =
          ops.both(inside, ops.both(on_map(cy, H, 0), on_map(cx, W, 0)));
      const auto index_of = [&](const mx::array& at) {
        return mx::astype(
            mx::where(exists, at, ops.number(0), s), mx::int32, s);
      };
      const mx::array there = mx::where(
          mx::expand_dims(exists, -1, s),
          pixel(index_of(cy), index_of(cx)),
          ops.number(0),
          s);
      const auto side = [&](bool far, const mx::array& place) {
        return far ? place : mx::subtract(ops.number(1), place, s);
      };
      const mx::array weight =
          mx::multiply(side(below, place_y), side(right, place_x), s);
      const mx::array term =
          mx::multiply(mx::expand_dims(weight, -1, s), there, s);
      sum = sum ? mx::add(*sum, term, s) : term;
    }
    return *sum;
  }();
  const mx::array out = mx::sum(
      mx::multiply(mx::expand_dims(weights, -1, s), sampled, s), 3, false, s);
  return mx::flatten(out, 2, 3, s);
}

} // namespace mlx_deform
