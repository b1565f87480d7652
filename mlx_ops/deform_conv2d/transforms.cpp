// Forward mode, higher derivatives and vectorisation of the convolution, all in
// terms of the op itself: they run wherever it does.

#include "mlx_ops/deform_conv2d/op.h"

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_ops/batching.h"
#include "mlx_ops/deform_conv2d/offset_tangent.h"
#include "mlx_ops/higher_derivatives.h"

namespace mlx_deform {

namespace {

using Optional = std::optional<mx::array>;

// The arguments of a convolution, or a direction in their space.
struct Arguments {
  Optional input;
  Optional offset;
  Optional weight;
  Optional mask;
};

// The derivative of the convolution at `at` along `direction`, whose absent
// parts are 0: the convolution is linear in input, weight and mask, and
// offset_tangent_terms covers the offset. Computed in the type of the offset;
// an empty result stands for 0.
Optional directional_derivative(
    const Geometry& geometry,
    const Arguments& at,
    const Arguments& direction,
    mx::Stream s) {
  const mx::Dtype dtype = at.offset->dtype();
  const auto cast = [&](const Optional& x) {
    return x ? Optional(mx::astype(*x, dtype, s)) : std::nullopt;
  };
  const Optional input = cast(at.input);
  const Optional weight = cast(at.weight);
  Optional sum;
  const auto add = [&](const Optional& x,
                       const Optional& offset,
                       const Optional& w,
                       const Optional& mask) {
    const mx::array term =
        deform_conv2d(*x, *offset, *w, std::nullopt, geometry, mask, s);
    sum = sum ? mx::add(*sum, term, s) : term;
  };
  if (direction.input) {
    add(cast(direction.input), at.offset, weight, at.mask);
  }
  if (direction.weight) {
    add(input, at.offset, cast(direction.weight), at.mask);
  }
  if (direction.mask) {
    add(input, at.offset, weight, direction.mask);
  }
  if (direction.offset) {
    const Pair kernel{weight->shape(1), weight->shape(2)};
    for (const SamplingTerm& term : offset_tangent_terms(
             geometry, kernel, *at.offset, at.mask, *direction.offset, s)) {
      add(input, term.offset, weight, term.mask);
    }
  }
  return sum;
}

} // namespace

std::vector<mx::array> DeformConv2d::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  const mx::Stream s = stream();
  Arguments at{primals[0], primals[1], primals[2], std::nullopt};
  if (has_mask_) {
    at.mask = primals[mask_index()];
  }
  Arguments direction;
  Optional bias;
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] == 0) {
      direction.input = tangents[i];
    } else if (argnums[i] == 1) {
      direction.offset = tangents[i];
    } else if (argnums[i] == 2) {
      direction.weight = tangents[i];
    } else if (has_bias_ && argnums[i] == bias_index()) {
      bias = tangents[i];
    } else {
      direction.mask = tangents[i];
    }
  }
  Optional out = directional_derivative(geometry_, at, direction, s);
  if (bias) {
    const mx::array term = mx::astype(*bias, primals[1].dtype(), s);
    out = out ? mx::add(*out, term, s)
              : mx::broadcast_to(term, output_shapes(primals)[0], s);
  }
  return {mx::astype(*out, primals[0].dtype(), s)};
}

std::vector<mx::array> DeformConv2dVJP::vjp(
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
  direction.weight = take(wanted_.weight);
  direction.mask = take(wanted_.mask);

  constexpr int cotangent_index = 3;
  return vjp_of_vjp(
      [&](const Arrays& at) {
        const Optional mask = has_mask_ ? Optional(at[4]) : std::nullopt;
        return *directional_derivative(
            geometry_, {at[0], at[1], at[2], mask}, direction, stream());
      },
      primals,
      cotangent_index,
      argnums,
      primals[1].dtype(),
      stream());
}

std::vector<mx::array> DeformConv2dVJP::jvp(
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

// ---- vectorisation

namespace {

// A mapped axis joins the batch where the weight is shared. Where each entry
// has a weight of its own (or wants its gradient), it becomes weight groups and
// offset groups instead: channels of different entries never mix.
struct Folding {
  int size; // of the mapped axis
  bool into_groups;
  mx::Stream s;

  mx::array image(const mx::array& x, int axis) const {
    return into_groups ? fold_last(x, axis, size, s)
                       : fold_first(x, axis, size, s);
  }
  mx::array weight(const mx::array& w, int axis) const {
    return into_groups ? fold_first(w, axis, size, s) : w;
  }
  mx::array unfold_image(const mx::array& x) const {
    return into_groups ? unfold_last(x, size, s) : unfold_first(x, size, s);
  }
};

} // namespace

std::pair<std::vector<mx::array>, std::vector<int>> DeformConv2d::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  const mx::Stream s = stream();
  const Folding fold{mapped_size(inputs, axes), axes[2] >= 0, s};
  Optional mask;
  if (has_mask_) {
    mask = fold.image(inputs[mask_index()], axes[mask_index()]);
  }
  mx::array out = fold.unfold_image(deform_conv2d(
      fold.image(inputs[0], axes[0]),
      fold.image(inputs[1], axes[1]),
      fold.weight(inputs[2], axes[2]),
      std::nullopt,
      geometry_,
      mask,
      s));
  if (has_bias_) {
    const mx::array& bias = inputs[bias_index()];
    const int axis = axes[bias_index()];
    const mx::array rows = axis < 0 ? bias
                                    : mx::reshape(
                                          mx::moveaxis(bias, axis, 0, s),
                                          {fold.size, 1, 1, 1, out.shape(-1)},
                                          s);
    out = mx::astype(mx::add(out, rows, s), inputs[0].dtype(), s);
  }
  return {{mx::astype(out, inputs[0].dtype(), s)}, {0}};
}

std::pair<std::vector<mx::array>, std::vector<int>> DeformConv2dVJP::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  const mx::Stream s = stream();
  const Folding fold{
      mapped_size(inputs, axes), axes[2] >= 0 || wanted_.weight, s};
  std::vector<mx::array> folded{
      fold.image(inputs[0], axes[0]),
      fold.image(inputs[1], axes[1]),
      fold.weight(inputs[2], axes[2]),
      fold.image(inputs[3], axes[3])};
  if (has_mask_) {
    folded.push_back(fold.image(inputs[4], axes[4]));
  }
  for (mx::array& x : folded) {
    x = mx::contiguous(x, false, s);
  }
  std::vector<mx::array> gradients =
      apply(folded, geometry_, has_mask_, wanted_, s);
  size_t next = 0;
  const auto unfold = [&](bool is_wanted, bool is_weight) {
    if (is_wanted) {
      mx::array& x = gradients[next++];
      x = is_weight ? unfold_first(x, fold.size, s) : fold.unfold_image(x);
    }
  };
  unfold(wanted_.input, false);
  unfold(wanted_.offset, false);
  unfold(wanted_.weight, true);
  unfold(wanted_.mask, false);
  return {gradients, std::vector<int>(gradients.size(), 0)};
}

} // namespace mlx_deform
