#include "mlx_ops/deform_conv2d/plan_checks.h"

#include <algorithm>
#include <utility>

namespace mlx_deform::gpu {

void check(const DeformConv2dParams& p) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"N", p.N},
      {"H", p.H},
      {"W", p.W},
      {"C", p.C},
      {"Ho", p.Ho},
      {"Wo", p.Wo},
      {"column_group", p.column_group},
      {"column_pixel", p.column_pixel},
      {"column_tap", p.column_tap}};
  for (const auto& [name, value] : sizes) {
    if (value < 0) {
      refuse(name, " must not be negative; got ", value);
    }
  }
  const std::pair<const char*, int64_t> counts[] = {
      {"kH", p.kH}, {"kW", p.kW}, {"G", p.G}, {"DG", p.DG}};
  for (const auto& [name, value] : counts) {
    if (value < 1) {
      refuse(name, " must be at least 1; got ", value);
    }
  }
  if (p.C % p.G != 0 || p.C % p.DG != 0) {
    refuse("G and DG must divide C; got C ", p.C, ", G ", p.G, ", DG ", p.DG);
  }
  if (p.pixel_begin < 0 || p.pixel_begin > p.pixel_end ||
      p.pixel_end > all_pixels(p)) {
    refuse(
        "the pixels must lie in [0, ",
        all_pixels(p),
        "]; got [",
        p.pixel_begin,
        ", ",
        p.pixel_end,
        ")");
  }
}

void check_outputs(const DeformConv2dParams& p) {
  if (p.O < 0 || p.O % p.G != 0) {
    refuse("G must divide O; got O ", p.O, ", G ", p.G);
  }
}

int64_t largest_array(const DeformConv2dParams& p) {
  const int64_t columns = chunk_pixels(p) == 0
      ? 0
      : sum(
            {product({p.G - 1, p.column_group}),
             product({chunk_pixels(p) - 1, p.column_pixel}),
             product({taps(p) - 1, p.column_tap}),
             p.C / p.G});
  return std::max(
      {product({p.N, p.H, p.W, p.C}),
       product({2, all_pixels(p), taps(p), p.DG}),
       columns});
}

} // namespace mlx_deform::gpu
