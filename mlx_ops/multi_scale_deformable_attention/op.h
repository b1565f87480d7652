// Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159) as an
// MLX op: each query gathers a few samples from every level of a pyramid of
// maps.

#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "mlx_ops/gpu/pieces.h"
#include "mlx_ops/multi_scale_deformable_attention/params.h"

namespace mlx_deform {

namespace mx = mlx::core;

// How a map is read at a location. bilinear: by the rule of sampling.h at pixel
// location * size - 0.5. discrete: the pixel trunc(location * size + 0.5),
// clamped to the map, with no gradient to the location.
enum class SamplingMethod { bilinear, discrete };

// out[n, q, m * D + d] = sum over levels and their samples k of
//   attention_weights[n, q, m, k] * map(n, level, m, d)[sampling_locations[n,
//   q, m, k]]
// in the type of value. `points` are the samples of each level where these are
// not equally many. Throws std::invalid_argument on bad arguments.
mx::array multi_scale_deformable_attention(
    const mx::array& value, // (N, S, M, D)
    const std::vector<std::vector<int>>& spatial_shapes, // L pairs (H, W)
    const mx::array& sampling_locations, // (N, Q, M, L, P, 2); (N, Q, M, K, 2)
    const mx::array& attention_weights, // the same without the 2
    const std::optional<std::vector<int>>& points = std::nullopt,
    const std::string& method = "bilinear",
    mx::StreamOrDevice s = {});

// What a call fixes beside its arrays.
struct MsdaSettings {
  std::vector<MsdaLevel> levels;
  SamplingMethod method;

  bool is_discrete() const {
    return method == SamplingMethod::discrete;
  }
  bool operator==(const MsdaSettings& other) const;
};

// Inputs: value (T), locations (R), weights (R), levels, all row-contiguous. T
// is the output's type, R float32 or float64. `levels` holds the table of the
// settings, (L, 4) of int32, for kernels that read it from memory. Then those
// of the piece before.
class MultiScaleDeformableAttention : public mx::Primitive {
 public:
  MultiScaleDeformableAttention(
      mx::Stream stream,
      MsdaSettings settings,
      Piece piece)
      : mx::Primitive(stream), settings_(std::move(settings)), piece_(piece) {}

  // The op on operands of the primitive's shapes, of whatever strides; value
  // may be of any type that R holds.
  static mx::array apply(
      const MsdaSettings& settings,
      const mx::array& value, // (N, S, M, D)
      const mx::array& locations, // (N, Q, M, K, 2)
      const mx::array& weights, // (N, Q, M, K)
      const mx::array& levels, // (L, 4)
      mx::Stream stream);

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

  const char* name() const override {
    return "MultiScaleDeformableAttention";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  MsdaSettings settings_;
  Piece piece_;
};

// Inputs: value, locations, weights, cotangent (T), levels, and those of the
// piece before. Outputs, in this
// order and each only if wanted: the gradients of value, locations and weights,
// of type R.
class MultiScaleDeformableAttentionVJP : public mx::Primitive {
 public:
  struct Wanted {
    bool value{false};
    bool locations{false};
    bool weights{false};

    bool operator==(const Wanted&) const = default;
  };

  MultiScaleDeformableAttentionVJP(
      mx::Stream stream,
      MsdaSettings settings,
      Wanted wanted,
      Piece piece)
      : mx::Primitive(stream),
        settings_(std::move(settings)),
        wanted_(wanted),
        piece_(piece) {}

  // The gradients; `inputs` as above.
  static std::vector<mx::array> apply(
      const MsdaSettings& settings,
      Wanted wanted,
      const std::vector<mx::array>& inputs,
      mx::Stream stream);

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

  const char* name() const override {
    return "MultiScaleDeformableAttentionVJP";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  MsdaSettings settings_;
  Wanted wanted_;
  Piece piece_;
};

// The sizes of a call on operands of the primitives' shapes.
MsdaParams msda_params(
    const MsdaSettings& settings,
    const mx::array& value,
    const mx::array& locations);

// The op in MLX's own primitives (see portable.h); the result has the type of
// `locations`, which is that of all sums.
mx::array portable_msda(
    const MsdaSettings& settings,
    const mx::array& value, // (N, S, M, D)
    const mx::array& locations, // (N, Q, M, K, 2)
    const mx::array& weights, // (N, Q, M, K)
    mx::Stream stream);

} // namespace mlx_deform
