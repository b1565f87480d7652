#include "mlx_ops/deform_conv2d/chunks.h"

#include <algorithm>
#include <cmath>

#include "mlx_ops/deform_conv2d/plan_checks.h"
#include "mlx_ops/gpu/pieces.h"

namespace mlx_deform::gpu {

namespace {

// A thread's operations for its sample: two coordinates, floor and fraction
// (8), comparisons with the borders (12), and the weights (6).
constexpr double kSampleFlops = 26;
// And for one channel.
constexpr double kIm2colFlops = 4 * 2 + 1; // four corners, the mask
constexpr double kCol2imFlops = 1 + 4 * 2; // the mask, four shares, their sums
constexpr double kOffsetGradFlops = 4 * 2; // four sums

// Columns of a chunk below which a launch is too short to fill a GPU.
constexpr int64_t kSmallChunk = int64_t(8) << 20;

int64_t output_rows(const DeformConv2dParams& p) {
  return product({p.N, p.Ho});
}

} // namespace

double operations(const DeformConv2dParams& p, const Work& work) {
  const double pixels = double(chunk_pixels(p));
  const double samples = pixels * double(taps(p)) * p.DG;
  const double channels = pixels * double(taps(p)) * p.C;
  const double matmul = 2 * channels * (double(p.O) / p.G);
  const auto sampling = [&](double per_channel) {
    return samples * kSampleFlops + channels * per_channel;
  };
  double out = 0;
  if (work.output || work.grad_weight) {
    out += sampling(kIm2colFlops);
  }
  out += (work.output + work.grad_weight) * matmul;
  if (work.grad_input || work.grad_samples) {
    out += matmul;
  }
  if (work.grad_input) {
    out += sampling(kCol2imFlops);
    if (work.deterministic) {
      // Every image row's SIMD groups look at every sample of the image.
      out += samples * p.H * std::ceil(double(p.C) / p.DG / kSimdLanes) *
          kSampleFlops;
    }
  }
  if (work.grad_samples) {
    out += sampling(kOffsetGradFlops);
  }
  return out;
}

int piece_count(const DeformConv2dParams& params, const Work& work) {
  DeformConv2dParams p = params;
  p.pixel_begin = 0;
  p.pixel_end = all_pixels(p);
  return pieces_for(operations(p, work), output_rows(p));
}

PixelRange piece_pixels(const DeformConv2dParams& p, int index, int count) {
  const int64_t rows = output_rows(p);
  return {
      piece_begin(rows, index, count) * p.Wo,
      piece_begin(rows, index + 1, count) * p.Wo};
}

std::vector<PixelRange>
plan_chunks(const DeformConv2dParams& p, int64_t itemsize, int64_t budget) {
  if (itemsize < 1 || budget < 1) {
    refuse(
        "itemsize and budget must be positive; got ",
        itemsize,
        " and ",
        budget);
  }
  check(p);
  const int64_t pixels = chunk_pixels(p);
  const int64_t pixel_bytes = product({taps(p), p.C, itemsize});
  if (pixels == 0) {
    return {};
  }
  // A launch counts pixels along an axis of the grid.
  const int64_t fitting = std::clamp<int64_t>(
      budget / std::max<int64_t>(pixel_bytes, 1), 1, kMaxGrid);
  const bool whole_rows =
      p.Wo <= fitting && p.pixel_begin % p.Wo == 0 && p.pixel_end % p.Wo == 0;
  const int64_t unit = whole_rows ? p.Wo : 1;
  const int64_t units = pixels / unit;
  const int64_t count = ceil_div(units, fitting / unit);

  std::vector<PixelRange> out;
  int64_t begin = p.pixel_begin;
  for (int64_t i = 0; i < count; ++i) {
    // The first units % count chunks have one unit more.
    const int64_t end =
        begin + (units / count + (i < units % count ? 1 : 0)) * unit;
    out.push_back({begin, end});
    begin = end;
  }
  return out;
}

int64_t column_budget(int64_t default_megabytes) {
  const double megabytes =
      number_from("MLX_DEFORM_COLUMN_BUDGET_MB", double(default_megabytes));
  return std::max<int64_t>(int64_t(megabytes * (int64_t(1) << 20)), 1);
}

int64_t
chunk_budget(const DeformConv2dParams& p, int64_t itemsize, int64_t all) {
  const int64_t columns = product({chunk_pixels(p), taps(p), p.C, itemsize});
  const int64_t third = std::max(ceil_div(columns, 3), kSmallChunk);
  return std::max<int64_t>(std::min(all / 2, third), 1);
}

} // namespace mlx_deform::gpu
