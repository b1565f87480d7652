#include "mlx_ops/multi_scale_deformable_attention/op.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx_ops/checks.h"
#include "mlx_ops/dtypes.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/multi_scale_deformable_attention/dispatch.h"
#include "mlx_ops/portable.h"

namespace mlx_deform {

namespace {

const std::string tag = "multi_scale_deformable_attention";

template <typename Value>
void require(bool holds, const std::string& rule, const Value& value) {
  mlx_deform::require(holds, tag, rule, value);
}

SamplingMethod to_method(const std::string& name) {
  require(
      name == "bilinear" || name == "discrete",
      "method must be \"bilinear\" or \"discrete\"",
      "\"" + name + "\"");
  return name == "discrete" ? SamplingMethod::discrete
                            : SamplingMethod::bilinear;
}

// The table of the levels; `points` has the samples of each.
std::vector<MsdaLevel> to_levels(
    const std::vector<std::vector<int>>& spatial_shapes,
    const std::vector<int>& points) {
  std::vector<MsdaLevel> levels;
  int64_t start = 0;
  int64_t first = 0;
  for (size_t i = 0; i < spatial_shapes.size(); ++i) {
    const std::vector<int>& shape = spatial_shapes[i];
    levels.push_back(
        {shape[0], shape[1], static_cast<int>(start), static_cast<int>(first)});
    start += int64_t(shape[0]) * shape[1];
    first += points[i];
    require(
        start <= std::numeric_limits<int>::max(),
        "spatial_shapes must have fewer than 2**31 pixels",
        start);
    require(
        first <= std::numeric_limits<int>::max() / 2,
        "points must be fewer than 2**30 together",
        first);
  }
  return levels;
}

MsdaSettings check(
    const mx::array& value,
    const std::vector<std::vector<int>>& spatial_shapes,
    const mx::array& locations,
    const mx::array& weights,
    const std::optional<std::vector<int>>& points,
    const std::string& method) {
  check_floating(tag, "value", value);
  check_floating(tag, "sampling_locations", locations);
  check_floating(tag, "attention_weights", weights);
  const mx::Shape& v = value.shape();
  const mx::Shape& at = locations.shape();
  require(v.size() == 4, "value must have 4 axes, (N, S, M, D)", v);
  require(
      v[1] > 0 && v[2] > 0 && v[3] > 0,
      "value must have no empty axis but the batch",
      v);
  require(
      int64_t(v[2]) * v[3] <= std::numeric_limits<int>::max(),
      "M * D must be below 2**31",
      int64_t(v[2]) * v[3]);

  const size_t L = spatial_shapes.size();
  require(L > 0, "spatial_shapes must have at least one level", int64_t(L));
  int64_t pixels = 0;
  for (const std::vector<int>& shape : spatial_shapes) {
    require(
        shape.size() == 2 && shape[0] > 0 && shape[1] > 0,
        "spatial_shapes must hold pairs (H, W) of at least 1",
        shape);
    pixels += int64_t(shape[0]) * shape[1];
  }
  require(
      pixels == v[1],
      "the second axis of value must hold the pixels of all levels, " +
          std::to_string(pixels) + " by spatial_shapes",
      v);

  std::vector<int> samples;
  const std::string heads =
      "(" + std::to_string(v[0]) + ", Q, " + std::to_string(v[2]) + ", ";
  const auto fits = [&](const mx::Shape& rest) {
    mx::Shape wanted{v[0], at.size() > 1 ? at[1] : 0, v[2]};
    wanted.insert(wanted.end(), rest.begin(), rest.end());
    return at == wanted;
  };
  if (points) {
    require(
        points->size() == L,
        "points must have an entry for each of the " + std::to_string(L) +
            " levels",
        *points);
    int64_t sum = 0;
    for (int count : *points) {
      require(count > 0, "points must be at least 1", *points);
      sum += count;
    }
    samples = *points;
    require(
        fits({static_cast<mx::ShapeElem>(sum), 2}),
        "sampling_locations must be of shape (N, Q, M, sum of points, 2), " +
            heads + std::to_string(sum) + ", 2)",
        at);
  } else {
    require(
        at.size() == 6,
        "sampling_locations must have 6 axes, (N, Q, M, L, P, 2), or with "
        "points 5",
        at);
    require(
        at[4] > 0 && fits({static_cast<mx::ShapeElem>(L), at[4], 2}),
        "sampling_locations must be of shape (N, Q, M, L, P, 2), " + heads +
            std::to_string(L) + ", P, 2) with P at least 1",
        at);
    samples.assign(L, at[4]);
  }
  const mx::Shape wanted(at.begin(), at.end() - 1);
  require(
      weights.shape() == wanted,
      "attention_weights must have " + text(wanted) +
          ", that of sampling_locations without the last axis",
      weights.shape());
  return {to_levels(spatial_shapes, samples), to_method(method)};
}

mx::array table_of(const MsdaSettings& settings) {
  std::vector<int> table;
  for (const MsdaLevel& level : settings.levels) {
    table.insert(table.end(), {level.H, level.W, level.start, level.first});
  }
  return mx::array(
      table.data(),
      {static_cast<mx::ShapeElem>(settings.levels.size()), 4},
      mx::int32);
}

// How many primitives share the work.
int pieces_of(
    const MsdaSettings& settings,
    const MsdaParams& p,
    gpu::MsdaWork work,
    mx::Stream stream) {
  if (!gpu::takes_pieces(stream)) {
    return 1;
  }
  work.deterministic = gpu::deterministic();
  return gpu::msda_piece_count(p, work, gpu::msda_map_rows(settings.levels));
}

} // namespace

mx::array multi_scale_deformable_attention(
    const mx::array& value,
    const std::vector<std::vector<int>>& spatial_shapes,
    const mx::array& sampling_locations,
    const mx::array& attention_weights,
    const std::optional<std::vector<int>>& points,
    const std::string& method,
    mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const MsdaSettings settings = check(
      value,
      spatial_shapes,
      sampling_locations,
      attention_weights,
      points,
      method);
  const CallTypes types =
      call_types({value}, {sampling_locations, attention_weights});
  check_device(tag, types.storage, stream);

  // Levels and points become one axis.
  const auto samples = [&](const mx::array& x) {
    return mx::astype(
        points ? x : mx::flatten(x, 3, 4, stream), types.compute, stream);
  };
  const mx::array locations = samples(sampling_locations);
  const mx::array weights = samples(attention_weights);
  const mx::array operand = mx::astype(value, types.storage, stream);
  const mx::array out = portable()
      ? portable_msda(settings, operand, locations, weights, stream)
      : MultiScaleDeformableAttention::apply(
            settings, operand, locations, weights, table_of(settings), stream);
  return mx::astype(out, types.result, stream);
}

bool MsdaSettings::operator==(const MsdaSettings& other) const {
  const auto same = [](const MsdaLevel& a, const MsdaLevel& b) {
    return a.H == b.H && a.W == b.W && a.start == b.start && a.first == b.first;
  };
  return method == other.method &&
      std::equal(
             levels.begin(),
             levels.end(),
             other.levels.begin(),
             other.levels.end(),
             same);
}

MsdaParams msda_params(
    const MsdaSettings& settings,
    const mx::array& value,
    const mx::array& locations) {
  MsdaParams p{};
  p.N = value.shape(0);
  p.S = value.shape(1);
  p.Q = locations.shape(1);
  p.M = value.shape(2);
  p.D = value.shape(3);
  p.L = static_cast<int>(settings.levels.size());
  p.K = locations.shape(3);
  p.is_discrete = settings.is_discrete();
  p.query_begin = 0;
  p.query_end = long(p.N) * p.Q;
  return p;
}

mx::array MultiScaleDeformableAttention::apply(
    const MsdaSettings& settings,
    const mx::array& value,
    const mx::array& locations,
    const mx::array& weights,
    const mx::array& levels,
    mx::Stream stream) {
  const MsdaParams p = msda_params(settings, value, locations);
  gpu::MsdaWork work;
  work.output = true;
  return chain_of_pieces(
      pieces_of(settings, p, work, stream),
      {mx::contiguous(value, false, stream),
       mx::contiguous(locations, false, stream),
       mx::contiguous(weights, false, stream),
       levels},
      {{p.N, p.Q, p.M * p.D}},
      value.dtype(),
      [&](Piece piece) {
        return std::make_shared<MultiScaleDeformableAttention>(
            stream, settings, piece);
      },
      stream)[0];
}

std::vector<mx::Shape> MultiScaleDeformableAttention::output_shapes(
    const std::vector<mx::array>& inputs) {
  const MsdaParams p = msda_params(settings_, inputs[0], inputs[1]);
  return {{p.N, p.Q, p.M * p.D}};
}

bool MultiScaleDeformableAttention::is_equivalent(
    const mx::Primitive& other) const {
  const auto& o = static_cast<const MultiScaleDeformableAttention&>(other);
  return settings_ == o.settings_ && piece_ == o.piece_;
}

std::vector<mx::array> MultiScaleDeformableAttention::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  const auto wants = [&](int index) {
    return std::find(argnums.begin(), argnums.end(), index) != argnums.end();
  };
  std::vector<mx::array> gradients = MultiScaleDeformableAttentionVJP::apply(
      settings_,
      {wants(0), wants(1), wants(2)},
      {primals[0], primals[1], primals[2], cotangents[0], primals[3]},
      stream());
  for (size_t i = 0; i < gradients.size(); ++i) { // both in increasing order
    gradients[i] =
        mx::astype(gradients[i], primals[argnums[i]].dtype(), stream());
  }
  return gradients;
}

std::vector<mx::array> MultiScaleDeformableAttentionVJP::apply(
    const MsdaSettings& settings,
    Wanted wanted,
    const std::vector<mx::array>& inputs,
    mx::Stream stream) {
  std::vector<mx::array> operands;
  for (const mx::array& x : inputs) {
    operands.push_back(mx::contiguous(x, false, stream));
  }
  const auto make_primitive = [&](Piece piece) {
    return std::make_shared<MultiScaleDeformableAttentionVJP>(
        stream, settings, wanted, piece);
  };
  gpu::MsdaWork work;
  work.grad_value = wanted.value;
  work.grad_samples = wanted.locations || wanted.weights;
  return chain_of_pieces(
      pieces_of(
          settings, msda_params(settings, inputs[0], inputs[1]), work, stream),
      operands,
      make_primitive({})->output_shapes(operands),
      inputs[1].dtype(),
      make_primitive,
      stream);
}

std::vector<mx::Shape> MultiScaleDeformableAttentionVJP::output_shapes(
    const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes;
  if (wanted_.value) {
    shapes.push_back(inputs[0].shape());
  }
  if (wanted_.locations) {
    shapes.push_back(inputs[1].shape());
  }
  if (wanted_.weights) {
    shapes.push_back(inputs[2].shape());
  }
  return shapes;
}

bool MultiScaleDeformableAttentionVJP::is_equivalent(
    const mx::Primitive& other) const {
  const auto& o = static_cast<const MultiScaleDeformableAttentionVJP&>(other);
  return settings_ == o.settings_ && wanted_ == o.wanted_ && piece_ == o.piece_;
}

} // namespace mlx_deform
