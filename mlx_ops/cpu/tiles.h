// How the CPU backend cuts a convolution into tiles that stay in cache, and the
// gradient of the sampling that both ops share. Tile sizes follow from the
// problem alone, never from the number of threads, so that results do too.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
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
// Bytes of column cotangents (and their samples) between two passes.
constexpr int64_t chunk_bytes = 4 << 20;
constexpr int64_t chunk_tile_pixels = 64;
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
        kernels(tile_kernels<T, R>()) {}

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

  // The plan of the block's samples, in the worker's memory.
  const SampleBlock<R>* plan(const Block& block, Worker& worker) const {
    auto* samples = worker.samples.get<SampleBlock<R>>(SampleBlock<R>::blocks(
        block.pixels() * block.taps() * groups(block).count()));
    kernels.plan(params, block, offset, mask, samples);
    return samples;
  }

  // The block's columns, [pixels][taps][channels] with pixels pixel_stride
  // apart, in the worker's memory, with room behind them for one more row.
  R* sample(
      const Block& block,
      const SampleBlock<R>* samples,
      int64_t pixel_stride,
      Worker& worker) const {
    R* columns = worker.columns.get<R>((block.pixels() + 1) * pixel_stride);
    sample_to(block, samples, columns, pixel_stride, block.channels());
    return columns;
  }

  void sample_to(
      const Block& block,
      const SampleBlock<R>* samples,
      R* columns,
      int64_t pixel_stride,
      int64_t tap_stride) const {
    kernels.sample(
        params,
        block,
        samples,
        input,
        zeros.data(),
        columns,
        pixel_stride,
        tap_stride);
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

// All columns, about `width` at a time, group by group.
inline std::vector<ColumnRange> column_ranges(
    const DeformConv2dParams& p,
    int64_t width) {
  const int taps = p.kH * p.kW;
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
      for (int k = 0; k < taps; ++k) {
        for (int c = begin; c < end; c += step) {
          ranges.push_back({k, k + 1, c, std::min(c + step, end)});
        }
      }
    } else {
      const int64_t most = std::max<int64_t>(1, width / (end - begin));
      const int step = static_cast<int>(ceil_div(taps, ceil_div(taps, most)));
      for (int k = 0; k < taps; k += step) {
        ranges.push_back({k, std::min(k + step, taps), begin, end});
      }
    }
  }
  return ranges;
}

// Pixels of one tile: large enough for an efficient product, small enough that
// small maps still make a few tiles; all but the last are of one size, whole
// steps of what a product takes at once.
inline int64_t pixels_per_tile(int64_t pixels, int64_t most, int64_t step = 1) {
  most = std::clamp<int64_t>(round_up(ceil_div(pixels, 16), 16), 32, most);
  return pixels == 0 ? most
                     : round_up(ceil_div(pixels, ceil_div(pixels, most)), step);
}

template <typename R>
void fill_zero(ThreadPool::Session& session, R* data, int64_t count) {
  constexpr int64_t piece = 1 << 16;
  session.run(ceil_div(count, piece), [&](int64_t i, Worker&) {
    std::fill(data + i * piece, data + std::min(count, (i + 1) * piece), R(0));
  });
}

// Cuts the image's gradient into ranges that take about equally many of the
// samples: bounds [parts + 1], all at whole pixels. A few samples tell. Corners
// off the image are in the outer ranges.
template <typename R>
std::vector<int64_t> scatter_bounds(
    const SampleBlock<R>* samples,
    int64_t blocks,
    int parts) {
  constexpr int64_t looked_at_most = 512;
  std::vector<int64_t> places;
  const int64_t step = ceil_div(blocks, looked_at_most);
  for (int64_t i = 0; i < blocks; i += step) {
    const Sample<R> first(samples + i, 0);
    if (first.live()) {
      places.push_back(first.at());
    }
  }
  std::vector<int64_t> bounds{std::numeric_limits<int64_t>::min()};
  for (int i = 1; i < parts; ++i) {
    const auto cut = places.begin() + i * places.size() / parts;
    std::nth_element(places.begin(), cut, places.end());
    bounds.push_back(places.empty() ? bounds[0] : *cut);
  }
  bounds.push_back(std::numeric_limits<int64_t>::max());
  return bounds;
}

// The gradients of sampling, from the cotangent of the columns. Outputs may be
// null. `column_cotangent(block, columns, worker)` writes the cotangent of the
// block's columns, [pixels][taps][C]. Columns are taken chunk by chunk: workers
// first make a chunk's cotangents and reduce them to offset and mask, then add
// them to the image, each to a part of its own and in the order of pixels, so
// that nothing races and the sum doesn't depend on who computes it.
template <typename T, typename R, typename F>
void sampling_vjp(
    ThreadPool::Session& session,
    const Source<T, R>& source,
    const F& column_cotangent,
    int64_t pixel_step, // what column_cotangent takes at once
    R* grad_input,
    R* grad_offset,
    R* grad_mask) {
  const DeformConv2dParams& p = source.params;
  const int64_t size = int64_t(p.N) * p.H * p.W * p.C;
  if (grad_input) {
    fill_zero(session, grad_input, size);
  }
  const int most_taps =
      static_cast<int>(std::max<int64_t>(1, 2 * block_width / p.C));
  const int step = static_cast<int>(
      ceil_div(source.taps(), ceil_div(source.taps(), most_taps)));
  const int64_t pixel_bytes =
      step *
      (p.C * sizeof(R) +
       p.DG * sizeof(SampleBlock<R>) / SampleBlock<R>::size);
  const int64_t tile =
      pixels_per_tile(source.pixels(), chunk_tile_pixels, pixel_step);
  // Chunks of about one size: a short last one would leave workers idle.
  const int64_t most = std::max<int64_t>(tile, chunk_bytes / pixel_bytes);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(source.pixels(), most));
  const int64_t chunk = round_up(ceil_div(source.pixels(), chunks), tile);

  for (int64_t begin = 0; begin < source.pixels(); begin += chunk) {
    const int64_t end = std::min(begin + chunk, source.pixels());
    for (int k = 0; k < source.taps(); k += step) {
      const Block all{begin, end, k, std::min(k + step, source.taps()), 0, p.C};
      R* columns = session.shared_columns().get<R>(all.pixels() * all.width());
      // Each tile's plan begins with a block of its own.
      const int64_t tile_blocks =
          SampleBlock<R>::blocks(tile * all.taps() * p.DG);
      const int64_t tiles = ceil_div(all.pixels(), tile);
      auto* samples = session.shared_samples().get<SampleBlock<R>>(
          tiles * tile_blocks);
      const auto tile_at = [&](int64_t i) {
        Block block = all;
        block.pixel_begin = begin + i * tile;
        block.pixel_end = std::min(block.pixel_begin + tile, end);
        return block;
      };

      session.run(tiles, [&](int64_t i, Worker& worker) {
        const Block block = tile_at(i);
        R* grad = columns + i * tile * all.width();
        auto* plan = samples + i * tile_blocks;
        source.kernels.plan(p, block, source.offset, source.mask, plan);
        column_cotangent(block, grad, worker);
        if (grad_offset || grad_mask) {
          source.kernels.offset_grad(
              p,
              block,
              plan,
              source.input,
              source.zeros.data(),
              grad,
              grad_offset,
              grad_mask);
        }
      });

      if (grad_input) {
        const std::vector<int64_t> bounds =
            scatter_bounds(samples, tiles * tile_blocks, session.size());
        session.run(session.size(), [&](int64_t part, Worker& worker) {
          R* sink = worker.rows.get<R>(p.C / p.DG);
          for (int64_t i = 0; i < tiles; ++i) {
            source.kernels.scatter(
                p,
                tile_at(i),
                samples + i * tile_blocks,
                columns + i * tile * all.width(),
                bounds[part],
                bounds[part + 1],
                sink,
                grad_input);
          }
        });
      }
    }
  }
}

} // namespace mlx_deform::cpu
