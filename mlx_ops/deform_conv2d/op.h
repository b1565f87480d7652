// Deformable convolution (DCNv1 arXiv:1703.06211, DCNv2 arXiv:1811.11168) as an
// MLX op. Layout: channels last, see check_deform_conv2d for the shapes.

#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "mlx_ops/deform_conv2d/shapes.h"
#include "mlx_ops/gpu/pieces.h"

namespace mlx_deform {

// output[n, y, x, o] = bias[o] + sum over taps (i, j) and channels c of
//   weight[o, i, j, c] * mask[n, y, x, i, j]
//     * input[n, y * s - p + i * d + dy, x * s - p + j * d + dx, c]
// with (dy, dx) = offset[n, y, x, i, j]. The output has the promoted type of
// input, weight and bias. Throws std::invalid_argument on bad arguments.
mx::array deform_conv2d(
    const mx::array& input,
    const mx::array& offset,
    const mx::array& weight,
    const std::optional<mx::array>& bias = std::nullopt,
    const Geometry& geometry = {},
    const std::optional<mx::array>& mask = std::nullopt,
    mx::StreamOrDevice s = {});

// Inputs: input (T), offset (R), weight (W), [bias (W)], [mask (R)], all
// row-contiguous, [the piece before]. T is the output's type, R float32 or
// float64, and W is R on the CPU (its products are) and T on a GPU.
class DeformConv2d : public mx::Primitive {
 public:
  DeformConv2d(
      mx::Stream stream,
      Geometry geometry,
      bool has_bias,
      bool has_mask,
      Piece piece)
      : mx::Primitive(stream),
        geometry_(geometry),
        has_bias_(has_bias),
        has_mask_(has_mask),
        piece_(piece) {}

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
    return "DeformConv2d";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  DeformConv2dParams params(const std::vector<mx::array>& inputs) const;
  int bias_index() const {
    return 3;
  }
  int mask_index() const {
    return has_bias_ ? 4 : 3;
  }

  Geometry geometry_;
  bool has_bias_;
  bool has_mask_;
  Piece piece_;
};

// Which gradients DeformConv2dVJP computes; its outputs come in this order.
struct Wanted {
  bool input{false};
  bool offset{false};
  bool weight{false};
  bool mask{false};

  bool operator==(const Wanted&) const = default;
};

// Inputs: input, offset, weight, cotangent (T), [mask], as DeformConv2d has
// them, [the gradients of the piece before]. The gradients are of type R,
// whatever T is.
class DeformConv2dVJP : public mx::Primitive {
 public:
  DeformConv2dVJP(
      mx::Stream stream,
      Geometry geometry,
      bool has_mask,
      Wanted wanted,
      Piece piece)
      : mx::Primitive(stream),
        geometry_(geometry),
        has_mask_(has_mask),
        wanted_(wanted),
        piece_(piece) {}

  // The gradients, in however many pieces. `inputs` as above, of one piece.
  static std::vector<mx::array> apply(
      const std::vector<mx::array>& inputs,
      Geometry geometry,
      bool has_mask,
      Wanted wanted,
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
    return "DeformConv2dVJP";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  DeformConv2dParams params(const std::vector<mx::array>& inputs) const;

  Geometry geometry_;
  bool has_mask_;
  Wanted wanted_;
  Piece piece_;
};

} // namespace mlx_deform
