// The plans of the products with the weight.

#include <algorithm>

#include "mlx_ops/deform_conv2d/dispatch.h"
#include "mlx_ops/deform_conv2d/plan_checks.h"

namespace mlx_deform::gpu {

namespace {

constexpr int64_t kTile = 64; // rows, and columns, of a threadgroup
constexpr int64_t kTileThreads = 128;
constexpr int64_t kProductVector = 4;
// Threadgroups that keep the largest GPU busy, and the least depth of a share:
// starting a tile and adding it up costs about as much as 64 of depth.
constexpr int64_t kBusyTiles = 256;
constexpr int64_t kLeastShare = 512;

int64_t outputs_of(const DeformConv2dParams& p) {
  return p.O / p.G;
}

int64_t width_of(const DeformConv2dParams& p) {
  return product({taps(p), p.C / p.G});
}

void check_product(const DeformConv2dParams& p) {
  check(p);
  check_outputs(p);
  if (p.column_pixel != width_of(p) || p.column_tap != p.C / p.G) {
    refuse("the columns of a product must lie as (G, pixels, kH * kW * C / G)");
  }
}

// rows x columns of the result, batched over the weight groups.
Launch plan_product(
    const char* stem,
    const DeformConv2dParams& p,
    const std::string& dtype,
    int64_t rows,
    int64_t columns,
    const PlanOptions& options) {
  const int64_t width = width_of(p);
  const int64_t bytes = kProductVector * itemsize_of(dtype);
  const bool fits = width % kProductVector == 0 &&
      outputs_of(p) % kProductVector == 0 &&
      (p.G == 1 || p.column_group % kProductVector == 0) &&
      options.alignment % bytes == 0;
  int64_t vector = options.vector_width;
  if (vector == 0) {
    vector = fits ? kProductVector : 1;
  } else if (vector != 1 && !(vector == kProductVector && fits)) {
    refuse("the vector width must be 1 or 4 and fit the sizes; got ", vector);
  }

  Launch out;
  const int64_t largest = std::max(
      {largest_array(p), product({all_pixels(p), p.O}), product({p.O, width})});
  out.library = {dtype, index_bits_for(largest, options)};
  out.vector_width = int(vector);
  name_kernel(out, stem, vector);
  out.group = {kTileThreads, 1, 1};
  out.grid = {
      product({ceil_div(columns, kTile), kTileThreads}),
      ceil_div(rows, kTile),
      p.G};
  return out;
}

} // namespace

Launch plan_output_product(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool has_bias,
    const PlanOptions& options) {
  check_product(p);
  Launch out = plan_product(
      "deform_output_product",
      p,
      dtype,
      chunk_pixels(p),
      outputs_of(p),
      options);
  out.constants = {flag("has_bias", 5, has_bias)};
  out.buffers = {{"columns", 0, false}, {"weight", 1, false}};
  if (has_bias) {
    out.buffers.push_back({"bias", 2, false});
  }
  out.buffers.push_back({"out", 3, true});
  out.buffers.push_back({"params", 4, false});
  check_grid(out);
  return out;
}

Launch plan_column_product(
    const DeformConv2dParams& p,
    const std::string& dtype,
    const PlanOptions& options) {
  check_product(p);
  Launch out = plan_product(
      "deform_column_product", p, dtype, chunk_pixels(p), width_of(p), options);
  out.buffers = {
      {"cotangent", 0, false},
      {"weight", 1, false},
      {"grad_columns", 2, true},
      {"params", 3, false}};
  check_grid(out);
  return out;
}

Launch plan_weight_product(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options) {
  check_product(p);
  Launch out = plan_product(
      "deform_weight_product", p, dtype, outputs_of(p), width_of(p), options);
  const int64_t tiles =
      product({out.grid[0] / kTileThreads, out.grid[1], out.grid[2]});
  // A power of two: each number is a pipeline of its own to be compiled.
  int64_t splits = 1;
  while (!deterministic && 2 * splits * tiles <= kBusyTiles &&
         2 * splits * kLeastShare <= chunk_pixels(p)) {
    splits *= 2;
  }
  out.constants = {{"depth_splits", 6, false, int(splits)}};
  out.buffers = {
      {"cotangent", 0, false},
      {"columns", 1, false},
      {"grad_weight", 2, true},
      {"params", 3, false}};
  out.grid[2] = product({out.grid[2], splits});
  if (chunk_pixels(p) == 0) {
    out.grid[0] = 0; // nothing to add
  }
  check_grid(out);
  return out;
}

} // namespace mlx_deform::gpu
