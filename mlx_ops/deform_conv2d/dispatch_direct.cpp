// The plans of convolutions with small weight groups, which need no columns.

#include <algorithm>
#include <numeric>

#include "mlx_ops/deform_conv2d/dispatch.h"
#include "mlx_ops/deform_conv2d/plan_checks.h"

namespace mlx_deform::gpu {

namespace {

// A tile of the products is 64 by 64; a group that fills no quarter of its side
// leaves most of it idle.
constexpr int kDirectGroup = 16;
constexpr int64_t kLeastPixels = 64; // that a thread adds up

bool is_depthwise(const DeformConv2dParams& p) {
  return p.C == p.G;
}

int64_t width_for(
    const DeformConv2dParams& p,
    int64_t itemsize,
    const PlanOptions& options) {
  // A vector lies in one offset group and, but for depthwise ones, in one
  // weight group.
  const int64_t common =
      std::gcd(p.C / p.DG, is_depthwise(p) ? p.C : p.C / p.G);
  const auto fits = [&](int64_t width) {
    return width == 1 ||
        (common % width == 0 && width * itemsize <= kVectorBytes &&
         options.alignment % (width * itemsize) == 0);
  };
  for (int64_t width : {8, 4, 1}) {
    if (fits(width) &&
        (options.vector_width == 0 || options.vector_width == width)) {
      return width;
    }
  }
  refuse(
      "the vector width must be 1, 4 or 8 and fit the channels; got ",
      options.vector_width);
}

int64_t outputs_per_thread(const DeformConv2dParams& p) {
  const int64_t outputs = p.O / p.G;
  return is_depthwise(p) ? 1 : outputs % 4 == 0 ? 4 : outputs % 2 == 0 ? 2 : 1;
}

// What the two plans share; a thread's channels are out.vector_width.
Launch plan_direct(
    const char* what,
    const DeformConv2dParams& p,
    const std::string& dtype,
    const PlanOptions& options) {
  check(p);
  check_outputs(p);
  const int64_t width = width_for(p, itemsize_of(dtype), options);
  Launch out;
  out.library = {
      dtype,
      index_bits_for(
          std::max(
              {product({p.N, p.H, p.W, p.C}),
               product({2, all_pixels(p), taps(p), p.DG}),
               product({all_pixels(p), p.O})}),
          options)};
  out.vector_width = int(width);
  name_kernel(
      out,
      std::string(is_depthwise(p) ? "deform_depthwise_" : "deform_grouped_") +
          what,
      width);
  out.constants = {flag("has_mask", 0, p.has_mask)};
  if (!is_depthwise(p)) {
    out.constants.push_back(
        {"outputs_per_thread", 9, false, int(outputs_per_thread(p))});
  }
  out.buffers = {{"input", 0, false}, {"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  return out;
}

} // namespace

bool is_direct(const DeformConv2dParams& p) {
  return p.G > 1 && p.C / p.G <= kDirectGroup && p.O / p.G <= kDirectGroup;
}

Launch plan_direct_output(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool has_bias,
    const PlanOptions& options) {
  Launch out = plan_direct("output", p, dtype, options);
  out.constants.push_back(flag("has_bias", 5, has_bias));
  out.buffers.push_back({"weight", 3, false});
  if (has_bias) {
    out.buffers.push_back({"bias", 4, false});
  }
  out.buffers.push_back({"out", 5, true});
  out.buffers.push_back({"params", 6, false});
  const int64_t threads =
      is_depthwise(p) ? p.O / out.vector_width : p.O / outputs_per_thread(p);
  out.grid = {threads, chunk_pixels(p), 1};
  out.group = group_for(out.grid);
  check_grid(out);
  return out;
}

Launch plan_direct_weight(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options) {
  Launch out = plan_direct("weight", p, dtype, options);
  out.buffers.push_back({"cotangent", 3, false});
  out.buffers.push_back({"grad_weight", 4, true});
  out.buffers.push_back({"params", 5, false});
  const int64_t outputs = p.O / p.G;
  out.grid = is_depthwise(p)
      ? std::array<int64_t, 3>{p.O / out.vector_width, taps(p), 1}
      : std::array<int64_t, 3>{
            p.C / out.vector_width,
            product({taps(p), outputs / outputs_per_thread(p)}),
            1};
  // A power of two: each number is a pipeline of its own to be compiled.
  const int64_t pixels = chunk_pixels(p);
  int64_t share = power_of_two_from(std::max<int64_t>(pixels, 1));
  const int64_t threads = product({out.grid[0], out.grid[1]});
  while (!deterministic && share > kLeastPixels &&
         threads * ceil_div(pixels, share) < kBusyThreads) {
    share /= 2;
  }
  if (share > kMaxInt32) {
    refuse("a launch must have fewer than 2^31 pixels; got ", pixels);
  }
  out.constants.push_back({"pixels_per_thread", 10, false, int(share)});
  out.grid[2] = ceil_div(pixels, share);
  out.group = group_for(out.grid);
  check_grid(out);
  return out;
}

} // namespace mlx_deform::gpu
