#include "mlx_ops/deform_conv2d/op.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx_ops/checks.h"
#include "mlx_ops/deform_conv2d/chunks.h"
#include "mlx_ops/deform_conv2d/portable.h"
#include "mlx_ops/dtypes.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/portable.h"

namespace mlx_deform {

namespace {

const std::string tag = "deform_conv2d";

std::optional<mx::Shape> shape_of(const std::optional<mx::array>& x) {
  return x ? std::optional(x->shape()) : std::nullopt;
}

// How many primitives share the work.
int pieces_of(const DeformConv2dParams& p, gpu::Work work, mx::Stream stream) {
  if (!gpu::takes_pieces(stream)) {
    return 1;
  }
  work.deterministic = gpu::deterministic();
  return gpu::piece_count(p, work);
}

} // namespace

mx::array deform_conv2d(
    const mx::array& input,
    const mx::array& offset,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const Geometry& geometry,
    const std::optional<mx::array>& mask,
    mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);

  std::vector<mx::array> values{input, weight};
  std::vector<mx::array> plans{offset};
  check_floating(tag, "input", input);
  check_floating(tag, "offset", offset);
  check_floating(tag, "weight", weight);
  if (bias) {
    check_floating(tag, "bias", *bias);
    values.push_back(*bias);
  }
  if (mask) {
    check_floating(tag, "mask", *mask);
    plans.push_back(*mask);
  }
  const DeformConv2dParams p = check_deform_conv2d(
      tag,
      geometry,
      input.shape(),
      offset.shape(),
      weight.shape(),
      shape_of(bias),
      shape_of(mask));
  const CallTypes types = call_types(values, plans);
  check_device(tag, types.storage, stream);

  if (portable()) {
    const mx::array out = portable_conv2d(
        p,
        mx::astype(input, types.storage, stream),
        mx::astype(offset, types.compute, stream),
        weight,
        bias,
        mask,
        stream);
    return mx::astype(out, types.result, stream);
  }

  // The CPU multiplies in the compute type, a GPU's matrix units take halves.
  const mx::Dtype weight_type =
      stream.device == mx::Device::cpu ? types.compute : types.storage;
  std::vector<mx::array> inputs{
      as_operand(input, types.storage, stream),
      as_operand(offset, types.compute, stream),
      as_operand(weight, weight_type, stream)};
  if (bias) {
    inputs.push_back(as_operand(*bias, weight_type, stream));
  }
  if (mask) {
    inputs.push_back(as_operand(*mask, types.compute, stream));
  }
  gpu::Work work;
  work.output = true;
  const mx::array out = chain_of_pieces(
      pieces_of(p, work, stream),
      inputs,
      {{p.N, p.Ho, p.Wo, p.O}},
      types.storage,
      [&](Piece piece) {
        return std::make_shared<DeformConv2d>(
            stream, geometry, bias.has_value(), mask.has_value(), piece);
      },
      stream)[0];
  return mx::astype(out, types.result, stream);
}

DeformConv2dParams DeformConv2d::params(
    const std::vector<mx::array>& inputs) const {
  return check_deform_conv2d(
      tag,
      geometry_,
      inputs[0].shape(),
      inputs[1].shape(),
      inputs[2].shape(),
      has_bias_ ? std::optional(inputs[bias_index()].shape()) : std::nullopt,
      has_mask_ ? std::optional(inputs[mask_index()].shape()) : std::nullopt);
}

std::vector<mx::Shape> DeformConv2d::output_shapes(
    const std::vector<mx::array>& inputs) {
  const DeformConv2dParams p = params(inputs);
  return {{p.N, p.Ho, p.Wo, p.O}};
}

bool DeformConv2d::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const DeformConv2d&>(other);
  return geometry_ == o.geometry_ && has_bias_ == o.has_bias_ &&
      has_mask_ == o.has_mask_ && piece_ == o.piece_;
}

std::vector<mx::array> DeformConv2d::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  const auto wants = [&](int index) {
    return std::find(argnums.begin(), argnums.end(), index) != argnums.end();
  };
  const mx::array& input = primals[0];
  const mx::array& offset = primals[1];
  const mx::array& weight = primals[2];
  const mx::Dtype compute = offset.dtype();
  const mx::array cotangent = mx::contiguous(cotangents[0], false, stream());

  const Wanted wanted{
      wants(0), wants(1), wants(2), has_mask_ && wants(mask_index())};
  std::vector<int> owners; // the argument that each gradient belongs to
  const auto add = [&](bool is_wanted, int index) {
    if (is_wanted) {
      owners.push_back(index);
    }
  };
  add(wanted.input, 0);
  add(wanted.offset, 1);
  add(wanted.weight, 2);
  add(wanted.mask, mask_index());

  std::vector<mx::array> gradients;
  if (!owners.empty()) {
    std::vector<mx::array> inputs{input, offset, weight, cotangent};
    if (has_mask_) {
      inputs.push_back(primals[mask_index()]);
    }
    gradients =
        DeformConv2dVJP::apply(inputs, geometry_, has_mask_, wanted, stream());
  }

  std::vector<mx::array> out;
  for (int index : argnums) {
    const mx::Dtype dtype = primals[index].dtype();
    if (has_bias_ && index == bias_index()) {
      const mx::array sum = mx::sum(
          mx::astype(cotangent, compute, stream()),
          std::vector<int>{0, 1, 2},
          false,
          stream());
      out.push_back(mx::astype(sum, dtype, stream()));
    } else {
      const auto at = std::find(owners.begin(), owners.end(), index);
      out.push_back(
          mx::astype(gradients[at - owners.begin()], dtype, stream()));
    }
  }
  return out;
}

std::vector<mx::array> DeformConv2dVJP::apply(
    const std::vector<mx::array>& inputs,
    Geometry geometry,
    bool has_mask,
    Wanted wanted,
    mx::Stream stream) {
  const auto make_primitive = [&](Piece piece) {
    return std::make_shared<DeformConv2dVJP>(
        stream, geometry, has_mask, wanted, piece);
  };
  const std::shared_ptr<DeformConv2dVJP> whole = make_primitive({});
  gpu::Work work;
  work.grad_input = wanted.input;
  work.grad_samples = wanted.offset || wanted.mask;
  work.grad_weight = wanted.weight;
  return chain_of_pieces(
      pieces_of(whole->params(inputs), work, stream),
      inputs,
      whole->output_shapes(inputs),
      inputs[1].dtype(),
      make_primitive,
      stream);
}

DeformConv2dParams DeformConv2dVJP::params(
    const std::vector<mx::array>& inputs) const {
  return check_deform_conv2d(
      tag,
      geometry_,
      inputs[0].shape(),
      inputs[1].shape(),
      inputs[2].shape(),
      std::nullopt,
      has_mask_ ? std::optional(inputs[4].shape()) : std::nullopt);
}

std::vector<mx::Shape> DeformConv2dVJP::output_shapes(
    const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes;
  if (wanted_.input) {
    shapes.push_back(inputs[0].shape());
  }
  if (wanted_.offset) {
    shapes.push_back(inputs[1].shape());
  }
  if (wanted_.weight) {
    shapes.push_back(inputs[2].shape());
  }
  if (wanted_.mask) {
    shapes.push_back(inputs[4].shape());
  }
  return shapes;
}

bool DeformConv2dVJP::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const DeformConv2dVJP&>(other);
  return geometry_ == o.geometry_ && has_mask_ == o.has_mask_ &&
      wanted_ == o.wanted_ && piece_ == o.piece_;
}

} // namespace mlx_deform
