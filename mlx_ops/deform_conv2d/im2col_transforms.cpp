// Forward mode, higher derivatives and vectorisation of im2col; see
// deform_conv2d_transforms.cpp for the reasoning.

#include "mlx_ops/deform_conv2d/im2col.h"

#include <optional>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_ops/batching.h"
#include "mlx_ops/deform_conv2d/offset_tangent.h"
#include "mlx_ops/higher_derivatives.h"

namespace mlx_deform {

namespace {

using Optional = std::optional<mx::array>;

struct Arguments {
  Optional input;
  Optional offset;
  Optional mask;
};

Optional directional_derivative(
    const Geometry& geometry,
    const Pair& kernel,
    const Arguments& at,
    const Arguments& direction,
    mx::Stream s) {
  const mx::Dtype dtype = at.offset->dtype();
  Optional sum;
  const auto add =
      [&](const Optional& x, const Optional& offset, const Optional& mask) {
        const mx::array term = deform_im2col(
            mx::astype(*x, dtype, s), *offset, kernel, geometry, mask, s);
        sum = sum ? mx::add(*sum, term, s) : term;
      };
  if (direction.input) {
    add(direction.input, at.offset, at.mask);
  }
  if (direction.mask) {
    add(at.input, at.offset, direction.mask);
  }
  if (direction.offset) {
    for (const SamplingTerm& term : offset_tangent_terms(
             geometry, kernel, *at.offset, at.mask, *direction.offset, s)) {
      add(at.input, term.offset, term.mask);
    }
  }
  return sum;
}

} // namespace

std::vector<mx::array> DeformIm2col::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  const Arguments at{
      primals[0], primals[1], has_mask_ ? Optional(primals[2]) : std::nullopt};
  Arguments direction;
  for (size_t i = 0; i < argnums.size(); ++i) {
    (argnums[i] == 0       ? direction.input
         : argnums[i] == 1 ? direction.offset
                           : direction.mask) = tangents[i];
  }
  const Optional out =
      directional_derivative(geometry_, kernel_size_, at, direction, stream());
  return {mx::astype(*out, primals[0].dtype(), stream())};
}

std::vector<mx::array> DeformIm2colVJP::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  size_t next = 0;
  const auto take = [&](bool is_wanted) {
    return is_wanted ? Optional(cotangents[next++]) : std::nullopt;
  };
  Arguments direction;
  direction.input = take(wanted_.input);
  direction.offset = take(wanted_.offset);
  direction.mask = take(wanted_.mask);

  constexpr int cotangent_index = 2;
  return vjp_of_vjp(
      [&](const Arrays& at) {
        const Optional mask = has_mask_ ? Optional(at[3]) : std::nullopt;
        return *directional_derivative(
            geometry_, kernel_size_, {at[0], at[1], mask}, direction, stream());
      },
      primals,
      cotangent_index,
      argnums,
      primals[1].dtype(),
      stream());
}

std::vector<mx::array> DeformIm2colVJP::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  return jvp_from_vjp(
      [&](const Arrays& v) { return vjp(primals, v, argnums, {}); },
      output_shapes(primals),
      primals[1].dtype(),
      tangents,
      stream());
}

// A mapped axis joins the batch.
std::pair<std::vector<mx::array>, std::vector<int>> DeformIm2col::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  const mx::Stream s = stream();
  const int size = mapped_size(inputs, axes);
  const auto fold = [&](int i) {
    return fold_first(inputs[i], axes[i], size, s);
  };
  const mx::array out = deform_im2col(
      fold(0),
      fold(1),
      kernel_size_,
      geometry_,
      has_mask_ ? Optional(fold(2)) : std::nullopt,
      s);
  return {{unfold_first(out, size, s)}, {0}};
}

std::pair<std::vector<mx::array>, std::vector<int>> DeformIm2colVJP::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  const mx::Stream s = stream();
  const int size = mapped_size(inputs, axes);
  std::vector<mx::array> folded;
  for (size_t i = 0; i < inputs.size(); ++i) {
    folded.push_back(
        mx::contiguous(fold_first(inputs[i], axes[i], size, s), false, s));
  }
  const std::vector<mx::Shape> shapes = output_shapes(folded);
  std::vector<mx::array> gradients = mx::array::make_arrays(
      shapes,
      std::vector<mx::Dtype>(shapes.size(), inputs[1].dtype()),
      std::make_shared<DeformIm2colVJP>(
          s, geometry_, kernel_size_, has_mask_, wanted_),
      folded);
  for (mx::array& x : gradients) {
    x = unfold_first(x, size, s);
  }
  return {gradients, std::vector<int>(gradients.size(), 0)};
}

} // namespace mlx_deform
