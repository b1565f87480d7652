// Bodies of the tile kernels. Included by one source file per instruction set,
// which defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES.
// Everything here has internal linkage or lives in that namespace.

#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// ---- loads and stores: storage type T, arithmetic type R

template <typename To, typename From>
static inline To bit_cast_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

static inline float load_one(const float* p) {
  return *p;
}
static inline double load_one(const double* p) {
  return *p;
}
static inline float load_one(const BFloat16* p) {
  return bit_cast_of<float>(uint32_t(p->bits) << 16);
}
static inline float load_one(const Float16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#elif defined(__aarch64__)
  return float(bit_cast_of<__fp16>(p->bits));
#else
  // Exponent and mantissa moved in place, then rescaled from half's exponent
  // bias to float's; infinities and NaNs get float's full exponent.
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(p->bits & 0x7fff) << 13;
  const uint32_t special = rest >= 0x0f800000 ? 0x7f800000 : 0;
  const float scaled = bit_cast_of<float>(rest) * 0x1p112f;
  return bit_cast_of<float>(bit_cast_of<uint32_t>(scaled) | special | sign);
#endif
}

static inline void store_one(float* p, float x) {
  *p = x;
}
static inline void store_one(double* p, double x) {
  *p = x;
}
static inline void store_one(BFloat16* p, float x) {
  // Round to nearest, ties to even; NaNs stay NaNs.
  const uint32_t u = bit_cast_of<uint32_t>(x);
  p->bits = x != x ? uint16_t((u >> 16) | 0x0040)
                   : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void store_one(Float16* p, float x) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  p->bits = bit_cast_of<uint16_t>(__fp16(x));
#else
  const uint32_t u = bit_cast_of<uint32_t>(x);
  const uint16_t sign = uint16_t(u >> 16) & 0x8000;
  const uint32_t rest = u & 0x7fffffff;
  uint16_t bits;
  if (rest > 0x7f800000) {
    bits = 0x7e00;
  } else if (rest >= 0x477ff000) { // rounds beyond half's largest number
    bits = 0x7c00;
  } else if (rest < 0x38800000) { // subnormal: let the addition round
    bits = uint16_t(bit_cast_of<uint32_t>(bit_cast_of<float>(rest) + 0.5f));
  } else {
    bits = uint16_t((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13);
  }
  p->bits = bits | sign;
#endif
}

static inline Vector<float> load(const BFloat16* p) {
  typedef uint16_t Bits
      __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES)));
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast_of<Vector<float>>(
      Wide(__builtin_convertvector(bits, Wide) << 16));
}
static inline Vector<float> load(const Float16* p) {
#if defined(__F16C__) && MLX_DEFORM_VECTOR_BYTES == 32
  __m128i bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast_of<Vector<float>>(_mm256_cvtph_ps(bits));
#else
  Vector<float> v;
  for (int i = 0; i < VectorOf<float>::width; ++i) {
    v[i] = load_one(p + i);
  }
  return v;
#endif
}

// The lanes' sum, always in the same order.
template <typename R>
static inline R sum_of(Vector<R> v) {
  R sum = v[0];
  for (int i = 1; i < VectorOf<R>::width; ++i) {
    sum += v[i];
  }
  return sum;
}

// ---- kernels

// The samples of one pixel and offset group at several taps, side by side for
// the compiler to vectorise.
template <typename R>
struct Cells {
  static constexpr int most = 64;
  int tap_row[most], tap_col[most];
  R ly[most], lx[most];
  int row[most], col[most]; // upper left corner
  int corner[4][most];
  int live[most], nan[most];

  void choose_taps(int begin, int count, int kW) {
    for (int t = 0; t < count; ++t) {
      tap_row[t] = (begin + t) / kW;
      tap_col[t] = (begin + t) % kW;
    }
  }

  void locate(
      const DeformConv2dParams& p,
      int count,
      int ho,
      int wo,
      const R* offset) {
    for (int t = 0; t < count; ++t) {
      const R y = sample_coordinate<R>(
          ho, p.stride_h, p.pad_h, tap_row[t], p.dilation_h, offset[2 * t]);
      const R x = sample_coordinate<R>(
          wo, p.stride_w, p.pad_w, tap_col[t], p.dilation_w, offset[2 * t + 1]);
      const BilinearCell<R> cell = bilinear_cell<R>(y, x, p.H, p.W);
      row[t] = cell.y;
      col[t] = cell.x;
      ly[t] = cell.ly;
      lx[t] = cell.lx;
      corner[0][t] = cell.corner[0];
      corner[1][t] = cell.corner[1];
      corner[2][t] = cell.corner[2];
      corner[3][t] = cell.corner[3];
      live[t] = cell.inside || cell.nan;
      nan[t] = cell.nan;
    }
  }

  void store(
      int t,
      const DeformConv2dParams& params,
      int64_t image,
      R mask,
      Sample<R>& out) const {
    const int64_t across = int64_t(params.W) * params.C;
    const int64_t at = image + row[t] * across + int64_t(col[t]) * params.C;
    out.corner[0] = corner[0][t] ? at : -1;
    out.corner[1] = corner[1][t] ? at + params.C : -1;
    out.corner[2] = corner[2][t] ? at + across : -1;
    out.corner[3] = corner[3][t] ? at + across + params.C : -1;
    // A NaN position makes value and slopes NaN by itself.
    const R nan_or_0 = nan[t] ? R(__builtin_nan("")) : R(0);
    out.ly = ly[t] + nan_or_0;
    out.lx = lx[t] + nan_or_0;
    const CornerWeights<R> weights = value_weights(out.cell());
    for (int i = 0; i < 4; ++i) {
      out.weight[i] = weights.w[i];
    }
    out.mask = mask;
    out.live = live[t];
  }
};

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

  for (int begin = block.tap_begin; begin < block.tap_end;
       begin += Cells<R>::most) {
    const int left = block.tap_end - begin;
    const int count = left < Cells<R>::most ? left : Cells<R>::most;
    cells.choose_taps(begin, count, params.kW);

    int64_t rest = block.pixel_begin;
    int wo = int(rest % params.Wo);
    rest /= params.Wo;
    int ho = int(rest % params.Ho);
    int64_t n = rest / params.Ho;
    for (int64_t p = block.pixel_begin; p < block.pixel_end; ++p) {
      const int64_t image = n * params.H * params.W * params.C;
      for (int dg = groups.first; dg < groups.last; ++dg) {
        const int64_t at = (p * params.DG + dg) * taps + begin;
        cells.locate(params, count, ho, wo, offset + 2 * at);
        Sample<R>* to = samples +
            ((p - block.pixel_begin) * block.taps() + begin - block.tap_begin) *
                groups.count() +
            dg - groups.first;
        for (int t = 0; t < count; ++t) {
          cells.store(
              t,
              params,
              image,
              mask ? mask[at + t] : R(1),
              to[int64_t(t) * groups.count()]);
        }
      }
      if (++wo == params.Wo) {
        wo = 0;
        if (++ho == params.Ho) {
          ho = 0;
          ++n;
        }
      }
    }
  }
}

template <typename T>
static inline const T*
corner_at(const T* input, const T* zeros, int64_t corner, int channel) {
  return (corner < 0 ? zeros : input + corner) + channel;
}

// One sample at n channels from c on.
template <typename T, typename R>
static inline void sample_row(
    const Sample<R>& s,
    const T* input,
    const T* zeros,
    int c,
    int n,
    R* out) {
  constexpr int width = VectorOf<R>::width;
  const R w0 = s.weight[0], w1 = s.weight[1];
  const R w2 = s.weight[2], w3 = s.weight[3];
  const R m = s.mask;
  const T* p0 = corner_at(input, zeros, s.corner[0], c);
  const T* p1 = corner_at(input, zeros, s.corner[1], c);
  const T* p2 = corner_at(input, zeros, s.corner[2], c);
  const T* p3 = corner_at(input, zeros, s.corner[3], c);
  int q = 0;
  for (; q + width <= n; q += width) {
    store(
        out + q,
        m *
            (w0 * load(p0 + q) + w1 * load(p1 + q) + w2 * load(p2 + q) +
             w3 * load(p3 + q)));
  }
  for (; q < n; ++q) {
    out[q] = m *
        (w0 * load_one(p0 + q) + w1 * load_one(p1 + q) + w2 * load_one(p2 + q) +
         w3 * load_one(p3 + q));
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

  // Mostly there is one offset group: a loop without their bookkeeping.
  if (groups.count() == 1) {
    const int begin = block.channel_begin;
    const int n = block.channels();
    for (int64_t p = 0; p < pixels; ++p) {
      for (int k = 0; k < taps; ++k, ++samples) {
        R* out = columns + p * pixel_stride + k * tap_stride;
        sample_row(*samples, input, zeros, begin, n, out);
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
        sample_row(*samples, input, zeros, c, end - c, out);
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

  for (int64_t p = block.pixel_begin; p < block.pixel_end; ++p) {
    for (int k = block.tap_begin; k < block.tap_end; ++k) {
      for (int dg = 0; dg < params.DG; ++dg, ++samples) {
        const int c = dg * group_width;
        const T* p0 = corner_at(input, zeros, samples->corner[0], c);
        const T* p1 = corner_at(input, zeros, samples->corner[1], c);
        const T* p2 = corner_at(input, zeros, samples->corner[2], c);
        const T* p3 = corner_at(input, zeros, samples->corner[3], c);
        const int64_t at = p * pixel_row + int64_t(dg) * taps + k;
        if (!samples->live) {
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
        Vector<R> s0{}, s1{}, s2{}, s3{};
        int q = 0;
        for (; q + width <= group_width; q += width) {
          const Vector<R> g = load(grad_columns + q);
          s0 += g * load(p0 + q);
          s1 += g * load(p1 + q);
          s2 += g * load(p2 + q);
          s3 += g * load(p3 + q);
        }
        R corner[4] = {
            sum_of<R>(s0), sum_of<R>(s1), sum_of<R>(s2), sum_of<R>(s3)};
        for (; q < group_width; ++q) {
          const R g = grad_columns[q];
          corner[0] += g * load_one(p0 + q);
          corner[1] += g * load_one(p1 + q);
          corner[2] += g * load_one(p2 + q);
          corner[3] += g * load_one(p3 + q);
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
  constexpr int width = VectorOf<R>::width;
  const int group_width = params.C / params.DG;
  const uint64_t size = image_end - image_begin;

  for (int64_t at = 0; at < block.pixels() * block.taps(); ++at) {
    for (int dg = 0; dg < params.DG; ++dg, ++samples) {
      for (int corner = 0; corner < 4; ++corner) {
        // In other workers' range, or nowhere, which is -1.
        if (uint64_t(samples->corner[corner] - image_begin) >= size) {
          continue;
        }
        R* to = grad_input + samples->corner[corner] + dg * group_width;
        const R w = samples->weight[corner] * samples->mask;
        int q = 0;
        for (; q + width <= group_width; q += width) {
          store(to + q, load(to + q) + w * load(grad_columns + q));
        }
        for (; q < group_width; ++q) {
          to[q] += w * grad_columns[q];
        }
      }
      grad_columns += group_width;
    }
  }
}

template <typename T, typename R>
void to_compute(const T* from, R* to, int64_t n) {
  constexpr int width = VectorOf<R>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    store(to + i, load(from + i));
  }
  for (; i < n; ++i) {
    to[i] = load_one(from + i);
  }
}

template <typename T, typename R>
void from_compute(const R* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    store_one(to + i, from[i]);
  }
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
