// The plan of samples: where their cells lie in memory, and the corners'
// weights. Of one instruction set, as tile_kernels_impl.h is.

#pragma once

#include "mlx_ops/cpu/tile_kernels.h"

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

  // n samples of one output pixel, no more than `most`, whose offsets and masks
  // lie side by side in memory.
  static constexpr int most = Positions<R>::most - SampleBlock<R>::size;
  void add(
      int n,
      int ho,
      int wo,
      const int* tap_rows,
      const int* tap_cols,
      int64_t image,
      const R* offset,
      const R* mask) {
    const DeformConv2dParams& p = params_;
    if (positions_.count + n > Positions<R>::most) {
      plan_whole_blocks();
    }
    R* to_y = positions_.y + positions_.count;
    R* to_x = positions_.x + positions_.count;
    R* to_mask = positions_.mask + positions_.count;
    int64_t* to_image = positions_.image + positions_.count;
    for (int i = 0; i < n; ++i) {
      to_y[i] = sample_coordinate<R>(
          ho, p.stride_h, p.pad_h, tap_rows[i], p.dilation_h, offset[2 * i]);
      to_x[i] = sample_coordinate<R>(
          wo,
          p.stride_w,
          p.pad_w,
          tap_cols[i],
          p.dilation_w,
          offset[2 * i + 1]);
      to_mask[i] = mask ? mask[i] : R(1);
      to_image[i] = image;
    }
    positions_.count += n;
  }

  // Plans what is left, and fills up the last block.
  void finish() {
    plan_whole_blocks();
    for (int i = positions_.count; i < SampleBlock<R>::size; ++i) {
      positions_.y[i] = positions_.x[i] = positions_.mask[i] = R(0);
      positions_.image[i] = 0;
    }
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
  Positions<R> positions_;
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
  int tap_rows[most], tap_cols[most];
  int listed = -1; // the first of those listed there
  const auto list_taps = [&](int first, int n) {
    for (int i = 0; i < n; ++i) {
      const int tap = block.tap_begin + (first + i) % block.taps();
      tap_rows[i] = tap / params.kW;
      tap_cols[i] = tap % params.kW;
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
    for (int run = 0; run < runs; ++run) {
      const int64_t at =
          (p * params.DG + groups.first + run) * taps + block.tap_begin;
      for (int i = 0; i < at_once; i += most) {
        const int n = at_once - i < most ? at_once - i : most;
        if (listed != i) {
          list_taps(i, n);
        }
        planner.add(
            n,
            ho,
            wo,
            tap_rows,
            tap_cols,
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

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
