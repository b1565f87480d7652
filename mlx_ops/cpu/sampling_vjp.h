// The backward pass of the sampling, which deform_conv2d and deform_im2col
// share, chunk by chunk: a chunk's samples are planned once, for all gradients.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "mlx_ops/cpu/tiles.h"

namespace mlx_deform::cpu {

constexpr int64_t chunk_tile_pixels = 64;

// Bytes of column cotangents and samples between two passes: some tiles for
// every core. Not for every thread, whose number results must not depend on.
inline int64_t chunk_bytes() {
  constexpr int64_t least = 4 << 20, core = 512 << 10;
  return std::max(least, core * std::thread::hardware_concurrency());
}

// Some pixels at some taps, planned, and the cotangent of their columns.
template <typename R>
struct Chunk {
  Block block; // all channels
  EvenTiles tiles; // of pixels that are planned together
  int64_t tile_blocks; // of samples: each tile begins with one of its own
  SampleBlock<R>* samples; // or null, for planning where they are read
  R* cotangents; // [pixels][taps][C], or null

  Block tile_at(int64_t i) const {
    Block out = block;
    out.pixel_begin = block.pixel_begin + tiles.begin(i);
    out.pixel_end = block.pixel_begin + tiles.begin(i + 1);
    return out;
  }

  SampleBlock<R>* samples_of(int64_t i) const {
    return samples + i * tile_blocks;
  }

  R* cotangents_of(int64_t i) const {
    return cotangents + tiles.begin(i) * block.width();
  }
};

// The taps of a chunk: all of them where the channels are few.
inline int chunk_taps(const DeformConv2dParams& p) {
  const int taps = p.kH * p.kW;
  const int64_t most = std::max<int64_t>(1, 2 * block_width / p.C);
  return static_cast<int>(ceil_div(taps, ceil_div(taps, most)));
}

// What the sampling has gradients for; each may be null.
template <typename R>
struct SamplingGrads {
  R* input;
  R* offset;
  R* mask;

  bool any() const {
    return input || offset || mask;
  }
};

// A gradient that reads the chunks' samples besides those of the sampling:
// here none.
struct NoOtherGrad {
  template <typename R>
  int64_t tasks(const Chunk<R>&) {
    return 0;
  }
  template <typename R>
  void run(const Chunk<R>&, int64_t, Worker&) {}
};

// How many workers add to the image's gradient: where others have other tasks
// meanwhile, as few as keep up, since it stays in the caches of so few. Adding
// a column takes as long as a weight's gradient takes for 15 to 30 outputs.
inline int
scatter_parts(const DeformConv2dParams& p, int workers, int64_t other_tasks) {
  constexpr int outputs = 32;
  return other_tasks == 0
      ? workers
      : static_cast<int>(ceil_div(workers * outputs, outputs + p.O / p.G));
}

// Cuts the image's gradient into ranges that take about equally many of the
// samples: bounds [parts + 1], all at whole pixels. A few samples tell. Corners
// off the image are in the outer ranges.
template <typename R>
std::vector<int64_t>
scatter_bounds(const SampleBlock<R>* samples, int64_t blocks, int parts) {
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

// The gradients of sampling, from the cotangent of the columns.
// `column_cotangent(block, columns, worker)` writes the cotangent of the
// block's columns, [pixels][taps][C]; `other` has tasks of its own for each
// chunk. Workers first make a chunk's cotangents and reduce them to offset and
// mask, then add them to the image, each to a part of its own and in the order
// of pixels, so that nothing races and the sum doesn't depend on who computes
// it.
template <typename T, typename R, typename F, typename Other>
void sampling_vjp(
    ThreadPool::Session& session,
    const Source<T, R>& source,
    const F& column_cotangent,
    int64_t pixel_step, // what column_cotangent takes at once
    const SamplingGrads<R>& grads,
    Other& other) {
  const DeformConv2dParams& p = source.params;
  if (grads.input) {
    fill_zero(session, grads.input, int64_t(p.N) * p.H * p.W * p.C);
  }
  const int step = chunk_taps(p);
  const int64_t pixel_bytes = step *
      (p.C * sizeof(R) + p.DG * sizeof(SampleBlock<R>) / SampleBlock<R>::size);
  const int64_t tile = tile_pixels_most(source.pixels(), chunk_tile_pixels);
  // Chunks of about one size: a short last one would leave workers idle.
  const int64_t most = std::max<int64_t>(tile, chunk_bytes() / pixel_bytes);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(source.pixels(), most));
  const int64_t pixels =
      round_up(ceil_div(source.pixels(), chunks), pixel_step);

  for (int64_t begin = 0; begin < source.pixels(); begin += pixels) {
    const int64_t end = std::min(begin + pixels, source.pixels());
    const EvenTiles tiles(end - begin, tile, pixel_step);
    for (int k = 0; k < source.taps(); k += step) {
      Chunk<R> chunk{
          {begin, end, k, std::min(k + step, source.taps()), 0, p.C},
          tiles,
          SampleBlock<R>::blocks(
              tiles.most_pixels() * std::min(step, source.taps() - k) * p.DG),
          nullptr,
          nullptr};
      chunk.samples = session.shared_samples().get<SampleBlock<R>>(
          tiles.count() * chunk.tile_blocks);
      if (grads.any()) {
        chunk.cotangents = session.shared_columns().get<R>(
            chunk.block.pixels() * chunk.block.width());
      }

      session.run(tiles.count(), [&](int64_t i, Worker& worker) {
        const Block block = chunk.tile_at(i);
        source.plan(block, chunk.samples_of(i));
        if (!grads.any()) {
          return;
        }
        column_cotangent(block, chunk.cotangents_of(i), worker);
        if (grads.offset || grads.mask) {
          source.kernels.offset_grad(
              p,
              block,
              chunk.samples_of(i),
              source.input,
              source.zeros.data(),
              chunk.cotangents_of(i),
              grads.offset,
              grads.mask);
        }
      });

      const int64_t others = other.tasks(chunk);
      const int parts =
          grads.input ? scatter_parts(p, session.size(), others) : 0;
      const std::vector<int64_t> bounds = scatter_bounds(
          chunk.samples, tiles.count() * chunk.tile_blocks, parts);
      session.run(parts + others, [&](int64_t task, Worker& worker) {
        if (task >= parts) {
          other.run(chunk, task - parts, worker);
          return;
        }
        R* sink = worker.rows.get<R>(p.C / p.DG);
        for (int64_t i = 0; i < tiles.count(); ++i) {
          source.kernels.scatter(
              p,
              chunk.tile_at(i),
              chunk.samples_of(i),
              chunk.cotangents_of(i),
              bounds[task],
              bounds[task + 1],
              sink,
              grads.input);
        }
      });
    }
  }
}

} // namespace mlx_deform::cpu
