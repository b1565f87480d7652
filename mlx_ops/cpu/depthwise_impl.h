// Bodies of the depthwise kernels, included as tile_kernels_impl.h is.

#include "mlx_ops/cpu/depthwise.h"
#include "mlx_ops/cpu/lanes.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// Channels that lie `step` apart.
template <typename Lanes, typename R>
static inline typename Lanes::Value
load_apart(Lanes lanes, const R* p, int step) {
  if constexpr (Lanes::is_vector) {
    if (step != 1) {
      typename Lanes::Value v{};
      for (int i = 0; i < lanes.count; ++i) {
        v[i] = p[i * step];
      }
      return v;
    }
  }
  return lanes.load_from(p);
}

template <typename Lanes, typename R>
static inline void
store_apart(Lanes lanes, R* p, int step, typename Lanes::Value v) {
  if constexpr (Lanes::is_vector) {
    if (step != 1) {
      for (int i = 0; i < lanes.count; ++i) {
        p[i * step] = v[i];
      }
      return;
    }
  }
  lanes.store_to(p, v);
}

template <typename R>
void multiply_depthwise(
    const DeformConv2dParams& p,
    const Block& block,
    const R* columns,
    int64_t pixel_stride,
    const R* weight,
    R* rows,
    bool accumulate) {
  const int multiplier = p.O / p.C;
  const int64_t taps = int64_t(p.kH) * p.kW;
  for (int64_t q = 0; q < block.pixels(); ++q) {
    for (int j = 0; j < multiplier; ++j) {
      const R* w =
          weight + (j * taps + block.tap_begin) * p.C + block.channel_begin;
      R* row = rows + q * p.O + block.channel_begin * multiplier + j;
      for_lanes<R>(block.channels(), [&](auto lanes, int c) {
        typename decltype(lanes)::Value sum{};
        if (accumulate) {
          sum = load_apart(lanes, row + c * multiplier, multiplier);
        }
        for (int k = 0; k < block.taps(); ++k) {
          sum += lanes.load_from(columns + k * block.channels() + c) *
              lanes.load_from(w + int64_t(k) * p.C + c);
        }
        store_apart(lanes, row + c * multiplier, multiplier, sum);
      });
    }
    columns += pixel_stride;
  }
}

template <typename R>
void column_cotangent_depthwise(
    const DeformConv2dParams& p,
    const Block& block,
    const R* rows,
    const R* weight,
    R* grad_columns) {
  const int multiplier = p.O / p.C;
  const int64_t taps = int64_t(p.kH) * p.kW;
  for (int64_t q = 0; q < block.pixels(); ++q) {
    for (int k = block.tap_begin; k < block.tap_end; ++k) {
      for_lanes<R>(p.C, [&](auto lanes, int c) {
        typename decltype(lanes)::Value sum{};
        for (int j = 0; j < multiplier; ++j) {
          sum += load_apart(lanes, rows + c * multiplier + j, multiplier) *
              lanes.load_from(weight + (j * taps + k) * p.C + c);
        }
        lanes.store_to(grad_columns + c, sum);
      });
      grad_columns += p.C;
    }
    rows += p.O;
  }
}

template <typename R>
void weight_grad_depthwise(
    const DeformConv2dParams& p,
    const Block& block,
    const R* columns,
    int64_t pixel_stride,
    const R* rows,
    R* grad_weight,
    bool accumulate) {
  const int multiplier = p.O / p.C;
  const int64_t taps = int64_t(p.kH) * p.kW;
  for (int j = 0; j < multiplier; ++j) {
    const R* row = rows + block.channel_begin * multiplier + j;
    for (int k = 0; k < block.taps(); ++k) {
      R* grad = grad_weight + (j * taps + block.tap_begin + k) * p.C +
          block.channel_begin;
      for_lanes<R>(block.channels(), [&](auto lanes, int c) {
        typename decltype(lanes)::Value sum{};
        if (accumulate) {
          sum = lanes.load_from(grad + c);
        }
        for (int64_t q = 0; q < block.pixels(); ++q) {
          sum += lanes.load_from(
                     columns + q * pixel_stride + k * block.channels() + c) *
              load_apart(lanes, row + q * p.O + c * multiplier, multiplier);
        }
        lanes.store_to(grad + c, sum);
      });
    }
  }
}

template <typename R>
constexpr DepthwiseKernels<R> depthwise_table{
    multiply_depthwise<R>,
    column_cotangent_depthwise<R>,
    weight_grad_depthwise<R>};

} // namespace

extern const DepthwiseKernels<float> depthwise_float32;
extern const DepthwiseKernels<double> depthwise_float64;

const DepthwiseKernels<float> depthwise_float32 = depthwise_table<float>;
const DepthwiseKernels<double> depthwise_float64 = depthwise_table<double>;

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
