// The sampling of columns. Of one instruction set, as tile_kernels_impl.h is.

#pragma once

#include "mlx_ops/cpu/lanes.h"
#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// Element offsets of a cell's corners from the upper left one.
struct CornerSteps {
  int64_t right;
  int64_t down;

  explicit CornerSteps(const DeformConv2dParams& p)
      : right(p.C), down(int64_t(p.W) * p.C) {}

  int64_t to(int corner) const {
    return (corner & 1 ? right : 0) + (corner & 2 ? down : 0);
  }
};

// The four corners of a sample, from some channel on.
template <typename T>
struct Corners {
  const T* p[4];

  template <typename R>
  Corners(
      const Sample<R>& s,
      const CornerSteps& steps,
      const T* input,
      const T* zeros,
      int channel) {
    const T* first = input + s.at() + channel;
    p[0] = first;
    p[1] = first + steps.right;
    p[2] = first + steps.down;
    p[3] = first + steps.down + steps.right;
    if (s.is_ordinary()) [[likely]] {
      return;
    }
    for (int i = 0; i < 4; ++i) {
      p[i] = s.has_corner(i) ? p[i] : zeros + channel;
    }
  }
};

// A mask that is no part of the weights.
template <typename R>
[[gnu::noinline, gnu::cold]] void multiply_by(R mask, int n, R* out) {
  for (int q = 0; q < n; ++q) {
    out[q] *= mask;
  }
}

// Where a row is sampled: beside a product registers are few.
enum class Place { alone, beside };

// One sample at n channels from c on.
template <int length, Place place, typename T, typename R>
static inline void sample_row(
    const Sample<R>& s,
    const CornerSteps& steps,
    const T* input,
    const T* zeros,
    int c,
    int n,
    R* out) {
  Corners<T> from(s, steps, input, zeros, c);
  if constexpr (place == Place::beside) {
    // Spilled pointers shall lie in memory, not in vectors, which would wait in
    // the same queue as the product's arithmetic.
    __asm__("" : "+m"(from.p));
  }
  const T *p0 = from.p[0], *p1 = from.p[1], *p2 = from.p[2], *p3 = from.p[3];
  const R w0 = s.weight(0), w1 = s.weight(1);
  const R w2 = s.weight(2), w3 = s.weight(3);
  for_lanes<R, length>(n, [&](auto lanes, int q) {
    lanes.store_to(
        out + q,
        w0 * lanes.load_from(p0 + q) + w1 * lanes.load_from(p1 + q) +
            w2 * lanes.load_from(p2 + q) + w3 * lanes.load_from(p3 + q));
  });
  if (s.mask_is_apart()) {
    multiply_by(s.mask(), n, out);
  }
}

// Beside a product, channels of a long row that are sampled at once, and
// fetched ahead.
template <typename R>
constexpr int piece_length = 4 * VectorOf<R>::width;

// The rows of a block's columns, one by one: those of a pixel, offset group by
// offset group, and of a group tap by tap. Long rows may be cut into pieces of
// `length`: then the taps' first pieces, their second ones, and so on.
template <int length, Place place, typename T, typename R>
class Rows {
 public:
  Rows(
      const DeformConv2dParams& params,
      const T* input,
      const T* zeros,
      const Columns<R>& columns,
      int pieces = 1)
      : steps_(params),
        input_(input),
        zeros_(zeros),
        samples_(columns.samples),
        taps_(columns.block.taps()),
        tap_stride_(columns.tap_stride),
        pixel_stride_(columns.pixel_stride),
        group_width_(params.C / params.DG),
        channel_begin_(columns.block.channel_begin),
        channel_end_(columns.block.channel_end),
        pixel_out_(columns.data),
        channel_(channel_begin_) {
    const Block &block = columns.block, &planned = columns.planned;
    const GroupRange groups =
        offset_groups(params, channel_begin_, channel_end_);
    const GroupRange planned_groups =
        offset_groups(params, planned.channel_begin, planned.channel_end);
    first_end_ = (groups.first + 1) * group_width_;
    left_ = block.pixels() * groups.count() * pieces * taps_;
    at_ = (block.pixel_begin - planned.pixel_begin) * planned_groups.count();
    at_ += groups.first - planned_groups.first;
    at_ = at_ * planned.taps() + block.tap_begin - planned.tap_begin;
    skipped_taps_ = planned.taps() - taps_;
    skipped_groups_ =
        (planned_groups.count() - groups.count()) * planned.taps();
    start_pixel();
  }

  int64_t left() const {
    return left_;
  }

  MLX_DEFORM_INLINE void next() {
    const Sample<R> sample(samples_, at_);
    sample_row<length, place>(
        sample, steps_, input_, zeros_, channel_, channels_, out_);
    --left_;
    ++at_;
    out_ += tap_stride_;
    if (++tap_ == taps_) {
      channel_ += channels_;
      if (channel_ == channel_end_) {
        at_ += skipped_taps_ + skipped_groups_;
        pixel_out_ += pixel_stride_;
        start_pixel();
      } else {
        if (channel_ == group_end_) {
          at_ += skipped_taps_;
          group_end_ += group_width_;
        } else {
          at_ -= taps_;
        }
        start_piece();
      }
    }
    if constexpr (place == Place::beside && length == piece_length<R>) {
      if (left_ > 0) {
        prefetch();
      }
    }
  }

 private:
  MLX_DEFORM_INLINE void start_pixel() {
    channel_ = channel_begin_;
    group_end_ = first_end_;
    start_piece();
  }

  MLX_DEFORM_INLINE void start_piece() {
    tap_ = 0;
    const int end = group_end_ < channel_end_ ? group_end_ : channel_end_;
    channels_ = length_of<length>(end - channel_);
    out_ = pixel_out_ + (channel_ - channel_begin_);
  }

  // The next row's corners, wherever they lie.
  MLX_DEFORM_INLINE void prefetch() const {
    constexpr int line = 64 / sizeof(T);
    const T* upper = input_ + Sample<R>(samples_, at_).at() + channel_;
    const T* lower = upper + steps_.down;
    MLX_DEFORM_UNROLL(8)
    for (int q = 0; q < length; q += line) {
      __builtin_prefetch(upper + q);
      __builtin_prefetch(upper + steps_.right + q);
      __builtin_prefetch(lower + q);
      __builtin_prefetch(lower + steps_.right + q);
    }
  }

  const CornerSteps steps_;
  const T* const input_;
  const T* const zeros_;
  const SampleBlock<R>* const samples_;
  const int taps_;
  const int64_t tap_stride_;
  const int64_t pixel_stride_;
  const int group_width_;
  const int channel_begin_;
  const int channel_end_;
  int first_end_; // of the first offset group's channels
  int skipped_taps_; // planned, but not the block's
  int skipped_groups_;
  int64_t left_;
  // The next row's:
  int64_t at_; // place in the plan
  R* pixel_out_;
  R* out_;
  int channel_;
  int channels_;
  int group_end_;
  int tap_;
};

// The length of a block's rows, which differs where the block cuts its groups.
constexpr int unlike = 1;
static inline int row_length(const DeformConv2dParams& p, const Block& block) {
  const int width = p.C / p.DG;
  if (offset_groups(p, block.channel_begin, block.channel_end).count() == 1) {
    return block.channels();
  }
  const bool whole_groups =
      block.channel_begin % width == 0 && block.channel_end % width == 0;
  return whole_groups ? width : unlike;
}

template <typename T, typename R>
void sample(
    const DeformConv2dParams& params,
    const T* input,
    const T* zeros,
    const Columns<R>& columns) {
  with_length<R>(row_length(params, columns.block), [&](auto length) {
    Rows<length.value, Place::alone, T, R> rows(params, input, zeros, columns);
    while (rows.left()) {
      rows.next();
    }
  });
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
