// Bodies of the tile kernels. Included by one source file per instruction set,
// which defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES.
// Everything here has internal linkage or lives in that namespace.

#include "mlx_ops/cpu/corners.h"
#include "mlx_ops/cpu/lanes.h"
#include "mlx_ops/cpu/plan_impl.h"
#include "mlx_ops/cpu/sample_beside_impl.h"
#include "mlx_ops/cpu/sampling_impl.h"
#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// The gradients of a block of samples' offsets and masks, side by side for the
// compiler to vectorise. They are combinations of four numbers: the cotangent
// times each corner, summed over the channels.
template <typename R>
struct SampleGrads {
  static constexpr int size = SampleBlock<R>::size;
  R corner[size][4];
  int64_t at[size]; // the sample's place among all masks
  R y[size], x[size], mask[size];

  void combine(const SampleBlock<R>& samples) {
    for (int i = 0; i < size; ++i) {
      BilinearCell<R> cell{};
      cell.ly = samples.ly[i];
      cell.lx = samples.lx[i];
      const auto sum = [&](CornerWeights<R> weights) {
        return weights.w[0] * corner[i][0] + weights.w[1] * corner[i][1] +
            weights.w[2] * corner[i][2] + weights.w[3] * corner[i][3];
      };
      // Beyond the image gradients are 0, whatever mask and cotangent are.
      const bool live = samples.flags[i] & SampleBlock<R>::live_bit;
      const R m = samples.mask[i];
      y[i] = live ? m * sum(slope_weights_y(cell)) : R(0);
      x[i] = live ? m * sum(slope_weights_x(cell)) : R(0);
      mask[i] = live ? sum(value_weights(cell)) : R(0);
    }
  }

  void write(
      const SampleBlock<R>& samples,
      int count,
      R* grad_offset,
      R* grad_mask) {
    combine(samples);
    for (int i = 0; i < count; ++i) {
      if (grad_offset) {
        grad_offset[2 * at[i]] = y[i];
        grad_offset[2 * at[i] + 1] = x[i];
      }
      if (grad_mask) {
        grad_mask[at[i]] = mask[i];
      }
    }
  }
};

template <int length, typename T, typename R>
void offset_grad_rows(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const T* input,
    const T* zeros,
    const R* grad_columns,
    R* grad_offset,
    R* grad_mask) {
  const int taps = params.kH * params.kW;
  const int n = length_of<length>(params.C / params.DG);
  const CornerSteps steps(params);
  SampleGrads<R> grads{};
  Sample<R> s(samples, 0);

  for (int64_t p = block.pixel_begin; p < block.pixel_end; ++p) {
    for (int dg = 0; dg < params.DG; ++dg) {
      const R* grad = grad_columns + dg * n;
      for (int k = block.tap_begin; k < block.tap_end;
           ++k, s.advance(), grad += params.C) {
        const Corners<T> from(s, steps, input, zeros, dg * n);
        corner_sums<length>(from.p, grad, n, grads.corner[s.lane]);
        grads.at[s.lane] = (p * params.DG + dg) * taps + k;
        if (s.lane == grads.size - 1) {
          grads.write(*s.block, grads.size, grad_offset, grad_mask);
        }
      }
    }
    grad_columns += block.width();
  }
  if (s.lane > 0) {
    grads.write(*s.block, s.lane, grad_offset, grad_mask);
  }
}

template <typename T, typename R>
void offset_grad(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const T* input,
    const T* zeros,
    const R* grad_columns,
    R* grad_offset,
    R* grad_mask) {
  with_length<R>(params.C / params.DG, [&](auto length) {
    offset_grad_rows<length.value, T, R>(
        params,
        block,
        samples,
        input,
        zeros,
        grad_columns,
        grad_offset,
        grad_mask);
  });
}

template <int length, typename R>
void scatter_rows(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const R* grad_columns,
    int64_t image_begin,
    int64_t image_end,
    R* sink,
    R* grad_input) {
  const int n = length_of<length>(params.C / params.DG);
  const CornerSteps steps(params);

  const int64_t pixels = block.pixels();
  const int taps = block.taps();
  Sample<R> s(samples, 0);
  for (int64_t p = 0; p < pixels; ++p, grad_columns += block.width()) {
    for (int dg = 0; dg < params.DG; ++dg) {
      const R* grad = grad_columns + dg * n;
      for (int k = 0; k < taps; ++k, s.advance(), grad += params.C) {
        const auto add = [&](R* const(&to)[4], R mask) {
          const R w[4]{
              mask * s.weight(0),
              mask * s.weight(1),
              mask * s.weight(2),
              mask * s.weight(3)};
          add_to_corners<length>(grad, n, w, to);
        };
        const int64_t first = s.at(), last = first + steps.to(3);
        const bool inside = first >= image_begin && last < image_end;
        if (inside && s.is_ordinary()) [[likely]] {
          R* to = grad_input + first + dg * n;
          add({to, to + steps.right, to + steps.down, to + steps.to(3)}, R(1));
        } else if (last >= image_begin && first < image_end) {
          R* to[4];
          for (int i = 0; i < 4; ++i) {
            const int64_t at = first + steps.to(i);
            const bool mine =
                s.has_corner(i) && at >= image_begin && at < image_end;
            to[i] = mine ? grad_input + at + dg * n : sink;
          }
          add(to, s.mask_is_apart() ? s.mask() : R(1));
        }
      }
    }
  }
}

template <typename R>
void scatter(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const R* grad_columns,
    int64_t image_begin,
    int64_t image_end,
    R* sink,
    R* grad_input) {
  with_length<R>(params.C / params.DG, [&](auto length) {
    scatter_rows<length.value, R>(
        params,
        block,
        samples,
        grad_columns,
        image_begin,
        image_end,
        sink,
        grad_input);
  });
}

// Either way between storage and arithmetic.
template <typename R, typename From, typename To>
static inline void convert(const From* from, To* to, int64_t n) {
  constexpr int width = VectorOf<R>::width;
  const int64_t whole = n / width * width;
  for (int64_t i = 0; i < whole; i += width) {
    store(to + i, load(from + i));
  }
  for_last_lanes<R>(0, int(n - whole), [&](auto lanes, int i) {
    lanes.store_to(to + whole + i, lanes.load_from(from + whole + i));
  });
}

template <typename T, typename R>
void to_compute(const T* from, R* to, int64_t n) {
  convert<R>(from, to, n);
}

template <typename T, typename R>
void from_compute(const R* from, T* to, int64_t n) {
  convert<R>(from, to, n);
}

template <typename T, typename R>
constexpr TileKernels<T, R> table{
    plan<R>,
    sample<T, R>,
    sample_beside_or_null<T, R>,
    offset_grad<T, R>,
    scatter<R>,
    to_compute<T, R>,
    from_compute<T, R>};

} // namespace

extern const TileKernels<float, float> kernels_float32;
extern const TileKernels<double, double> kernels_float64;
extern const TileKernels<Float16, float> kernels_float16;
extern const TileKernels<BFloat16, float> kernels_bfloat16;

const TileKernels<float, float> kernels_float32 = table<float, float>;
const TileKernels<double, double> kernels_float64 = table<double, double>;
const TileKernels<Float16, float> kernels_float16 = table<Float16, float>;
const TileKernels<BFloat16, float> kernels_bfloat16 = table<BFloat16, float>;

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
