#include "mlx_ops/deform_conv2d/shapes.h"

#include <cstdint>
#include <limits>
#include <string>

#include "mlx/dtype.h"
#include "mlx/utils.h"
#include "mlx_ops/checks.h"

namespace mlx_deform {

namespace {

void require_at_least(
    const std::string& tag,
    const std::string& name,
    const Pair& pair,
    int least) {
  require(
      pair.first >= least && pair.second >= least,
      tag,
      name + " must be at least " + std::to_string(least) + " on both axes",
      pair);
}

// (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
int output_size(
    const std::string& tag,
    const std::string& axis,
    int64_t size,
    int64_t kernel,
    int64_t stride,
    int64_t padding,
    int64_t dilation) {
  const int64_t padded = size + 2 * padding;
  const int64_t extent = dilation * (kernel - 1) + 1;
  constexpr int64_t most = std::numeric_limits<int>::max();
  require(
      padded <= most && extent <= most,
      tag,
      "the padded input and the dilated kernel must be shorter than 2**31 "
      "along " +
          axis,
      std::max(padded, extent));
  require(
      padded >= extent,
      tag,
      "the padded input must be at least as long as the dilated kernel (" +
          std::to_string(extent) + ") along " + axis,
      padded);
  return static_cast<int>((padded - extent) / stride + 1);
}

void require_dims(
    const std::string& tag,
    const std::string& rule,
    const mx::Shape& shape,
    size_t dims) {
  require(shape.size() == dims, tag, rule, shape);
}

DeformConv2dParams check_sampling(
    const std::string& tag,
    const Geometry& geometry,
    const Pair& kernel_size,
    const mx::Shape& input,
    const mx::Shape& offset,
    const std::optional<mx::Shape>& mask) {
  require_dims(tag, "input must have 4 axes, (N, H, W, C_in)", input, 4);
  require(
      input[1] > 0 && input[2] > 0 && input[3] > 0,
      tag,
      "input must have no empty axis but the batch",
      input);
  require_dims(
      tag,
      "offset must have 4 axes, (N, H_out, W_out, 2 * DG * kH * kW)",
      offset,
      4);
  require_at_least(tag, "stride", geometry.stride, 1);
  require_at_least(tag, "padding", geometry.padding, 0);
  require_at_least(tag, "dilation", geometry.dilation, 1);

  DeformConv2dParams p{};
  p.N = input[0];
  p.H = input[1];
  p.W = input[2];
  p.C = input[3];
  p.kH = kernel_size.first;
  p.kW = kernel_size.second;
  p.stride_h = geometry.stride.first;
  p.stride_w = geometry.stride.second;
  p.pad_h = geometry.padding.first;
  p.pad_w = geometry.padding.second;
  p.dilation_h = geometry.dilation.first;
  p.dilation_w = geometry.dilation.second;
  p.Ho = output_size(tag, "H", p.H, p.kH, p.stride_h, p.pad_h, p.dilation_h);
  p.Wo = output_size(tag, "W", p.W, p.kW, p.stride_w, p.pad_w, p.dilation_w);
  p.G = 1;

  const int64_t taps = int64_t(p.kH) * p.kW;
  require(
      taps * p.C <= std::numeric_limits<int>::max(),
      tag,
      "kH * kW * C_in must be below 2**31",
      taps * p.C);
  require(
      offset[0] == p.N && offset[1] == p.Ho && offset[2] == p.Wo,
      tag,
      "offset must match the batch and the output size, (" +
          std::to_string(p.N) + ", " + std::to_string(p.Ho) + ", " +
          std::to_string(p.Wo) + ", 2 * DG * kH * kW)",
      offset);
  require(
      offset[3] > 0 && offset[3] % (2 * taps) == 0,
      tag,
      "the last axis of offset must be a multiple of 2 * kH * kW (" +
          std::to_string(2 * taps) + ")",
      offset);
  p.DG = static_cast<int>(offset[3] / (2 * taps));
  require(
      p.C % p.DG == 0,
      tag,
      "the offset groups that offset's last axis implies (DG = " +
          std::to_string(p.DG) + ") must divide C_in",
      int64_t(p.C));

  p.has_mask = mask.has_value();
  if (mask) {
    require_dims(
        tag,
        "mask must have 4 axes, (N, H_out, W_out, DG * kH * kW)",
        *mask,
        4);
    const mx::Shape wanted{
        p.N, p.Ho, p.Wo, static_cast<mx::ShapeElem>(p.DG * taps)};
    require(*mask == wanted, tag, "mask must have " + text(wanted), *mask);
  }

  p.pixel_begin = 0;
  p.pixel_end = long(p.N) * p.Ho * p.Wo;
  p.column_group = p.C;
  p.column_pixel = long(taps) * p.C;
  p.column_tap = p.C;
  return p;
}

} // namespace

DeformConv2dParams check_deform_conv2d(
    const std::string& tag,
    const Geometry& geometry,
    const mx::Shape& input,
    const mx::Shape& offset,
    const mx::Shape& weight,
    const std::optional<mx::Shape>& bias,
    const std::optional<mx::Shape>& mask) {
  require_dims(
      tag, "weight must have 4 axes, (C_out, kH, kW, C_in / G)", weight, 4);
  require(
      weight[0] > 0 && weight[1] > 0 && weight[2] > 0 && weight[3] > 0,
      tag,
      "weight must have no empty axis",
      weight);
  DeformConv2dParams p = check_sampling(
      tag, geometry, {weight[1], weight[2]}, input, offset, mask);
  require(
      p.C % weight[3] == 0,
      tag,
      "the last axis of weight (C_in / G) must divide C_in (" +
          std::to_string(p.C) + ")",
      weight);
  p.G = p.C / weight[3];
  p.O = weight[0];
  require(
      p.O % p.G == 0,
      tag,
      "the first axis of weight (C_out) must be a multiple of the groups that "
      "its last axis implies (G = " +
          std::to_string(p.G) + ")",
      weight);
  if (bias) {
    const mx::Shape wanted{p.O};
    require(*bias == wanted, tag, "bias must have " + text(wanted), *bias);
  }
  return p;
}

DeformConv2dParams check_deform_im2col(
    const std::string& tag,
    const Geometry& geometry,
    const Pair& kernel_size,
    const mx::Shape& input,
    const mx::Shape& offset,
    const std::optional<mx::Shape>& mask) {
  require_at_least(tag, "kernel_size", kernel_size, 1);
  return check_sampling(tag, geometry, kernel_size, input, offset, mask);
}

} // namespace mlx_deform
