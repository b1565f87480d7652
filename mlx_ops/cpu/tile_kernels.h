// The vector loops of the CPU backend, compiled once per instruction set
// (tile_kernels_*.cpp) and chosen at run time. This header is read by all of
// them, so it holds plain declarations only: an inline function of the standard
// library compiled for one machine must not end up in another's code.

#pragma once

#include <stdint.h>

#include "mlx_ops/cpu/products.h"
#include "mlx_ops/deform_conv2d/params.h"
#include "mlx_ops/sampling.h"

namespace mlx_deform::cpu {

// Storage types of half precision, as raw bits.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The plan of some samples, side by side; each is shared by all channels of its
// offset group.
template <typename R>
struct SampleBlock {
  static constexpr int size = 16;

  int64_t
      at[size]; // element offset of the upper left corner, maybe off the image
  R w[4][size]; // weights of the corners' values, times a finite mask
  R ly[size]; // position inside the cell; NaN where a coordinate is
  R lx[size];
  R mask[size]; // 1 where there is no mask
  int flags[size]; // bit i: corner i lies in the image; and those below

  static constexpr int corner_bits = 0xf;
  // Else value and slopes are 0.
  static constexpr int live_bit = 0x10;
  // Set where the mask is infinite or NaN: a weight of 0 would become NaN, so
  // such a mask is no part of the weights.
  static constexpr int mask_apart_bit = 0x20;

  static constexpr int64_t blocks(int64_t samples) {
    return (samples + size - 1) / size;
  }
};

// One of them, and by advance() those that follow.
template <typename R>
struct Sample {
  const SampleBlock<R>* block;
  int lane;

  Sample(const SampleBlock<R>* samples, int64_t i)
      : block(samples + uint64_t(i) / SampleBlock<R>::size),
        lane(int(uint64_t(i) % SampleBlock<R>::size)) {}

  void advance() {
    if (++lane == SampleBlock<R>::size) {
      lane = 0;
      ++block;
    }
  }

  int64_t at() const {
    return block->at[lane];
  }
  R weight(int corner) const {
    return block->w[corner][lane];
  }
  R mask() const {
    return block->mask[lane];
  }
  bool has_corner(int i) const {
    return block->flags[lane] >> i & 1;
  }
  // Most are: all corners lie in the image, and the mask is finite.
  bool is_ordinary() const {
    constexpr int all = SampleBlock<R>::corner_bits;
    constexpr int looked_at = all | SampleBlock<R>::mask_apart_bit;
    return (block->flags[lane] & looked_at) == all;
  }
  bool live() const {
    return block->flags[lane] & SampleBlock<R>::live_bit;
  }
  bool mask_is_apart() const {
    return block->flags[lane] & SampleBlock<R>::mask_apart_bit;
  }
};

// A block of columns: some output pixels, some taps, some channels.
struct Block {
  int64_t pixel_begin;
  int64_t pixel_end;
  int tap_begin;
  int tap_end;
  int channel_begin;
  int channel_end;

  int64_t pixels() const {
    return pixel_end - pixel_begin;
  }
  int taps() const {
    return tap_end - tap_begin;
  }
  int channels() const {
    return channel_end - channel_begin;
  }
  int64_t width() const {
    return int64_t(taps()) * channels();
  }
};

// The offset groups that channels [begin, end) touch: [first, last).
struct GroupRange {
  int first;
  int last;

  int count() const {
    return last - first;
  }
};

static inline GroupRange
offset_groups(const DeformConv2dParams& p, int channel_begin, int channel_end) {
  const int width = p.C / p.DG;
  return {channel_begin / width, (channel_end + width - 1) / width};
}

// The columns of a block's pixels, taps and channels, all counted from the
// block's first: data[pixel * pixel_stride + tap * tap_stride + channel].
template <typename R>
struct Columns {
  Block block;
  Block planned; // by the samples; the block is part of it
  const SampleBlock<R>* samples;
  R* data;
  int64_t pixel_stride;
  int64_t tap_stride;
};

// T is the type of image, output and cotangent; R the type of everything else:
// offsets, masks, columns and sums (float for halves).
template <typename T, typename R>
struct TileKernels {
  // Plans the samples of a block. `samples` is [pixels][groups][taps], groups
  // being the offset groups that the block's channels touch.
  void (*plan)(
      const DeformConv2dParams& params,
      const Block& block,
      const R* offset, // [N * Ho * Wo][DG][kH * kW][2]
      const R* mask, // [N * Ho * Wo][DG][kH * kW], or null
      SampleBlock<R>* samples);

  void (*sample)(
      const DeformConv2dParams& params,
      const T* input, // [N][H][W][C]
      const T* zeros, // C zeros, read in place of corners outside the image
      const Columns<R>& columns);

  // Both sample() and this machine's multiply(), of other columns, at once: the
  // product's arithmetic hides the sampling's loads. Null where that gains
  // nothing.
  void (*sample_beside)(
      const DeformConv2dParams& params,
      const T* input,
      const T* zeros,
      const Columns<R>& columns,
      const PackedProduct<R>& product);

  // From the cotangent of the block's columns: the gradient of offset and mask,
  // summed over the channels of each offset group. The block spans all
  // channels. Either output may be null.
  void (*offset_grad)(
      const DeformConv2dParams& params,
      const Block& block,
      const SampleBlock<R>* samples,
      const T* input,
      const T* zeros,
      const R* grad_columns, // [pixels][taps][C]
      R* grad_offset, // as offset
      R* grad_mask); // as mask

  // Adds the cotangent of the block's columns to the image's gradient, to the
  // elements [image_begin, image_end) alone, whole pixels, so that workers with
  // ranges of their own don't meet. The block spans all channels.
  void (*scatter)(
      const DeformConv2dParams& params,
      const Block& block,
      const SampleBlock<R>* samples,
      const R* grad_columns, // [pixels][taps][C]
      int64_t image_begin,
      int64_t image_end,
      R* sink, // of C / DG elements, takes what belongs nowhere
      R* grad_input); // [N][H][W][C]

  void (*to_compute)(const T* from, R* to, int64_t n);
  void (*from_compute)(const R* from, T* to, int64_t n);
};

// The kernels for this machine and offset groups of so many channels.
template <typename T, typename R>
const TileKernels<T, R>& tile_kernels(int channels = 0);

} // namespace mlx_deform::cpu
