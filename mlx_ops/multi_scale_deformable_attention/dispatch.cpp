#include "mlx_ops/multi_scale_deformable_attention/dispatch.h"

#include <algorithm>
#include <utility>

#include "mlx_ops/gpu/pieces.h"
#include "mlx_ops/gpu/plan_arithmetic.h"

namespace mlx_deform::gpu {

namespace {

// A thread's operations for its sample: two coordinates, floor and fraction
// (8), comparisons with the borders (12), and the weights (6).
constexpr double kSampleFlops = 26;
// And for one channel.
constexpr double kForwardFlops = 4 * 2 + 2; // four corners, the weight, the sum
constexpr double kGradValueFlops = 4 + 1; // four shares, the weight
// An atomic addition's time in operations: a guess on the safe side, for an M1
// makes it of compare and exchange.
constexpr double kAtomicFlops = 256;
constexpr double kGradSamplesFlops = 4 * 2; // four sums
constexpr int64_t kUsualVector = 4; // channels of a thread

// Threads that keep every GPU busy, and the rows that one walks at most.
constexpr int64_t kManyThreads = int64_t(1) << 18;
constexpr int kMostRows = 16;

int64_t all_rows(const MsdaParams& p) {
  return product({p.N, p.Q});
}

int64_t launch_rows(const MsdaParams& p) {
  return p.query_end - p.query_begin;
}

void check(const MsdaParams& p) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"N", p.N}, {"S", p.S}, {"Q", p.Q}, {"D", p.D}, {"K", p.K}};
  for (const auto& [name, value] : sizes) {
    if (value < 0) {
      refuse(name, " must not be negative; got ", value);
    }
  }
  const std::pair<const char*, int64_t> counts[] = {{"M", p.M}, {"L", p.L}};
  for (const auto& [name, value] : counts) {
    if (value < 1) {
      refuse(name, " must be at least 1; got ", value);
    }
  }
  // Kernels multiply these as int.
  if (product({p.M, p.D}) > kMaxInt32) {
    refuse("M * D must be below 2^31; got ", product({p.M, p.D}));
  }
  if (p.query_begin < 0 || p.query_begin > p.query_end ||
      p.query_end > all_rows(p)) {
    refuse(
        "the rows must lie in [0, ",
        all_rows(p),
        "]; got [",
        p.query_begin,
        ", ",
        p.query_end,
        ")");
  }
}

int64_t largest_array(const MsdaParams& p) {
  return std::max(
      {product({p.N, p.S, p.M, p.D}),
       product({all_rows(p), p.M, p.D}),
       product({all_rows(p), p.M, p.K, 2})});
}

// A vector must not straddle a head, and must start at a multiple of its size.
int64_t vector_width_for(
    const MsdaParams& p,
    int64_t itemsize,
    const PlanOptions& options) {
  for (int64_t width : {8, 4, 1}) {
    const int64_t bytes = width * itemsize;
    const bool fits = width == 1 ||
        (p.D % width == 0 && bytes <= kVectorBytes &&
         options.alignment % bytes == 0);
    if (fits && (options.vector_width == 0 || options.vector_width == width)) {
      return width;
    }
  }
  refuse(
      "the vector width must be 1, 4 or 8 and fit the channels; got ",
      options.vector_width);
}

// Whole threadgroups of up to 256, as far along x as it goes.
// As many as leave threads enough; each number is a pipeline of its own.
int rows_per_thread_for(const MsdaParams& p) {
  const int64_t all = product({launch_rows(p), p.M, p.D});
  int rows = 1;
  while (rows < kMostRows && all / (2 * rows) >= kManyThreads) {
    rows *= 2;
  }
  return rows;
}

FunctionConstant discrete_flag(const MsdaParams& p) {
  return flag("is_discrete", 20, p.is_discrete != 0);
}

// A positive number of the environment.
} // namespace

void check_levels(const MsdaParams& p, const std::vector<MsdaLevel>& levels) {
  if (int64_t(levels.size()) != p.L) {
    refuse("there must be L = ", p.L, " levels; got ", levels.size());
  }
  int64_t start = 0;
  int64_t first = 0;
  for (const MsdaLevel& level : levels) {
    if (level.H < 0 || level.W < 0) {
      refuse(
          "H and W of a level must not be negative; got ",
          level.H,
          " and ",
          level.W);
    }
    if (level.start != start) {
      refuse("a level must start at pixel ", start, "; got ", level.start);
    }
    const int64_t last = &level == levels.data() ? 0 : p.K;
    if (level.first < first || level.first > last) {
      refuse(
          "a level must have its first sample in [",
          first,
          ", ",
          last,
          "]; got ",
          level.first);
    }
    start = sum({start, product({level.H, level.W})});
    first = level.first;
  }
  if (start != p.S) {
    refuse("the levels must have S = ", p.S, " pixels; got ", start);
  }
}

Launch plan_msda_forward(
    const MsdaParams& p,
    const std::string& dtype,
    const PlanOptions& options) {
  check(p);
  const int64_t width = vector_width_for(p, itemsize_of(dtype), options);
  Launch out;
  out.library = {dtype, index_bits_for(largest_array(p), options)};
  out.vector_width = int(width);
  name_kernel(out, "msda_forward", width);
  out.constants = {discrete_flag(p)};
  out.buffers = {
      {"value", 0, false},
      {"locations", 1, false},
      {"weights", 2, false},
      {"levels", 3, false},
      {"out", 4, true},
      {"params", 5, false}};
  out.grid = {p.D / width, launch_rows(p), p.M};
  out.group = group_for(out.grid);
  check_grid(out);
  return out;
}

Launch plan_msda_grad_value(
    const MsdaParams& p,
    const std::string& dtype,
    bool deterministic,
    int64_t map_rows,
    const PlanOptions& options,
    int rows_per_thread) {
  check(p);
  itemsize_of(dtype);
  if (options.vector_width > 1) {
    refuse(
        "grad_value takes single channels; got a vector width of ",
        options.vector_width);
  }
  Launch out;
  out.library = {dtype, index_bits_for(largest_array(p), options)};
  name_kernel(
      out, deterministic ? "msda_grad_value_ordered" : "msda_grad_value");
  out.constants = {discrete_flag(p)};
  out.buffers = {
      {"cotangent", 0, false},
      {"locations", 1, false},
      {"weights", 2, false},
      {"levels", 3, false},
      {"grad_value", 4, true},
      {"params", 5, false}};
  if (!deterministic) {
    const int walked =
        rows_per_thread != 0 ? rows_per_thread : rows_per_thread_for(p);
    if (walked < 1 || walked > kMostRows || (walked & (walked - 1)) != 0) {
      refuse(
          "rows_per_thread must be a power of two up to ",
          kMostRows,
          "; got ",
          walked);
    }
    out.constants.push_back({"rows_per_thread", 23, false, walked});
    out.grid = {p.K == 0 ? 0 : p.D, p.M, ceil_div(launch_rows(p), walked)};
    out.group = group_for(out.grid);
    check_grid(out);
    return out;
  }
  // A SIMD group for every 32 channels of a head and every row of a map.
  const int64_t tasks = product({p.M, ceil_div(p.D, kSimdLanes)});
  const int64_t threads =
      std::min(kGroupThreads, kSimdLanes * power_of_two_from(tasks));
  const bool empty = launch_rows(p) == 0 || p.K == 0;
  out.group = {threads, 1, 1};
  out.grid = {
      ceil_div(tasks * kSimdLanes, threads) * threads,
      empty ? 0 : map_rows,
      p.N};
  check_grid(out);
  return out;
}

Launch plan_msda_grad_samples(
    const MsdaParams& p,
    const std::string& dtype,
    bool wants_locations,
    bool wants_weights,
    const PlanOptions& options) {
  check(p);
  if (options.groups_per_row < 1) {
    refuse("groups_per_row must be at least 1; got ", options.groups_per_row);
  }
  const int64_t width = vector_width_for(p, itemsize_of(dtype), options);
  // A lane for every vector, for the samples of a head are close in memory and
  // the cell's arithmetic is short.
  const int64_t lanes = std::min(kSimdLanes, power_of_two_from(p.D / width));
  const int64_t samples = product({launch_rows(p), p.K}); // of one head
  const int64_t simd_groups = ceil_div(samples, kSimdLanes / lanes);
  const int64_t threads = std::min(
      kGroupThreads,
      kSimdLanes * power_of_two_from(std::min(simd_groups, kSimdLanes)));
  const int64_t groups = ceil_div(simd_groups, threads / kSimdLanes);
  const int64_t row = std::min(groups, options.groups_per_row);
  const int64_t rows = row == 0 ? 0 : ceil_div(groups, row);
  // Rows are filled up, so the samples' numbers run a little further.
  const int64_t slots = product({row, rows, threads / lanes});

  Launch out;
  out.library = {
      dtype, index_bits_for(std::max(largest_array(p), slots), options)};
  out.vector_width = int(width);
  name_kernel(out, "msda_grad_samples", width);
  out.constants = {
      {"segment_lanes", 3, false, int(lanes)},
      discrete_flag(p),
      flag("wants_locations", 21, wants_locations),
      flag("wants_weights", 22, wants_weights)};
  out.buffers = {
      {"value", 0, false}, {"cotangent", 1, false}, {"locations", 2, false}};
  if (wants_locations) {
    out.buffers.push_back({"weights", 3, false});
  }
  out.buffers.push_back({"levels", 4, false});
  if (wants_locations) {
    out.buffers.push_back({"grad_locations", 5, true});
  }
  if (wants_weights) {
    out.buffers.push_back({"grad_weights", 6, true});
  }
  out.buffers.push_back({"params", 7, false});
  out.group = {threads, 1, 1};
  if (wants_locations || wants_weights) {
    out.grid = {product({row, threads}), rows, p.M};
  }
  check_grid(out);
  return out;
}

int64_t msda_map_rows(const std::vector<MsdaLevel>& levels) {
  int64_t out = 0;
  for (const MsdaLevel& level : levels) {
    out += level.H;
  }
  return out;
}

double
msda_operations(const MsdaParams& p, const MsdaWork& work, int64_t map_rows) {
  const double samples = double(launch_rows(p)) * p.M * p.K;
  const double vectors = double(ceil_div(p.D, kUsualVector));
  double out = 0;
  if (work.output) {
    out += samples * (vectors * kSampleFlops + p.D * kForwardFlops);
  }
  if (work.grad_value) {
    out += samples * p.D * kGradValueFlops;
    if (work.deterministic) {
      // Every map row's SIMD groups look at every sample of its level.
      const double simd_groups = double(ceil_div(p.D, kSimdLanes));
      out += samples * simd_groups * (double(map_rows) / p.L) * kSampleFlops;
      // Two rows take a sample up.
      out += samples * simd_groups * 2 * kSimdLanes * kSampleFlops;
    } else {
      out += samples * p.D * (kSampleFlops + 4 * kAtomicFlops);
    }
  }
  if (work.grad_samples) {
    out += samples * (vectors * kSampleFlops + p.D * kGradSamplesFlops);
  }
  return out;
}

int msda_piece_count(
    const MsdaParams& params,
    const MsdaWork& work,
    int64_t map_rows) {
  MsdaParams p = params;
  p.query_begin = 0;
  p.query_end = all_rows(p);
  return pieces_for(msda_operations(p, work, map_rows), all_rows(p));
}

MsdaParams msda_piece(const MsdaParams& params, int index, int count) {
  const int64_t rows = all_rows(params);
  MsdaParams p = params;
  p.query_begin = piece_begin(rows, index, count);
  p.query_end = piece_begin(rows, index + 1, count);
  return p;
}

} // namespace mlx_deform::gpu
