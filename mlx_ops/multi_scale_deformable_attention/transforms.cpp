// Forward mode, higher derivatives and vectorisation, all in terms of the op
// itself: they run wherever it does.

#include "mlx_ops/multi_scale_deformable_attention/op.h"

#include <algorithm>
#include <utility>

#include "mlx/ops.h"
#include "mlx_ops/batching.h"
#include "mlx_ops/higher_derivatives.h"

namespace mlx_deform {

namespace {

using Optional = std::optional<mx::array>;

// The arguments of a call, or a direction in their space.
struct Arguments {
  Optional value;
  Optional locations;
  Optional weights;
};

// A sampling with these locations and weights. The weights carry the sign.
struct SamplingTerm {
  mx::array locations;
  mx::array weights;
};

// Inside its cell the bilinear surface is linear along each axis, so its slope
// is the difference of two samples on the cell's edges: with v the pixel that a
// location l is, v = l * size - 0.5,
//   d S / d l = size * (S(floor(v) + 1) - S(floor(v)))
// on each axis. The tangent of the samples is the sum of these terms.
std::vector<SamplingTerm> location_tangent_terms(
    const MsdaSettings& settings,
    const mx::array& locations, // (N, Q, M, K, 2)
    const mx::array& weights, // (N, Q, M, K)
    const mx::array& tangent, // as locations
    mx::Stream s) {
  const mx::Dtype dtype = locations.dtype();
  const int K = locations.shape(3);
  const mx::array half(0.5f, dtype);
  const mx::array one(1.0f, dtype);
  // x and y, (N, Q, M, K) each.
  const auto split = [&](const mx::array& x) {
    std::vector<mx::array> parts = mx::split(x, 2, -1, s);
    for (mx::array& part : parts) {
      part = mx::squeeze(part, -1, s);
    }
    return parts;
  };
  const std::vector<mx::array> places = split(locations);
  const std::vector<mx::array> directions = split(tangent);
  std::vector<SamplingTerm> terms;
  for (int axis = 0; axis < 2; ++axis) { // x, then y
    std::vector<float> numbers(K);
    for (const MsdaLevel& level : settings.levels) {
      // Later levels overwrite what is theirs.
      std::fill(
          numbers.begin() + level.first,
          numbers.end(),
          static_cast<float>(axis == 0 ? level.W : level.H));
    }
    const mx::array sizes =
        mx::astype(mx::array(numbers.data(), {K}, mx::float32), dtype, s);
    const mx::array cell = mx::floor(
        mx::subtract(mx::multiply(places[axis], sizes, s), half, s), s);
    const mx::array other = places[1 - axis];
    const mx::array weight =
        mx::multiply(weights, mx::multiply(directions[axis], sizes, s), s);
    const auto at_edge = [&](const mx::array& edge) {
      // The derivative of floor is 0.
      const mx::array place =
          mx::stop_gradient(mx::divide(mx::add(edge, half, s), sizes, s), s);
      return axis == 0 ? mx::stack({place, other}, -1, s)
                       : mx::stack({other, place}, -1, s);
    };
    terms.push_back({at_edge(mx::add(cell, one, s)), weight});
    terms.push_back({at_edge(cell), mx::negative(weight, s)});
  }
  return terms;
}

// The derivative of the op at `at` along `direction`, whose absent parts are 0:
// the op is linear in value and weights, and location_tangent_terms covers the
// locations. Computed in the type of the locations.
mx::array directional_derivative(
    const MsdaSettings& settings,
    const Arguments& at,
    const Arguments& direction,
    const mx::array& levels,
    mx::Stream s) {
  const mx::Dtype dtype = at.locations->dtype();
  Optional sum;
  const auto add = [&](const Optional& value,
                       const Optional& locations,
                       const Optional& weights) {
    const mx::array term = MultiScaleDeformableAttention::apply(
        settings,
        mx::astype(*value, dtype, s),
        *locations,
        *weights,
        levels,
        s);
    sum = sum ? mx::add(*sum, term, s) : term;
  };
  if (direction.value) {
    add(direction.value, at.locations, at.weights);
  }
  if (direction.weights) {
    add(at.value, at.locations, direction.weights);
  }
  if (direction.locations && !settings.is_discrete()) {
    for (const SamplingTerm& term : location_tangent_terms(
             settings, *at.locations, *at.weights, *direction.locations, s)) {
      add(at.value, term.locations, term.weights);
    }
  }
  if (!sum) {
    const MsdaParams p = msda_params(settings, *at.value, *at.locations);
    return mx::zeros({p.N, p.Q, p.M * p.D}, dtype, s);
  }
  return *sum;
}

} // namespace

std::vector<mx::array> MultiScaleDeformableAttention::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  Arguments direction;
  for (size_t i = 0; i < argnums.size(); ++i) {
    (argnums[i] == 0       ? direction.value
         : argnums[i] == 1 ? direction.locations
                           : direction.weights) = tangents[i];
  }
  const mx::array out = directional_derivative(
      settings_,
      {primals[0], primals[1], primals[2]},
      direction,
      primals[3],
      stream());
  return {mx::astype(out, primals[0].dtype(), stream())};
}

std::vector<mx::array> MultiScaleDeformableAttentionVJP::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  size_t next = 0;
  const auto take = [&](bool is_wanted) {
    return is_wanted ? Optional(cotangents[next++]) : std::nullopt;
  };
  Arguments direction;
  direction.value = take(wanted_.value);
  direction.locations = take(wanted_.locations);
  direction.weights = take(wanted_.weights);

  constexpr int cotangent_index = 3;
  return vjp_of_vjp(
      [&](const Arrays& at) {
        return directional_derivative(
            settings_, {at[0], at[1], at[2]}, direction, at[4], stream());
      },
      primals,
      cotangent_index,
      argnums,
      primals[1].dtype(),
      stream());
}

std::vector<mx::array> MultiScaleDeformableAttentionVJP::jvp(
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
std::pair<std::vector<mx::array>, std::vector<int>>
MultiScaleDeformableAttention::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  const mx::Stream s = stream();
  const int size = mapped_size(inputs, axes);
  const auto fold = [&](int i) {
    return fold_first(inputs[i], axes[i], size, s);
  };
  const mx::array out =
      apply(settings_, fold(0), fold(1), fold(2), inputs[3], s);
  return {{unfold_first(out, size, s)}, {0}};
}

std::pair<std::vector<mx::array>, std::vector<int>>
MultiScaleDeformableAttentionVJP::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  const mx::Stream s = stream();
  const int size = mapped_size(inputs, axes);
  std::vector<mx::array> folded;
  for (int i = 0; i < 4; ++i) {
    folded.push_back(fold_first(inputs[i], axes[i], size, s));
  }
  folded.push_back(inputs[4]); // the levels
  std::vector<mx::array> gradients = apply(settings_, wanted_, folded, s);
  for (mx::array& x : gradients) {
    x = unfold_first(x, size, s);
  }
  return {gradients, std::vector<int>(gradients.size(), 0)};
}

} // namespace mlx_deform
