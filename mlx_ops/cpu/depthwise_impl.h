// Bodies of the depthwise kernels, included as tile_kernels_impl.h is.

#include "mlx_ops/cpu/depthwise.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// Some channels at a time: a vector of them, or the last ones one by one. Of a
// row they lie `step` apart.
template <typename R>
struct ManyChannels {
  static constexpr int count = VectorOf<R>::width;
  using Value = Vector<R>;

  static Value load_row(const R* p, int step) {
    if (step == 1) {
      return load(p);
    }
    Value v;
    for (int i = 0; i < count; ++i) {
      v[i] = p[i * step];
    }
    return v;
  }
  static void store_row(R* p, int step, Value v) {
    if (step == 1) {
      return store(p, v);
    }
    for (int i = 0; i < count; ++i) {
      p[i * step] = v[i];
    }
  }
};

template <typename R>
struct OneChannel {
  static constexpr int count = 1;
  using Value = R;

  static R load_row(const R* p, int) {
    return *p;
  }
  static void store_row(R* p, int, R v) {
    *p = v;
  }
};

template <typename Channels, typename R>
static inline typename Channels::Value load_channels(const R* p) {
  return Channels::load_row(p, 1);
}

// Calls f.template operator()<Channels>(c) for c in [0, n), many at a time.
template <typename R, typename F>
static inline void for_channels(int n, const F& f) {
  int c = 0;
  for (; c + ManyChannels<R>::count <= n; c += ManyChannels<R>::count) {
    f.template operator()<ManyChannels<R>>(c);
  }
  for (; c < n; ++c) {
    f.template operator()<OneChannel<R>>(c);
  }
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
      for_channels<R>(block.channels(), [&]<typename Channels>(int c) {
        typename Channels::Value sum{};
        if (accumulate) {
          sum = Channels::load_row(row + c * multiplier, multiplier);
        }
        for (int k = 0; k < block.taps(); ++k) {
          sum += load_channels<Channels>(columns + k * block.channels() + c) *
              load_channels<Channels>(w + int64_t(k) * p.C + c);
        }
        Channels::store_row(row + c * multiplier, multiplier, sum);
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
      for_channels<R>(p.C, [&]<typename Channels>(int c) {
        typename Channels::Value sum{};
        for (int j = 0; j < multiplier; ++j) {
          sum += Channels::load_row(rows + c * multiplier + j, multiplier) *
              load_channels<Channels>(weight + (j * taps + k) * p.C + c);
        }
        Channels::store_row(grad_columns + c, 1, sum);
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
      for_channels<R>(block.channels(), [&]<typename Channels>(int c) {
        typename Channels::Value sum{};
        if (accumulate) {
          sum = load_channels<Channels>(grad + c);
        }
        for (int64_t q = 0; q < block.pixels(); ++q) {
          sum += load_channels<Channels>(
                     columns + q * pixel_stride + k * block.channels() + c) *
              Channels::load_row(row + q * p.O + c * multiplier, multiplier);
        }
        Channels::store_row(grad + c, 1, sum);
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
