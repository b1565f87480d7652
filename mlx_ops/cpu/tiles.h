// How the CPU backend cuts a convolution into tiles that stay in cache. Tile
// sizes follow from the problem alone, never from the number of threads, so
// that results do too.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "mlx/array.h"
#include "mlx_ops/cpu/thread_pool.h"
#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/types.h"
#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform::cpu {

// Columns of one block; with tile_pixels rows they take 512 KB in float32.
constexpr int64_t block_width = 512;
constexpr int64_t tile_pixels = 256;
// Parts of a group's channels are whole cache lines, and groups of fewer
// channels than this are sampled together.
constexpr int channel_step = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// What sampling reads.
template <typename T, typename R>
struct Source {
  DeformConv2dParams params;
  const T* input;
  const R* offset;
  const R* mask; // or null
  std::vector<T> zeros; // read in place of corners outside the image
  const TileKernels<T, R>& kernels;

  Source(
      const DeformConv2dParams& p,
      const mx::array& input,
      const mx::array& offset,
      const mx::array* mask)
      : params(p),
        input(input.data<T>()),
        offset(offset.data<R>()),
        mask(mask ? mask->data<R>() : nullptr),
        zeros(p.C, T{}),
        kernels(tile_kernels<T, R>(p.C / p.DG)) {}

  int taps() const {
    return params.kH * params.kW;
  }
  int64_t pixels() const {
    return params.pixel_end - params.pixel_begin;
  }

  // Operations of the sampling and of a product with a weight: what a pass
  // takes at the least.
  int64_t work() const {
    const int64_t columns = pixels() * taps() * params.C;
    return columns * (8 + 2 * int64_t(params.O) / params.G);
  }

  GroupRange groups(const Block& block) const {
    return offset_groups(params, block.channel_begin, block.channel_end);
  }

  void plan(const Block& block, SampleBlock<R>* samples) const {
    kernels.plan(params, block, offset, mask, samples);
  }

  // In the worker's memory, until its next plan.
  const SampleBlock<R>* plan(const Block& block, Worker& worker) const {
    auto* samples = worker.samples.get<SampleBlock<R>>(SampleBlock<R>::blocks(
        block.pixels() * block.taps() * groups(block).count()));
    plan(block, samples);
    return samples;
  }

  void sample(const Columns<R>& columns) const {
    kernels.sample(params, input, zeros.data(), columns);
  }
};

// A range of columns that one product takes: whole taps of whole weight groups,
// or a part of one group's channels at one tap.
struct ColumnRange {
  int tap_begin;
  int tap_end;
  int channel_begin;
  int channel_end;

  Block at(int64_t pixel_begin, int64_t pixel_end) const {
    return {
        pixel_begin, pixel_end, tap_begin, tap_end, channel_begin, channel_end};
  }
};

// All columns of some taps, about `width` at a time, group by group.
inline std::vector<ColumnRange> column_ranges(
    const DeformConv2dParams& p,
    int64_t width,
    int tap_begin,
    int tap_end) {
  const int taps = tap_end - tap_begin;
  const int group = p.C / p.G; // channels of a weight group
  // Groups of few channels are sampled together: vectors run along channels.
  const int together = group >= channel_step
      ? 1
      : std::min<int>(p.G, ceil_div(4 * channel_step, group));
  std::vector<ColumnRange> ranges;
  for (int g = 0; g < p.G; g += together) {
    const int begin = g * group;
    const int end = std::min(g + together, p.G) * group;
    if (end - begin > width) {
      const int step = static_cast<int>(
          round_up(ceil_div(group, ceil_div(group, width)), channel_step));
      for (int k = tap_begin; k < tap_end; ++k) {
        for (int c = begin; c < end; c += step) {
          ranges.push_back({k, k + 1, c, std::min(c + step, end)});
        }
      }
    } else {
      const int64_t most = std::max<int64_t>(1, width / (end - begin));
      const int step = static_cast<int>(ceil_div(taps, ceil_div(taps, most)));
      for (int k = tap_begin; k < tap_end; k += step) {
        ranges.push_back({k, std::min(k + step, tap_end), begin, end});
      }
    }
  }
  return ranges;
}

inline std::vector<ColumnRange> column_ranges(
    const DeformConv2dParams& p,
    int64_t width) {
  return column_ranges(p, width, 0, p.kH * p.kW);
}

// Pixels of a tile that are enough for an efficient product, yet leave small
// maps a few tiles.
inline int64_t tile_pixels_most(int64_t pixels, int64_t most) {
  return std::clamp<int64_t>(round_up(ceil_div(pixels, 16), 16), 32, most);
}

// Pixels in tiles of about equal size: whole steps of what a product takes at
// once, but for the last, and so many tiles that usual numbers of cores end
// together.
class EvenTiles {
 public:
  EvenTiles(int64_t pixels, int64_t most, int64_t step)
      : pixels_(pixels), step_(step), steps_(ceil_div(pixels, step)) {
    const int64_t tiles = ceil_div(pixels, most);
    const int64_t even = tiles > 64 ? 16 : tiles > 16 ? 4 : tiles > 1 ? 2 : 1;
    count_ = std::min(steps_, round_up(tiles, even));
  }

  int64_t count() const {
    return count_;
  }
  // Of tile i, and where the one before ends.
  int64_t begin(int64_t i) const {
    return std::min(pixels_, i * steps_ / count_ * step_);
  }
  int64_t most_pixels() const {
    return count_ ? ceil_div(steps_, count_) * step_ : 0;
  }

 private:
  int64_t pixels_, step_, steps_, count_;
};

template <typename R>
void fill_zero(ThreadPool::Session& session, R* data, int64_t count) {
  constexpr int64_t piece = 1 << 16;
  session.run(ceil_div(count, piece), [&](int64_t i, Worker&) {
    std::fill(data + i * piece, data + std::min(count, (i + 1) * piece), R(0));
  });
}

} // namespace mlx_deform::cpu
