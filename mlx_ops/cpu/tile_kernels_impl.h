// Bodies of the tile kernels. Included by one source file per instruction set,
// which defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES.
// Everything here has internal linkage or lives in that namespace.

#include "mlx_ops/cpu/lane_sums.h"
#include "mlx_ops/cpu/lanes.h"
#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// Samples on their way into a plan: their positions, in order.
template <typename R>
struct Positions {
  static constexpr int most = 512;
  R y[most], x[most], mask[most];
  int64_t image[most]; // element offset of the pixel's image
  int count = 0;
};

// Plans a block of samples.
template <typename R>
static inline void locate(
    const DeformConv2dParams& p,
    const Positions<R>& from,
    int first,
    SampleBlock<R>& to) {
  const int64_t across = int64_t(p.W) * p.C;
  const int64_t channels = p.C;
  int row[SampleBlock<R>::size], col[SampleBlock<R>::size];
  for (int i = 0; i < SampleBlock<R>::size; ++i) {
    const BilinearCell<R> cell =
        bilinear_cell<R>(from.y[first + i], from.x[first + i], p.H, p.W);
    row[i] = cell.y;
    col[i] = cell.x;
    // A NaN position makes value and slopes NaN by itself.
    const R nan_or_0 = cell.nan ? R(__builtin_nan("")) : R(0);
    BilinearCell<R> place{};
    place.ly = cell.ly + nan_or_0;
    place.lx = cell.lx + nan_or_0;
    to.ly[i] = place.ly;
    to.lx[i] = place.lx;
    const R mask = from.mask[first + i];
    const bool finite = mask - mask == R(0);
    const R m = finite ? mask : R(1);
    const CornerWeights<R> weights = value_weights(place);
    for (int j = 0; j < 4; ++j) {
      to.w[j][i] = m * weights.w[j];
    }
    to.mask[i] = mask;
    to.flags[i] = int(cell.corner[0]) | int(cell.corner[1]) << 1 |
        int(cell.corner[2]) << 2 | int(cell.corner[3]) << 3 |
        int(cell.inside || cell.nan) * SampleBlock<R>::live_bit |
        int(!finite) * SampleBlock<R>::mask_apart_bit;
  }
  for (int i = 0; i < SampleBlock<R>::size; ++i) {
    to.at[i] = from.image[first + i] + row[i] * across + col[i] * channels;
  }
}

// Plans samples in order, a block whenever there are enough.
template <typename R>
class Planner {
 public:
  Planner(const DeformConv2dParams& params, SampleBlock<R>* to)
      : params_(params), to_(to) {}

  // n samples, fewer than `most`, that lie side by side in memory: at rows
  // y + rows[i] and columns x + cols[i], undisplaced.
  static constexpr int most = Positions<R>::most - SampleBlock<R>::size;
  void add(
      int n,
      int y,
      int x,
      const int* rows,
      const int* cols,
      int64_t image,
      const R* offset,
      const R* mask) {
    if (positions_.count + n > Positions<R>::most) {
      plan_whole_blocks();
    }
    R* to_y = positions_.y + positions_.count;
    R* to_x = positions_.x + positions_.count;
    R* to_mask = positions_.mask + positions_.count;
    int64_t* to_image = positions_.image + positions_.count;
    for (int i = 0; i < n; ++i) {
      to_y[i] = R(y + rows[i]) + offset[2 * i];
      to_x[i] = R(x + cols[i]) + offset[2 * i + 1];
      to_mask[i] = mask ? mask[i] : R(1);
      to_image[i] = image;
    }
    positions_.count += n;
  }

  // Plans what is left, and fills up the last block.
  void finish() {
    plan_whole_blocks();
    if (positions_.count > 0) {
      locate(params_, positions_, 0, *to_);
    }
  }

 private:
  void plan_whole_blocks() {
    constexpr int size = SampleBlock<R>::size;
    const int whole = positions_.count / size * size;
    for (int i = 0; i < whole; i += size) {
      locate(params_, positions_, i, *to_++);
    }
    for (int i = whole; i < positions_.count; ++i) {
      positions_.y[i - whole] = positions_.y[i];
      positions_.x[i - whole] = positions_.x[i];
      positions_.mask[i - whole] = positions_.mask[i];
      positions_.image[i - whole] = positions_.image[i];
    }
    positions_.count -= whole;
  }

  const DeformConv2dParams& params_;
  SampleBlock<R>* to_;
  Positions<R> positions_{};
};

template <typename R>
void plan(
    const DeformConv2dParams& params,
    const Block& block,
    const R* offset,
    const R* mask,
    SampleBlock<R>* samples) {
  const int taps = params.kH * params.kW;
  const GroupRange groups =
      offset_groups(params, block.channel_begin, block.channel_end);
  // All taps of neighbouring groups lie side by side in memory.
  const bool all_taps = block.taps() == taps;
  const int at_once = all_taps ? groups.count() * taps : block.taps();
  const int runs = all_taps ? 1 : groups.count();

  constexpr int most = Planner<R>::most;
  int rows[most], cols[most];
  int listed = -1; // the first of those listed there
  const auto list_taps = [&](int first, int n) {
    for (int i = 0; i < n; ++i) {
      const int tap = block.tap_begin + (first + i) % block.taps();
      rows[i] = tap / params.kW * params.dilation_h;
      cols[i] = tap % params.kW * params.dilation_w;
    }
    listed = first;
  };

  Planner<R> planner(params, samples);
  int64_t rest = block.pixel_begin;
  int wo = int(rest % params.Wo);
  rest /= params.Wo;
  int ho = int(rest % params.Ho);
  const int64_t image_size = int64_t(params.H) * params.W * params.C;
  int64_t image = rest / params.Ho * image_size;
  for (int64_t p = block.pixel_begin; p < block.pixel_end; ++p) {
    const int y = ho * params.stride_h - params.pad_h;
    const int x = wo * params.stride_w - params.pad_w;
    for (int run = 0; run < runs; ++run) {
      const int64_t at = (p * params.DG + groups.first + run) * taps +
          block.tap_begin;
      for (int i = 0; i < at_once; i += most) {
        const int n = at_once - i < most ? at_once - i : most;
        if (listed != i) {
          list_taps(i, n);
        }
        planner.add(
            n,
            y,
            x,
            rows,
            cols,
            image,
            offset + 2 * (at + i),
            mask ? mask + at + i : nullptr);
      }
    }
    if (++wo == params.Wo) {
      wo = 0;
      if (++ho == params.Ho) {
        ho = 0;
        image += image_size;
      }
    }
  }
  planner.finish();
}

// Element offsets of a cell's corners from the upper left one.
struct CornerSteps {
  int64_t right;
  int64_t down;

  explicit CornerSteps(const DeformConv2dParams& p)
      : right(p.C), down(int64_t(p.W) * p.C) {}

  int64_t to(int corner) const {
    return (corner & 1 ? right : 0) + (corner & 2 ? down : 0);
  }
};

// The four corners of a sample, from some channel on.
template <typename T>
struct Corners {
  const T* p[4];

  template <typename R>
  Corners(
      const Sample<R>& s,
      const CornerSteps& steps,
      const T* input,
      const T* zeros,
      int channel) {
    const T* first = input + s.at() + channel;
    p[0] = first;
    p[1] = first + steps.right;
    p[2] = first + steps.down;
    p[3] = first + steps.down + steps.right;
    for (int i = 0; i < 4; ++i) {
      p[i] = s.has_corner(i) ? p[i] : zeros + channel;
    }
  }
};

// A mask that is no part of the weights.
template <typename R>
[[gnu::noinline, gnu::cold]] void multiply_by(R mask, int n, R* out) {
  for (int q = 0; q < n; ++q) {
    out[q] *= mask;
  }
}

// One sample at n channels from c on.
template <int vectors, typename T, typename R>
static inline void sample_row(
    const Sample<R>& s,
    const CornerSteps& steps,
    const T* input,
    const T* zeros,
    int c,
    int n,
    R* out) {
  const Corners<T> from(s, steps, input, zeros, c);
  const T *p0 = from.p[0], *p1 = from.p[1], *p2 = from.p[2], *p3 = from.p[3];
  const R w0 = s.weight(0), w1 = s.weight(1);
  const R w2 = s.weight(2), w3 = s.weight(3);
  for_lanes<R, vectors>(n, [&](auto lanes, int q) {
    lanes.store_to(
        out + q,
        w0 * lanes.load_from(p0 + q) + w1 * lanes.load_from(p1 + q) +
            w2 * lanes.load_from(p2 + q) + w3 * lanes.load_from(p3 + q));
  });
  if (s.mask_is_apart()) {
    multiply_by(s.mask(), n, out);
  }
}

template <int vectors, typename T, typename R>
void sample_rows(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const T* input,
    const T* zeros,
    R* columns,
    int64_t pixel_stride,
    int64_t tap_stride) {
  const GroupRange groups =
      offset_groups(params, block.channel_begin, block.channel_end);
  const int group_width = params.C / params.DG;
  const CornerSteps steps(params);

  const int64_t pixels = block.pixels();
  const int taps = block.taps();
  int64_t next = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    R* out = columns + p * pixel_stride;
    int c = block.channel_begin;
    for (int dg = groups.first; dg < groups.last; ++dg) {
      const int group_end = (dg + 1) * group_width;
      const int end =
          group_end < block.channel_end ? group_end : block.channel_end;
      const int n = vectors ? vectors * VectorOf<R>::width : end - c;
      for (int k = 0; k < taps; ++k) {
        const Sample<R> s(samples, next++);
        sample_row<vectors>(s, steps, input, zeros, c, n, out + k * tap_stride);
      }
      out += n;
      c += n;
    }
  }
}

template <typename T, typename R>
void sample(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const T* input,
    const T* zeros,
    R* columns,
    int64_t pixel_stride,
    int64_t tap_stride) {
  // All rows have the same length unless the block cuts one of its groups.
  const int group_width = params.C / params.DG;
  const bool whole_groups = block.channel_begin % group_width == 0 &&
      block.channel_end % group_width == 0;
  const bool one_group =
      offset_groups(params, block.channel_begin, block.channel_end).count() ==
      1;
  const int n = one_group ? block.channels() : whole_groups ? group_width : 0;
  with_vector_count<R>(n, [&](auto count) {
    sample_rows<count.value, T, R>(
        params,
        block,
        samples,
        input,
        zeros,
        columns,
        pixel_stride,
        tap_stride);
  });
}

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

// The cotangent times each corner, summed over n channels.
template <typename T, typename R>
static inline void
corner_sums(const Corners<T>& from, const R* grad, int n, R (&sums)[4]) {
  constexpr int width = VectorOf<R>::width;
  // Two sums each, for the next addition not to wait for the last.
  Vector<R> s[4]{}, t[4]{};
  int q = 0;
  MLX_DEFORM_UNROLL(4)
  for (; q + 2 * width <= n; q += 2 * width) {
    const Vector<R> g = load(grad + q);
    const Vector<R> h = load(grad + q + width);
    for (int i = 0; i < 4; ++i) {
      s[i] += g * load(from.p[i] + q);
      t[i] += h * load(from.p[i] + q + width);
    }
  }
  if (q + width <= n) {
    const Vector<R> g = load(grad + q);
    for (int i = 0; i < 4; ++i) {
      s[i] += g * load(from.p[i] + q);
    }
    q += width;
  }
  R last[4]{};
  for_last_lanes<R>(q, n, [&](auto lanes, int q) {
    const auto g = lanes.load_from(grad + q);
    for (int i = 0; i < 4; ++i) {
      if constexpr (lanes.is_vector) {
        s[i] += g * lanes.load_from(from.p[i] + q);
      } else {
        last[i] += g * lanes.load_from(from.p[i] + q);
      }
    }
  });
  for (int i = 0; i < 4; ++i) {
    s[i] += t[i];
  }
  lane_sums<R>(s, sums);
  for (int i = 0; i < 4; ++i) {
    sums[i] += last[i];
  }
}

template <int vectors, typename T, typename R>
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
  const int n =
      vectors ? vectors * VectorOf<R>::width : params.C / params.DG;
  const CornerSteps steps(params);
  SampleGrads<R> grads{};
  int64_t next = 0;

  for (int64_t p = block.pixel_begin; p < block.pixel_end; ++p) {
    for (int dg = 0; dg < params.DG; ++dg) {
      const R* grad = grad_columns + dg * n;
      for (int k = block.tap_begin; k < block.tap_end; ++k, grad += params.C) {
        const Sample<R> s(samples, next++);
        const Corners<T> from(s, steps, input, zeros, dg * n);
        corner_sums(from, grad, n, grads.corner[s.lane]);
        grads.at[s.lane] = (p * params.DG + dg) * taps + k;
        if (s.lane == grads.size - 1) {
          grads.write(s.block, grads.size, grad_offset, grad_mask);
        }
      }
    }
    grad_columns += block.width();
  }
  const Sample<R> end(samples, next);
  if (end.lane > 0) {
    grads.write(end.block, end.lane, grad_offset, grad_mask);
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
  with_vector_count<R>(params.C / params.DG, [&](auto count) {
    offset_grad_rows<count.value, T, R>(
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

template <int vectors, typename R>
void scatter_rows(
    const DeformConv2dParams& params,
    const Block& block,
    const SampleBlock<R>* samples,
    const R* grad_columns,
    int64_t image_begin,
    int64_t image_end,
    R* sink,
    R* grad_input) {
  const int n = vectors ? vectors * VectorOf<R>::width : params.C / params.DG;
  const CornerSteps steps(params);

  const int64_t pixels = block.pixels();
  const int taps = block.taps();
  int64_t next = 0;
  for (int64_t p = 0; p < pixels; ++p, grad_columns += block.width()) {
    for (int dg = 0; dg < params.DG; ++dg) {
      const R* grad = grad_columns + dg * n;
      for (int k = 0; k < taps; ++k, grad += params.C) {
        const Sample<R> s(samples, next++);
        const int64_t at = s.at();
        if (at + steps.to(3) < image_begin || at >= image_end) {
          continue;
        }
        R* to[4];
        for (int i = 0; i < 4; ++i) {
          to[i] = s.has_corner(i) ? grad_input + at + steps.to(i) + dg * n : sink;
        }
        if (at < image_begin || at + steps.to(3) >= image_end) [[unlikely]] {
          for (int i = 0; i < 4; ++i) {
            const int64_t corner = at + steps.to(i);
            to[i] = corner >= image_begin && corner < image_end ? to[i] : sink;
          }
        }
        R *to0 = to[0], *to1 = to[1], *to2 = to[2], *to3 = to[3];
        const R mask = s.mask_is_apart() ? s.mask() : R(1);
        const R w0 = mask * s.weight(0), w1 = mask * s.weight(1);
        const R w2 = mask * s.weight(2), w3 = mask * s.weight(3);
        // Vectors of all corners are loaded before any is stored, so that no
        // load waits for a store in a row of the same place in the cache.
        for_lanes<R, vectors>(n, [&](auto lanes, int q) {
          const auto g = lanes.load_from(grad + q);
          const auto v0 = lanes.load_from(to0 + q) + w0 * g;
          const auto v1 = lanes.load_from(to1 + q) + w1 * g;
          const auto v2 = lanes.load_from(to2 + q) + w2 * g;
          const auto v3 = lanes.load_from(to3 + q) + w3 * g;
          lanes.store_to(to0 + q, v0);
          lanes.store_to(to1 + q, v1);
          lanes.store_to(to2 + q, v2);
          lanes.store_to(to3 + q, v3);
        });
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
  with_vector_count<R>(params.C / params.DG, [&](auto count) {
    scatter_rows<count.value, R>(
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
