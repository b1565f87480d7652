#include "mlx_ops/deform_conv2d/im2col.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx_ops/checks.h"
#include "mlx_ops/deform_conv2d/portable.h"
#include "mlx_ops/dtypes.h"
#include "mlx_ops/portable.h"

namespace mlx_deform {

namespace {

const std::string tag = "deform_im2col";

} // namespace

mx::array deform_im2col(
    const mx::array& input,
    const mx::array& offset,
    const Pair& kernel_size,
    const Geometry& geometry,
    const std::optional<mx::array>& mask,
    mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);

  std::vector<mx::array> plans{offset};
  check_floating(tag, "input", input);
  check_floating(tag, "offset", offset);
  if (mask) {
    check_floating(tag, "mask", *mask);
    plans.push_back(*mask);
  }
  const DeformConv2dParams p = check_deform_im2col(
      tag,
      geometry,
      kernel_size,
      input.shape(),
      offset.shape(),
      mask ? std::optional(mask->shape()) : std::nullopt);
  const CallTypes types = call_types({input}, plans);
  check_device(tag, types.storage, stream);

  if (portable()) {
    const mx::array out = portable_im2col(
        p,
        mx::astype(input, types.storage, stream),
        mx::astype(offset, types.compute, stream),
        mask,
        stream);
    return mx::astype(out, types.result, stream);
  }

  std::vector<mx::array> inputs{
      as_operand(input, types.storage, stream),
      as_operand(offset, types.compute, stream)};
  if (mask) {
    inputs.push_back(as_operand(*mask, types.compute, stream));
  }
  const mx::array out(
      mx::Shape{p.N, p.Ho, p.Wo, static_cast<int>(p.column_pixel)},
      types.storage,
      std::make_shared<DeformIm2col>(
          stream, geometry, kernel_size, mask.has_value()),
      std::move(inputs));
  return mx::astype(out, types.result, stream);
}

DeformConv2dParams DeformIm2col::params(
    const std::vector<mx::array>& inputs) const {
  return check_deform_im2col(
      tag,
      geometry_,
      kernel_size_,
      inputs[0].shape(),
      inputs[1].shape(),
      has_mask_ ? std::optional(inputs[2].shape()) : std::nullopt);
}

std::vector<mx::Shape> DeformIm2col::output_shapes(
    const std::vector<mx::array>& inputs) {
  const DeformConv2dParams p = params(inputs);
  return {{p.N, p.Ho, p.Wo, static_cast<int>(p.column_pixel)}};
}

bool DeformIm2col::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const DeformIm2col&>(other);
  return geometry_ == o.geometry_ && kernel_size_ == o.kernel_size_ &&
      has_mask_ == o.has_mask_;
}

std::vector<mx::array> DeformIm2col::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  const auto wants = [&](int index) {
    return std::find(argnums.begin(), argnums.end(), index) != argnums.end();
  };
  std::vector<mx::array> inputs{
      primals[0], primals[1], mx::contiguous(cotangents[0], false, stream())};
  if (has_mask_) {
    inputs.push_back(primals[2]);
  }
  std::vector<mx::Shape> shapes;
  for (int index : argnums) { // in increasing order, as the outputs are
    shapes.push_back(primals[index].shape());
  }
  std::vector<mx::array> gradients = mx::array::make_arrays(
      shapes,
      std::vector<mx::Dtype>(shapes.size(), primals[1].dtype()),
      std::make_shared<DeformIm2colVJP>(
          stream(),
          geometry_,
          kernel_size_,
          has_mask_,
          DeformIm2colVJP::Wanted{wants(0), wants(1), wants(2)}),
      inputs);
  for (size_t i = 0; i < gradients.size(); ++i) {
    gradients[i] =
        mx::astype(gradients[i], primals[argnums[i]].dtype(), stream());
  }
  return gradients;
}

DeformConv2dParams DeformIm2colVJP::params(
    const std::vector<mx::array>& inputs) const {
  return check_deform_im2col(
      tag,
      geometry_,
      kernel_size_,
      inputs[0].shape(),
      inputs[1].shape(),
      has_mask_ ? std::optional(inputs[3].shape()) : std::nullopt);
}

std::vector<mx::Shape> DeformIm2colVJP::output_shapes(
    const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes;
  if (wanted_.input) {
    shapes.push_back(inputs[0].shape());
  }
  if (wanted_.offset) {
    shapes.push_back(inputs[1].shape());
  }
  if (wanted_.mask) {
    shapes.push_back(inputs[3].shape());
  }
  return shapes;
}

bool DeformIm2colVJP::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const DeformIm2colVJP&>(other);
  return geometry_ == o.geometry_ && kernel_size_ == o.kernel_size_ &&
      has_mask_ == o.has_mask_ && wanted_ == o.wanted_;
}

} // namespace mlx_deform
