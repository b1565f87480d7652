// Bodies of the op's kernels. Included by one source file per instruction set,
// which defines MLX_DEFORM_ISA (a namespace) and MLX_DEFORM_VECTOR_BYTES.
// Everything here has internal linkage or lives in that namespace.

#include "mlx_ops/cpu/corners.h"
#include "mlx_ops/cpu/lanes.h"
#include "mlx_ops/multi_scale_deformable_attention/cpu_kernels.h"
#include "mlx_ops/sampling.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// Some samples of one head on one level: the same points of queries that follow
// one another, query by query.
struct SampleBlock {
  int n;
  int m;
  int level;
  int query_begin;
  int queries;
  int point_begin;
  int points; // of each query

  int count() const {
    return queries * points;
  }
};

static inline int
points_of(const MsdaParams& p, const MsdaLevel* levels, int level) {
  const int end = level + 1 < p.L ? levels[level + 1].first : p.K;
  return end - levels[level].first;
}

// Calls f(block) for blocks of at most `most` samples that cover the queries.
template <typename F>
static inline void for_blocks(
    int most,
    SampleBlock block, // all of the queries; points aside
    int points,
    const F& f) {
  const int query_end = block.query_begin + block.queries;
  block.points = points < most ? points : most;
  block.queries = most / block.points;
  for (; block.query_begin < query_end; block.query_begin += block.queries) {
    const int left = query_end - block.query_begin;
    if (left < block.queries) {
      block.queries = left;
    }
    // More than one step only where a single query has more than `most`.
    for (int k = 0; k < points; k += most) {
      SampleBlock part = block;
      part.point_begin = k;
      part.points = points - k < block.points ? points - k : block.points;
      f(part);
    }
  }
}

// Where the samples of a block lie, side by side for the compiler to vectorise.
template <typename R>
struct Plan {
  static constexpr int most = 64;
  static constexpr int all_corners = 0xf; // bit i: corner i lies in the map
  static constexpr int live_bit = 0x10; // else value and slopes are 0
  // The weight is not finite, or the place is NaN: corners whose own weight is
  // 0, and samples beyond the map, count too.
  static constexpr int special_bit = 0x20;

  R x[most], y[most]; // in pixels
  R weight[most];
  int row[most]; // the upper left corner's pixel on the level, maybe off it
  R ly[most], lx[most]; // position inside the cell; NaN where a coordinate is
  R corner[4][most]; // the corners' weights
  int flags[most];

  // Whole vectors are computed; what lies beyond `count` is of no account.
  static int whole(int count) {
    return (count + 15) / 16 * 16;
  }

  void load(
      const MsdaParams& p,
      const MsdaLevel& level,
      const SampleBlock& block,
      const R* locations,
      const R* weights) {
    int64_t at =
        ((int64_t(block.n) * p.Q + block.query_begin) * p.M + block.m) * p.K +
        level.first + block.point_begin;
    int i = 0;
    for (int q = 0; q < block.queries; ++q) {
      for (int k = 0; k < block.points; ++k, ++i) {
        x[i] = locations[2 * (at + k)];
        y[i] = locations[2 * (at + k) + 1];
        weight[i] = weights[at + k];
      }
      at += int64_t(p.M) * p.K;
    }
    for (; i < whole(block.count()); ++i) {
      x[i] = y[i] = weight[i] = R(0);
    }
  }

  // Locations become pixels: x * W + shift, rounded after each operation on
  // every machine, also where one instruction does both; a discrete sample
  // would jump.
  void scale(const MsdaLevel& level, R shift, int count) {
    for (int i = 0; i < whole(count); ++i) {
      x[i] *= R(level.W);
      y[i] *= R(level.H);
    }
    __asm__ volatile("" ::: "memory");
    for (int i = 0; i < whole(count); ++i) {
      x[i] += shift;
      y[i] += shift;
    }
  }

  static int special(R weight, bool nan) {
    return int(nan || !(weight - weight == R(0))) * special_bit;
  }

  void locate_bilinear(const MsdaLevel& level, int count) {
    scale(level, R(-0.5), count);
    for (int i = 0; i < whole(count); ++i) {
      const BilinearCell<R> cell =
          bilinear_cell<R>(y[i], x[i], level.H, level.W);
      row[i] = cell.y * level.W + cell.x;
      // A NaN position makes value and slopes NaN by itself.
      const R nan_or_0 = cell.nan ? R(__builtin_nan("")) : R(0);
      ly[i] = cell.ly + nan_or_0;
      lx[i] = cell.lx + nan_or_0;
      flags[i] = int(cell.corner[0]) | int(cell.corner[1]) << 1 |
          int(cell.corner[2]) << 2 | int(cell.corner[3]) << 3 |
          int(cell.inside || cell.nan) * live_bit |
          special(weight[i], cell.nan);
    }
    for (int i = 0; i < whole(count); ++i) {
      BilinearCell<R> cell{};
      cell.ly = ly[i];
      cell.lx = lx[i];
      const CornerWeights<R> w = value_weights(cell);
      for (int c = 0; c < 4; ++c) {
        corner[c][i] = w.w[c];
      }
    }
  }

  // The one pixel counts as a cell's first corner, at its very place.
  void locate_discrete(const MsdaLevel& level, int count) {
    scale(level, R(0.5), count);
    const auto index = [](R place, int size) {
      // Clamped before a conversion that a huge coordinate would overflow; also
      // after it, for sizes that R doesn't hold.
      const R last = R(size - 1);
      const R at = place > R(0) ? (place < last ? place : last) : R(0);
      return int(at) < size - 1 ? int(at) : size - 1;
    };
    for (int i = 0; i < whole(count); ++i) {
      const bool nan = !(y[i] == y[i]) || !(x[i] == x[i]);
      row[i] = index(y[i], level.H) * level.W + index(x[i], level.W);
      const R nan_or_0 = nan ? R(__builtin_nan("")) : R(0);
      ly[i] = lx[i] = nan_or_0;
      corner[0][i] = R(1) + nan_or_0;
      corner[1][i] = corner[2][i] = corner[3][i] = R(0);
      flags[i] = int(!nan) | live_bit | special(weight[i], nan);
    }
  }

  void make(
      const MsdaParams& p,
      const MsdaLevel& level,
      const SampleBlock& block,
      const R* locations,
      const R* weights) {
    load(p, level, block, locations, weights);
    if (p.is_discrete) {
      locate_discrete(level, block.count());
    } else {
      locate_bilinear(level, block.count());
    }
  }
};

// A level as one head sees it: where pixels and corners lie, in elements.
struct HeadMap {
  int64_t start;
  int64_t pixel;
  int64_t step[4]; // to the corners from the upper left one

  HeadMap(const MsdaParams& p, const MsdaLevel& level, int n, int m)
      : start(((int64_t(n) * p.S + level.start) * p.M + m) * p.D),
        pixel(int64_t(p.M) * p.D),
        step{0, pixel, level.W * pixel, level.W * pixel + pixel} {}

  int64_t at(int row) const {
    return start + row * pixel;
  }
};

// The samples [begin, end) of a plan at the channels of n neighbouring lanes,
// added to `sums`.
template <int n, typename Lanes, typename T, typename R>
static inline void gather_lanes(
    Lanes lanes,
    const Plan<R>& plan,
    int begin,
    int end,
    const HeadMap& map,
    const T* value,
    R* sums) {
  constexpr int width = VectorOf<R>::width;
  using Value = typename Lanes::Value;
  Value sum[n];
  for (int v = 0; v < n; ++v) {
    sum[v] = lanes.load_from(sums + v * width);
  }
  for (int i = begin; i < end; ++i) {
    const int flags = plan.flags[i];
    const int64_t at = map.at(plan.row[i]);
    const R weight = plan.weight[i];
    if (flags == (Plan<R>::all_corners | Plan<R>::live_bit)) {
      const T* p0 = value + at;
      const T *p1 = p0 + map.step[1], *p2 = p0 + map.step[2];
      const T* p3 = p0 + map.step[3];
      const R w0 = weight * plan.corner[0][i], w1 = weight * plan.corner[1][i];
      const R w2 = weight * plan.corner[2][i], w3 = weight * plan.corner[3][i];
      for (int v = 0; v < n; ++v) {
        const int q = v * width;
        sum[v] += w0 * lanes.load_from(p0 + q) + w1 * lanes.load_from(p1 + q) +
            w2 * lanes.load_from(p2 + q) + w3 * lanes.load_from(p3 + q);
      }
    } else if (flags & Plan<R>::special_bit) {
      // A weight of infinity must not meet a corner's weight of 0.
      Value own[n];
      for (int v = 0; v < n; ++v) {
        own[v] = Value{} + (plan.ly[i] - plan.ly[i]) +
            (plan.lx[i] - plan.lx[i]); // 0 or NaN
      }
      for (int c = 0; c < 4; ++c) {
        if (flags >> c & 1) {
          const T* from = value + (at + map.step[c]);
          for (int v = 0; v < n; ++v) {
            own[v] += plan.corner[c][i] * lanes.load_from(from + v * width);
          }
        }
      }
      for (int v = 0; v < n; ++v) {
        sum[v] += weight * own[v];
      }
    } else {
      for (int c = 0; c < 4; ++c) {
        if (flags >> c & 1) {
          const T* from = value + (at + map.step[c]);
          const R w = weight * plan.corner[c][i];
          for (int v = 0; v < n; ++v) {
            sum[v] += w * lanes.load_from(from + v * width);
          }
        }
      }
    }
  }
  for (int v = 0; v < n; ++v) {
    lanes.store_to(sums + v * width, sum[v]);
  }
}

template <typename T, typename R>
static inline void gather(
    const Plan<R>& plan,
    int begin,
    int end,
    const HeadMap& map,
    const T* value,
    int channels,
    R* sums) {
  constexpr int width = VectorOf<R>::width;
  int c = 0;
  const auto take = [&]<int n>() {
    gather_lanes<n>(Whole<R>{}, plan, begin, end, map, value + c, sums + c);
    c += n * width;
  };
  while (c + 8 * width <= channels) {
    take.template operator()<8>();
  }
  if (c + 4 * width <= channels) {
    take.template operator()<4>();
  }
  if (c + 2 * width <= channels) {
    take.template operator()<2>();
  }
  if (c + width <= channels) {
    take.template operator()<1>();
  }
  for_last_lanes<R>(c, channels, [&](auto lanes, int i) {
    gather_lanes<1>(lanes, plan, begin, end, map, value + i, sums + i);
  });
}

template <typename T, typename R>
void forward(
    const MsdaParams& p,
    const MsdaLevel* levels,
    int n,
    int query_begin,
    int query_end,
    const T* value,
    const R* locations,
    const R* weights,
    R* sums,
    T* out) {
  Plan<R> plan;
  const int queries = query_end - query_begin;
  for (int m = 0; m < p.M; ++m) {
    for (int64_t i = 0; i < int64_t(queries) * p.D; ++i) {
      sums[i] = R(0);
    }
    for (int l = 0; l < p.L; ++l) {
      const HeadMap map(p, levels[l], n, m);
      for_blocks(
          Plan<R>::most,
          {n, m, l, query_begin, queries, 0, 0},
          points_of(p, levels, l),
          [&](const SampleBlock& block) {
            plan.make(p, levels[l], block, locations, weights);
            for (int q = 0; q < block.queries; ++q) {
              gather(
                  plan,
                  q * block.points,
                  (q + 1) * block.points,
                  map,
                  value,
                  p.D,
                  sums + int64_t(block.query_begin - query_begin + q) * p.D);
            }
          });
    }
    T* to = out + ((int64_t(n) * p.Q + query_begin) * p.M + m) * p.D;
    for (int q = 0; q < queries; ++q, to += int64_t(p.M) * p.D) {
      const R* from = sums + int64_t(q) * p.D;
      for_lanes<R>(p.D, [&](auto lanes, int c) {
        lanes.store_to(to + c, lanes.load_from(from + c));
      });
    }
  }
}

// The cotangent times each corner of a sample, summed over the channels; 0 for
// corners off the map. Value and both slopes are combinations of these four.
template <typename T, typename R>
static inline void corner_dots(
    int flags,
    int64_t at,
    const HeadMap& map,
    const T* value,
    const T* cotangent, // [D]
    int channels,
    R (&dots)[4]) {
  const bool all = (flags & Plan<R>::all_corners) == Plan<R>::all_corners;
  const T* from[4];
  for (int c = 0; c < 4; ++c) {
    // The cotangent stands in for corners that may not be read.
    from[c] = all || flags >> c & 1 ? value + (at + map.step[c]) : cotangent;
  }
  corner_sums(from, cotangent, channels, dots);
  if (!all) {
    for (int c = 0; c < 4; ++c) {
      dots[c] = flags >> c & 1 ? dots[c] : R(0);
    }
  }
}

// Adds the cotangent, weighted, to the corners of a sample.
template <typename T, typename R>
static inline void scatter(
    const Plan<R>& plan,
    int i,
    const HeadMap& map,
    const T* cotangent, // [D]
    int channels,
    R* grad_value) {
  const int flags = plan.flags[i];
  const int64_t at = map.at(plan.row[i]);
  R w[4];
  for (int c = 0; c < 4; ++c) {
    w[c] = plan.weight[i] * plan.corner[c][i];
  }
  if ((flags & Plan<R>::all_corners) == Plan<R>::all_corners) {
    R* first = grad_value + at;
    add_to_corners(
        cotangent,
        channels,
        w,
        {first, first + map.step[1], first + map.step[2], first + map.step[3]});
    return;
  }
  for (int c = 0; c < 4; ++c) {
    if (flags >> c & 1) {
      R* to = grad_value + (at + map.step[c]);
      for_lanes<R>(channels, [&](auto lanes, int q) {
        lanes.store_to(
            to + q,
            lanes.load_from(to + q) + w[c] * lanes.load_from(cotangent + q));
      });
    }
  }
}

// What the dots of a block's samples say about its locations and weights.
template <typename R>
struct SampleGradients {
  R dots[4][Plan<R>::most];
  R x[Plan<R>::most], y[Plan<R>::most];
  R weight[Plan<R>::most];

  void combine(
      const MsdaParams& p,
      const MsdaLevel& level,
      const Plan<R>& plan,
      int count) {
    const int slope_bit = p.is_discrete ? 0 : Plan<R>::live_bit;
    for (int i = 0; i < Plan<R>::whole(count); ++i) {
      const auto sum = [&](CornerWeights<R> w) {
        return w.w[0] * dots[0][i] + w.w[1] * dots[1][i] + w.w[2] * dots[2][i] +
            w.w[3] * dots[3][i];
      };
      BilinearCell<R> cell{};
      cell.ly = plan.ly[i];
      cell.lx = plan.lx[i];
      const bool live = plan.flags[i] & Plan<R>::live_bit;
      const R scale = plan.weight[i];
      weight[i] = live ? sum(value_weights(cell)) : R(0);
      const bool sloped = plan.flags[i] & slope_bit;
      x[i] = sloped ? scale * R(level.W) * sum(slope_weights_x(cell)) : R(0);
      y[i] = sloped ? scale * R(level.H) * sum(slope_weights_y(cell)) : R(0);
    }
  }

  void store_to(
      const MsdaParams& p,
      const MsdaLevel& level,
      const SampleBlock& block,
      R* grad_locations,
      R* grad_weights) const {
    int64_t at =
        ((int64_t(block.n) * p.Q + block.query_begin) * p.M + block.m) * p.K +
        level.first + block.point_begin;
    int i = 0;
    for (int q = 0; q < block.queries; ++q) {
      for (int k = 0; k < block.points; ++k, ++i) {
        if (grad_locations) {
          grad_locations[2 * (at + k)] = x[i];
          grad_locations[2 * (at + k) + 1] = y[i];
        }
        if (grad_weights) {
          grad_weights[at + k] = weight[i];
        }
      }
      at += int64_t(p.M) * p.K;
    }
  }
};

template <typename T, typename R>
void backward(
    const MsdaParams& p,
    const MsdaLevel* levels,
    int n,
    int head_begin,
    int head_end,
    int level,
    int query_begin,
    int query_end,
    const T* value,
    const R* locations,
    const R* weights,
    const T* cotangent,
    R* grad_value,
    R* grad_locations,
    R* grad_weights) {
  Plan<R> plan;
  SampleGradients<R> gradients;
  const int64_t query = int64_t(p.M) * p.D;
  const auto take = [&](const SampleBlock& block) {
    const HeadMap map(p, levels[level], n, block.m);
    plan.make(p, levels[level], block, locations, weights);
    const T* first = cotangent +
        (int64_t(n) * p.Q + block.query_begin) * query + int64_t(block.m) * p.D;
    if (grad_locations || grad_weights) {
      for (int i = 0, q = 0; q < block.queries; ++q) {
        for (int k = 0; k < block.points; ++k, ++i) {
          R dots[4];
          corner_dots(
              plan.flags[i],
              map.at(plan.row[i]),
              map,
              value,
              first + q * query,
              p.D,
              dots);
          for (int c = 0; c < 4; ++c) {
            gradients.dots[c][i] = dots[c];
          }
        }
      }
      gradients.combine(p, levels[level], plan, block.count());
      gradients.store_to(p, levels[level], block, grad_locations, grad_weights);
    }
    if (grad_value) {
      for (int i = 0, q = 0; q < block.queries; ++q) {
        for (int k = 0; k < block.points; ++k, ++i) {
          scatter(plan, i, map, first + q * query, p.D, grad_value);
        }
      }
    }
  };
  // Heads of a pixel lie side by side: a few queries at a time for all of them.
  for_blocks(
      Plan<R>::most,
      {n, head_begin, level, query_begin, query_end - query_begin, 0, 0},
      points_of(p, levels, level),
      [&](SampleBlock block) {
        for (block.m = head_begin; block.m < head_end; ++block.m) {
          take(block);
        }
      });
}

template <typename T, typename R>
constexpr MsdaKernels<T, R> table{forward<T, R>, backward<T, R>};

} // namespace

extern const MsdaKernels<float, float> msda_float32;
extern const MsdaKernels<double, double> msda_float64;
extern const MsdaKernels<Float16, float> msda_float16;
extern const MsdaKernels<BFloat16, float> msda_bfloat16;

const MsdaKernels<float, float> msda_float32 = table<float, float>;
const MsdaKernels<double, double> msda_float64 = table<double, double>;
const MsdaKernels<Float16, float> msda_float16 = table<Float16, float>;
const MsdaKernels<BFloat16, float> msda_bfloat16 = table<BFloat16, float>;

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
