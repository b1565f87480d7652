// Bodies of the tile kernels. Included by one source file per instruction set,
// which defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES.
// Everything here has internal linkage or lives in that namespace.

#include "mlx_ops/cpu/lane_sums.h"
#include "mlx_ops/cpu/lanes.h"
#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// The samples of some pixels at one tap and offset group, side by side for the
// compiler to vectorise.
template <typename R>
struct Cells {
  static constexpr int most = 64;
  int ho[most], wo[most];
  int64_t image[most]; // element offset of the pixel's image
  R dy[most], dx[most];
  R ly[most], lx[most];
  int row[most], col[most]; // upper left corner
  int flags[most]; // as in Sample

  // Whole vectors are computed; what lies beyond `count` is of no account.
  static int whole(int count) {
    return (count + 15) / 16 * 16;
  }

  void choose_pixels(const DeformConv2dParams& p, int64_t begin, int count) {
    int64_t rest = begin;
    int x = int(rest % p.Wo);
    rest /= p.Wo;
    int y = int(rest % p.Ho);
    int64_t at = rest / p.Ho * p.H * p.W * p.C;
    for (int i = 0; i < whole(count); ++i) {
      ho[i] = y;
      wo[i] = x;
      image[i] = at;
      dy[i] = dx[i] = R(0);
      if (++x == p.Wo) {
        x = 0;
        if (++y == p.Ho) {
          y = 0;
          at += int64_t(p.H) * p.W * p.C;
        }
      }
    }
  }

  void load_offsets(const R* offset, int64_t step, int count) {
    for (int i = 0; i < count; ++i) {
      dy[i] = offset[i * step];
      dx[i] = offset[i * step + 1];
    }
  }

  void locate(const DeformConv2dParams& p, int tap, int count) {
    const int tap_row = tap / p.kW;
    const int tap_col = tap % p.kW;
    for (int i = 0; i < whole(count); ++i) {
      const R y = sample_coordinate<R>(
          ho[i], p.stride_h, p.pad_h, tap_row, p.dilation_h, dy[i]);
      const R x = sample_coordinate<R>(
          wo[i], p.stride_w, p.pad_w, tap_col, p.dilation_w, dx[i]);
      const BilinearCell<R> cell = bilinear_cell<R>(y, x, p.H, p.W);
      row[i] = cell.y;
      col[i] = cell.x;
      // A NaN position makes value and slopes NaN by itself.
      const R nan_or_0 = cell.nan ? R(__builtin_nan("")) : R(0);
      ly[i] = cell.ly + nan_or_0;
      lx[i] = cell.lx + nan_or_0;
      flags[i] = int(cell.corner[0]) | int(cell.corner[1]) << 1 |
          int(cell.corner[2]) << 2 | int(cell.corner[3]) << 3 |
          int(cell.inside || cell.nan) * Sample<R>::live_bit;
    }
  }
};

// For what is read in pieces here and there, which the machine doesn't foresee.
// May point beyond an array's end.
template <typename R>
static inline void fetch_ahead(const R* from, int64_t count) {
  constexpr int64_t line = 64;
  const auto begin = (uintptr_t)from;
  const uintptr_t end = begin + count * sizeof(R);
  for (uintptr_t at = begin & ~uintptr_t(line - 1); at < end; at += line) {
    __builtin_prefetch((const void*)at);
  }
}

template <typename R>
void plan(
    const DeformConv2dParams& params,
    const Block& block,
    const R* offset,
    const R* mask,
    Sample<R>* samples) {
  Cells<R> cells;
  const int taps = params.kH * params.kW;
  const GroupRange groups =
      offset_groups(params, block.channel_begin, block.channel_end);
  const int64_t pixel_masks = int64_t(params.DG) * taps;
  const int64_t pixel_samples = int64_t(block.taps()) * groups.count();
  const int64_t across = int64_t(params.W) * params.C;
  const int64_t channels = params.C;

  for (int64_t begin = block.pixel_begin; begin < block.pixel_end;
       begin += Cells<R>::most) {
    const int64_t left = block.pixel_end - begin;
    const int count = left < Cells<R>::most ? int(left) : Cells<R>::most;
    cells.choose_pixels(params, begin, count);
    for (int dg = groups.first; dg < groups.last; ++dg) {
      for (int i = 0; i < count; ++i) {
        const int64_t next = (begin + Cells<R>::most + i) * pixel_masks +
            int64_t(dg) * taps + block.tap_begin;
        fetch_ahead(offset + 2 * next, 2 * block.taps());
        if (mask) {
          fetch_ahead(mask + next, block.taps());
        }
      }
    }
    Sample<R>* first = samples + (begin - block.pixel_begin) * pixel_samples;
    for (int tap = block.tap_begin; tap < block.tap_end; ++tap) {
      for (int dg = groups.first; dg < groups.last; ++dg, ++first) {
        const int64_t at = begin * pixel_masks + int64_t(dg) * taps + tap;
        cells.load_offsets(offset + 2 * at, 2 * pixel_masks, count);
        cells.locate(params, tap, count);
        for (int i = 0; i < count; ++i) {
          first[i * pixel_samples] = {
              cells.image[i] + cells.row[i] * across + cells.col[i] * channels,
              cells.ly[i],
              cells.lx[i],
              mask ? mask[at + i * pixel_masks] : R(1),
              cells.flags[i]};
        }
      }
    }
  }
}

// Element offsets of a cell's corners from the upper left one.
struct CornerSteps {
  int64_t step[4];

  explicit CornerSteps(const DeformConv2dParams& p)
      : step{0, p.C, int64_t(p.W) * p.C, int64_t(p.W) * p.C + p.C} {}
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
    const bool all = s.has_all_corners();
    for (int i = 0; i < 4; ++i) {
      p[i] = (all || s.has_corner(i) ? input + s.at + steps.step[i] : zeros) +
          channel;
    }
  }
};

// One sample at n channels from c on.
template <typename T, typename R>
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
  // The mask goes into the weights, but an infinite one doesn't: a weight of 0
  // would make it NaN.
  const bool finite = s.mask - s.mask == R(0);
  const R m = finite ? s.mask : R(1);
  const CornerWeights<R> w = value_weights(s.cell());
  const R w0 = m * w.w[0], w1 = m * w.w[1], w2 = m * w.w[2], w3 = m * w.w[3];
  for_lanes<R>(n, [&](auto lanes, int q) {
    lanes.store_to(
        out + q,
        w0 * lanes.load_from(p0 + q) + w1 * lanes.load_from(p1 + q) +
            w2 * lanes.load_from(p2 + q) + w3 * lanes.load_from(p3 + q));
  });
  if (!finite) {
    for (int q = 0; q < n; ++q) {
      out[q] *= s.mask;
    }
  }
}

template <typename T, typename R>
void sample(
    const DeformConv2dParams& params,
    const Block& block,
    const Sample<R>* samples,
    const T* input,
    const T* zeros,
    R* columns,
    int64_t pixel_stride,
    int64_t tap_stride) {
  const GroupRange groups =
      offset_groups(params, block.channel_begin, block.channel_end);
  const int group_width = params.C / params.DG;
  const int64_t pixels = block.pixels();
  const int taps = block.taps();
  const CornerSteps steps(params);

  // Mostly there is one offset group: a loop without their bookkeeping.
  if (groups.count() == 1) {
    const int begin = block.channel_begin;
    const int n = block.channels();
    for (int64_t p = 0; p < pixels; ++p) {
      for (int k = 0; k < taps; ++k, ++samples) {
        R* out = columns + p * pixel_stride + k * tap_stride;
        sample_row(*samples, steps, input, zeros, begin, n, out);
      }
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int k = 0; k < taps; ++k) {
      R* out = columns + p * pixel_stride + k * tap_stride;
      int c = block.channel_begin;
      for (int dg = groups.first; dg < groups.last; ++dg, ++samples) {
        const int group_end = (dg + 1) * group_width;
        const int end =
            group_end < block.channel_end ? group_end : block.channel_end;
        sample_row(*samples, steps, input, zeros, c, end - c, out);
        out += end - c;
        c = end;
      }
    }
  }
}

template <typename T, typename R>
void offset_grad(
    const DeformConv2dParams& params,
    const Block& block,
    const Sample<R>* samples,
    const T* input,
    const T* zeros,
    const R* grad_columns,
    R* grad_offset,
    R* grad_mask) {
  constexpr int width = VectorOf<R>::width;
  const int taps = params.kH * params.kW;
  const int group_width = params.C / params.DG;
  const int64_t pixel_row = int64_t(params.DG) * taps;
  const CornerSteps steps(params);

  for (int64_t p = block.pixel_begin; p < block.pixel_end; ++p) {
    for (int k = block.tap_begin; k < block.tap_end; ++k) {
      for (int dg = 0; dg < params.DG; ++dg, ++samples) {
        const int c = dg * group_width;
        const int64_t at = p * pixel_row + int64_t(dg) * taps + k;
        if (!samples->live()) {
          if (grad_offset) {
            grad_offset[2 * at] = grad_offset[2 * at + 1] = R(0);
          }
          if (grad_mask) {
            grad_mask[at] = R(0);
          }
          grad_columns += group_width;
          continue;
        }
        // The cotangent times each corner, summed over the channels: value and
        // both slopes are combinations of these four numbers.
        const Corners<T> from(*samples, steps, input, zeros, c);
        // Two sums each, for the next addition not to wait for the last.
        Vector<R> s[4]{}, t[4]{};
        int q = 0;
        for (; q + 2 * width <= group_width; q += 2 * width) {
          const Vector<R> g = load(grad_columns + q);
          const Vector<R> h = load(grad_columns + q + width);
          for (int i = 0; i < 4; ++i) {
            s[i] += g * load(from.p[i] + q);
            t[i] += h * load(from.p[i] + q + width);
          }
        }
        for (; q + width <= group_width; q += width) {
          const Vector<R> g = load(grad_columns + q);
          for (int i = 0; i < 4; ++i) {
            s[i] += g * load(from.p[i] + q);
          }
        }
        R last[4]{};
        for_last_lanes<R>(q, group_width, [&](auto lanes, int q) {
          const auto g = lanes.load_from(grad_columns + q);
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
        R corner[4];
        lane_sums<R>(s, corner);
        for (int i = 0; i < 4; ++i) {
          corner[i] += last[i];
        }
        grad_columns += group_width;

        const auto combine = [&](CornerWeights<R> weights) {
          return weights.w[0] * corner[0] + weights.w[1] * corner[1] +
              weights.w[2] * corner[2] + weights.w[3] * corner[3];
        };
        if (grad_offset) {
          const R m = samples->mask;
          grad_offset[2 * at] = m * combine(slope_weights_y(samples->cell()));
          grad_offset[2 * at + 1] =
              m * combine(slope_weights_x(samples->cell()));
        }
        if (grad_mask) {
          grad_mask[at] = combine(value_weights(samples->cell()));
        }
      }
    }
  }
}

template <typename R>
void scatter(
    const DeformConv2dParams& params,
    const Block& block,
    const Sample<R>* samples,
    const R* grad_columns,
    int64_t image_begin,
    int64_t image_end,
    R* grad_input) {
  const int group_width = params.C / params.DG;
  const CornerSteps steps(params);

  for (int64_t i = 0; i < block.pixels() * block.taps(); ++i) {
    for (int dg = 0; dg < params.DG; ++dg, grad_columns += group_width) {
      const Sample<R>& s = *samples++;
      const int64_t last = s.at + steps.step[3];
      if (last < image_begin || s.at >= image_end) {
        continue;
      }
      const CornerWeights<R> w = value_weights(s.cell());
      if (s.has_all_corners() && s.at >= image_begin && last < image_end) {
        // Vectors of all corners are loaded before any is stored, so that no
        // load waits for a store in a row of the same place in the cache.
        R* to = grad_input + s.at + dg * group_width;
        const R w0 = w.w[0] * s.mask, w1 = w.w[1] * s.mask;
        const R w2 = w.w[2] * s.mask, w3 = w.w[3] * s.mask;
        R *to1 = to + steps.step[1], *to2 = to + steps.step[2];
        R* to3 = to + steps.step[3];
        for_lanes<R>(group_width, [&](auto lanes, int q) {
          const auto g = lanes.load_from(grad_columns + q);
          const auto v0 = lanes.load_from(to + q) + w0 * g;
          const auto v1 = lanes.load_from(to1 + q) + w1 * g;
          const auto v2 = lanes.load_from(to2 + q) + w2 * g;
          const auto v3 = lanes.load_from(to3 + q) + w3 * g;
          lanes.store_to(to + q, v0);
          lanes.store_to(to1 + q, v1);
          lanes.store_to(to2 + q, v2);
          lanes.store_to(to3 + q, v3);
        });
        continue;
      }
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t at = s.at + steps.step[corner];
        if (!s.has_corner(corner) || at < image_begin || at >= image_end) {
          continue;
        }
        R* to = grad_input + at + dg * group_width;
        const R weight = w.w[corner] * s.mask;
        for_lanes<R>(group_width, [&](auto lanes, int q) {
          lanes.store_to(
              to + q,
              lanes.load_from(to + q) +
                  weight * lanes.load_from(grad_columns + q));
        });
      }
    }
  }
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
