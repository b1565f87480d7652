#include "mlx_ops/deform_conv2d/dispatch.h"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "mlx_ops/deform_conv2d/plan_checks.h"

namespace mlx_deform::gpu {

namespace {

constexpr int64_t kLineBytes = 128; // a cache line
constexpr int64_t kVectorsPerThread = 4; // that share a sample's arithmetic
// Of col2im: the channels of a thread, and the pixels that it walks over while
// there are enough threads.
constexpr int64_t kMostChannels = 4;
constexpr int64_t kLongestWalk = 8;

int64_t samples_per_pixel(const DeformConv2dParams& p) {
  return product({taps(p), p.DG});
}

// A vector must not straddle a weight group or an offset group, and must start
// at a multiple of its size in the input and in the columns.
bool vector_fits(
    int64_t width,
    const DeformConv2dParams& p,
    int64_t itemsize,
    const PlanOptions& options) {
  if (width == 1) {
    return true;
  }
  const int64_t bytes = width * itemsize;
  int64_t common = std::gcd(int64_t(p.C / p.G), int64_t(p.C / p.DG));
  common = std::gcd(common, std::gcd(p.column_pixel, p.column_tap));
  common = std::gcd(common, p.G > 1 ? p.column_group : 0);
  return bytes <= kVectorBytes && options.alignment % bytes == 0 &&
      common % width == 0;
}

int64_t vector_width_for(
    const DeformConv2dParams& p,
    int64_t itemsize,
    const PlanOptions& options) {
  if (options.vector_width != 0) {
    const int64_t width = options.vector_width;
    const bool known = width == 1 || width == 4 || width == 8;
    if (!known || !vector_fits(width, p, itemsize, options)) {
      refuse(
          "the vector width must be 1, 4 or 8 and fit the channels; got ",
          width);
    }
    return width;
  }
  for (int64_t width : {8, 4}) {
    if (vector_fits(width, p, itemsize, options)) {
      return width;
    }
  }
  return 1;
}

// Threads that share a sample with `vectors` vectors of `bytes` each: a thread
// takes up to four vectors, to share the sample's arithmetic among them, but
// neighbouring threads still cover a cache line where the channels fill one.
int64_t lanes_for(int64_t vectors, int64_t bytes) {
  const int64_t wanted =
      power_of_two_from(ceil_div(vectors, kVectorsPerThread));
  return std::clamp(
      wanted, std::min(kLineBytes / bytes, kSimdLanes), kSimdLanes);
}

// One row of threads a sample, all samples of a pixel side by side:
// neighbouring samples are neighbours in the columns and close in the image.
void set_sample_grid(
    Launch& launch,
    const DeformConv2dParams& p,
    int64_t lanes,
    int64_t pixels) {
  const int64_t samples = samples_per_pixel(p);
  launch.grid = {p.C == 0 ? 0 : lanes, samples, pixels};
  // Groups of equal size: of 9 samples, 8 a group at most, 5 and 4 and not 8
  // and 1.
  const int64_t rows =
      ceil_div(samples, ceil_div(samples, kGroupThreads / lanes));
  launch.group = {
      lanes,
      rows,
      std::clamp<int64_t>(
          kGroupThreads / (lanes * rows), 1, std::max<int64_t>(pixels, 1))};
  check_grid(launch);
}

// A kernel that reads the columns' cotangent, or makes it. The arrays that it
// is made of follow the params.
void add_cotangent(Launch& launch, bool direct, int place) {
  launch.constants.push_back(flag("is_direct", 7, direct));
  launch.constants.push_back(flag("has_columns", 8, !direct));
  if (direct) {
    const int next = launch.buffers.back().index + 1;
    launch.buffers.push_back({"cotangent", next, false});
    launch.buffers.push_back({"weight", next + 1, false});
  } else {
    const auto next = std::find_if(
        launch.buffers.begin(),
        launch.buffers.end(),
        [&](const Binding& binding) { return binding.index > place; });
    launch.buffers.insert(next, {"grad_columns", place, false});
  }
}

// `tasks` SIMD groups in whole threadgroups of up to eight.
int64_t group_threads_for(int64_t tasks) {
  return std::min(kGroupThreads, kSimdLanes * power_of_two_from(tasks));
}

} // namespace

Launch plan_im2col(
    const DeformConv2dParams& p,
    const std::string& dtype,
    const PlanOptions& options) {
  check(p);
  const int64_t itemsize = itemsize_of(dtype);
  const int64_t width = vector_width_for(p, itemsize, options);
  const int64_t vectors = p.C / p.DG / width;

  Launch out;
  out.library = {dtype, index_bits_for(largest_array(p), options)};
  out.vector_width = int(width);
  name_kernel(out, "deform_im2col", width);
  out.constants = {flag("has_mask", 0, p.has_mask)};
  out.buffers = {{"input", 0, false}, {"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  out.buffers.push_back({"columns", 3, true});
  out.buffers.push_back({"params", 4, false});
  const int64_t lanes = lanes_for(vectors, width * itemsize);
  set_sample_grid(
      out, p, std::clamp<int64_t>(vectors, 1, lanes), chunk_pixels(p));
  return out;
}

Launch plan_col2im(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool deterministic,
    bool direct,
    const PlanOptions& options) {
  check(p);
  itemsize_of(dtype);
  const int64_t channels = p.C / p.DG;
  const int64_t lanes = std::clamp<int64_t>(channels, 1, kSimdLanes);
  Launch out;
  out.library = {dtype, index_bits_for(largest_array(p), options)};
  // Sums and wide positions together would take too many registers.
  const int64_t most =
      out.library.index_bits == 64 ? kMostChannels / 2 : kMostChannels;
  const int64_t width = options.vector_width != 0
      ? options.vector_width
      : std::min(power_of_two_from(ceil_div(channels, lanes)), most);
  const bool known = width == 1 || width == 2 || width == most;
  if (!known || (deterministic && options.vector_width > 1)) {
    refuse(
        "a thread of col2im takes 1, 2 or, with 32-bit positions, 4 channels, "
        "and 1 of the deterministic one; got a vector width of ",
        options.vector_width);
  }

  if (deterministic) {
    name_kernel(out, "deform_col2im_ordered");
  } else {
    out.vector_width = int(width);
    name_kernel(out, "deform_col2im", width);
  }
  out.constants = {flag("has_mask", 0, p.has_mask)};
  out.buffers = {{"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  out.buffers.push_back({"grad_input", 3, true});
  out.buffers.push_back({"params", 4, false});
  add_cotangent(out, direct, 0);

  if (!deterministic) {
    // The longer a thread's walk, the more corners it carries along.
    const int64_t row = ceil_div(channels, lanes * width) * lanes;
    const int64_t pixels = chunk_pixels(p);
    const int64_t threads = product({row, samples_per_pixel(p)});
    int64_t walk = kLongestWalk;
    while (walk > 1 &&
           product({threads, ceil_div(pixels, walk)}) < kBusyThreads) {
      walk /= 2;
    }
    out.constants.push_back({"pixels_per_thread", 10, false, int(walk)});
    set_sample_grid(out, p, lanes, ceil_div(pixels, walk));
    out.grid[0] = row;
    check_grid(out);
    return out;
  }
  // A SIMD group for every 32 channels of an offset group and every image row.
  const int64_t tasks = product({p.DG, ceil_div(channels, kSimdLanes)});
  const int64_t threads = group_threads_for(tasks);
  const int64_t rows = chunk_pixels(p) == 0 ? 0 : product({p.N, p.H});
  out.group = {threads, 1, 1};
  out.grid = {ceil_div(tasks * kSimdLanes, threads) * threads, rows, 1};
  check_grid(out);
  return out;
}

Launch plan_offset_grad(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool wants_offset,
    bool wants_mask,
    bool direct,
    const PlanOptions& options) {
  check(p);
  if (wants_mask && !p.has_mask) {
    refuse("grad_mask must not be asked for without a mask");
  }
  if (options.groups_per_row < 1) {
    refuse("groups_per_row must be at least 1; got ", options.groups_per_row);
  }
  const int64_t itemsize = itemsize_of(dtype);
  const int64_t width = vector_width_for(p, itemsize, options);
  const int64_t vectors = p.C / p.DG / width;
  const int64_t lanes = std::min(
      lanes_for(vectors, width * itemsize), power_of_two_from(vectors));

  const int64_t samples = product({chunk_pixels(p), samples_per_pixel(p)});
  const int64_t simd_groups = ceil_div(samples, kSimdLanes / lanes);
  const int64_t threads = group_threads_for(std::min(simd_groups, kSimdLanes));
  const int64_t groups = ceil_div(simd_groups, threads / kSimdLanes);
  const int64_t row = std::min(groups, options.groups_per_row);
  const int64_t rows = row == 0 ? 0 : ceil_div(groups, row);
  // Rows are filled up, so the samples' numbers run a little further.
  const int64_t slots = product({row, rows, threads / lanes});

  Launch out;
  out.library = {
      dtype, index_bits_for(std::max(largest_array(p), slots), options)};
  out.vector_width = int(width);
  name_kernel(out, "deform_offset_grad", width);
  out.constants = {
      flag("has_mask", 0, p.has_mask),
      flag("wants_offset", 1, wants_offset),
      flag("wants_mask", 2, wants_mask),
      {"segment_lanes", 3, false, int(lanes)}};
  out.buffers = {{"input", 0, false}, {"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  if (wants_offset) {
    out.buffers.push_back({"grad_offset", 4, true});
  }
  if (wants_mask) {
    out.buffers.push_back({"grad_mask", 5, true});
  }
  out.buffers.push_back({"params", 6, false});
  add_cotangent(out, direct, 3);
  out.group = {threads, 1, 1};
  if (wants_offset || wants_mask) {
    out.grid = {product({row, threads}), rows, 1};
  }
  check_grid(out);
  return out;
}

} // namespace mlx_deform::gpu
