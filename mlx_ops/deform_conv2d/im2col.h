// Deformable im2col: the sampled columns of a deformable convolution, as an MLX
// op of its own.

#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "mlx_ops/deform_conv2d/shapes.h"

namespace mlx_deform {

// Columns of shape (N, H_out, W_out, kH * kW * C_in), last axis ordered
// [kH][kW][C_in], in the type of input. Throws std::invalid_argument on bad
// arguments.
mx::array deform_im2col(
    const mx::array& input,
    const mx::array& offset,
    const Pair& kernel_size,
    const Geometry& geometry = {},
    const std::optional<mx::array>& mask = std::nullopt,
    mx::StreamOrDevice s = {});

// Inputs: input (T), offset (R), [mask (R)], all row-contiguous; output T.
class DeformIm2col : public mx::Primitive {
 public:
  DeformIm2col(
      mx::Stream stream,
      Geometry geometry,
      Pair kernel_size,
      bool has_mask)
      : mx::Primitive(stream),
        geometry_(geometry),
        kernel_size_(kernel_size),
        has_mask_(has_mask) {}

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
    return "DeformIm2col";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  DeformConv2dParams params(const std::vector<mx::array>& inputs) const;

  Geometry geometry_;
  Pair kernel_size_;
  bool has_mask_;
};

// Inputs: input, offset, cotangent (T), [mask]. Outputs, in this order and each
// only if wanted: the gradients of input, offset and mask, of type R.
class DeformIm2colVJP : public mx::Primitive {
 public:
  struct Wanted {
    bool input{false};
    bool offset{false};
    bool mask{false};

    bool operator==(const Wanted&) const = default;
  };

  DeformIm2colVJP(
      mx::Stream stream,
      Geometry geometry,
      Pair kernel_size,
      bool has_mask,
      Wanted wanted)
      : mx::Primitive(stream),
        geometry_(geometry),
        kernel_size_(kernel_size),
        has_mask_(has_mask),
        wanted_(wanted) {}

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
    return "DeformIm2colVJP";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  DeformConv2dParams params(const std::vector<mx::array>& inputs) const;

  Geometry geometry_;
  Pair kernel_size_;
  bool has_mask_;
  Wanted wanted_;
};

} // namespace mlx_deform
