// Where the taps of a kernel lie, and offsets taken apart, as MLX arrays.

#pragma once

#include <utility>

#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx_ops/deform_conv2d/shapes.h"

namespace mlx_deform {

struct SamplingGrid {
  mx::Shape samples; // (N, Ho, Wo, DG, kH, kW)
  // The undisplaced coordinates; they broadcast to `samples`.
  mx::array rows;
  mx::array columns;
  mx::Stream s;

  SamplingGrid(
      const Geometry& geometry,
      const Pair& kernel_size,
      int n,
      int ho,
      int wo,
      int offset_groups,
      mx::Dtype dtype,
      mx::Stream stream)
      : samples{
            n,
            ho,
            wo,
            offset_groups,
            kernel_size.first,
            kernel_size.second},
        rows(coordinates(
            ho,
            kernel_size.first,
            geometry.stride.first,
            geometry.padding.first,
            geometry.dilation.first,
            {1, ho, 1, 1, 1, 1},
            {1, 1, 1, 1, kernel_size.first, 1},
            dtype,
            stream)),
        columns(coordinates(
            wo,
            kernel_size.second,
            geometry.stride.second,
            geometry.padding.second,
            geometry.dilation.second,
            {1, 1, wo, 1, 1, 1},
            {1, 1, 1, 1, 1, kernel_size.second},
            dtype,
            stream)),
        s(stream) {}

  // The two coordinates of an array laid out as the offsets are.
  std::pair<mx::array, mx::array> split(const mx::array& x) const {
    mx::Shape shape = samples;
    shape.push_back(2);
    const auto parts = mx::split(mx::reshape(x, shape, s), 2, -1, s);
    return {
        mx::reshape(parts[0], samples, s), mx::reshape(parts[1], samples, s)};
  }

 private:
  static mx::array coordinates(
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
};

} // namespace mlx_deform
