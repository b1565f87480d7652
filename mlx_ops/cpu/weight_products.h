// The three products of a convolution, block by block: columns with the weight,
// its cotangent with the weight, and both to the weight's gradient. Each by the
// fastest way that the problem and this machine allow: our own products on a
// packed weight, BLAS, or sums along the channels for a depthwise weight.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "mlx_ops/cpu/depthwise.h"
#include "mlx_ops/cpu/gemm.h"
#include "mlx_ops/cpu/products.h"
#include "mlx_ops/cpu/thread_pool.h"
#include "mlx_ops/cpu/tiles.h"

namespace mlx_deform::cpu {

// Weights beyond this are not packed: they would no longer stay in cache, nor
// the scratch memory small.
constexpr int64_t packed_bytes_most = 16 << 20;

// Fewer columns than these leave our products' vectors too empty.
constexpr int64_t least_columns = 5;

// Room after a row of columns for a product that reads whole panels.
constexpr int64_t panel_room = 16;

// What the products know of a weight (O, kH, kW, C / G).
struct WeightShape {
  int groups;
  int in; // channels of a group
  int out;
  int taps;
  int64_t row; // elements of an output channel
  int64_t size;

  explicit WeightShape(const DeformConv2dParams& p)
      : groups(p.G),
        in(p.C / p.G),
        out(p.O / p.G),
        taps(p.kH * p.kW),
        row(int64_t(taps) * in),
        size(p.O * row) {}

  bool depthwise() const {
    return in == 1;
  }

  // Where a block's columns of group g lie in a row.
  int64_t column(const Block& block, int g) const {
    return int64_t(block.tap_begin) * in +
        std::max(block.channel_begin - g * in, 0);
  }
};

// Our own products where this machine has them and the packed weight is small;
// else null, for BLAS. A half-empty vector still costs less than BLAS's calls
// and packing do; Apple's matrix units, which only Accelerate reaches, win as
// soon as `columns` fill theirs. Depends on the problem and the machine alone.
template <typename R>
const Products<R>* products_for(int64_t columns, int64_t packed) {
#if defined(__APPLE__) && defined(__aarch64__)
  constexpr int64_t matrix_unit = 64 / sizeof(R);
  if (columns >= matrix_unit) {
    return nullptr;
  }
#endif
  const Products<R>* own = own_products<R>();
  return own && columns >= least_columns &&
          packed * int64_t(sizeof(R)) <= packed_bytes_most
      ? own
      : nullptr;
}

// Calls f(g, columns, width, pixel_stride) for every weight group of a sampled
// block: the group's columns, how many, and how far apart its pixels lie.
template <typename R, typename F>
void for_each_group(
    const WeightShape& shape,
    const Block& block,
    const R* columns,
    int64_t pixel_stride,
    Worker& worker,
    const F& f) {
  const int first = block.channel_begin / shape.in;
  const int last = static_cast<int>(ceil_div(block.channel_end, shape.in));
  if (last - first == 1) {
    f(first, columns, block.width(), pixel_stride);
    return;
  }
  // Several groups were sampled together: copy out one after the other.
  const int64_t width = int64_t(block.taps()) * shape.in;
  const int64_t stride = width + (pixel_stride - block.width());
  R* part = worker.groups.get<R>(block.pixels() * stride + panel_room);
  for (int g = first; g < last; ++g) {
    for (int64_t q = 0; q < block.pixels(); ++q) {
      const R* from =
          columns + q * pixel_stride + g * shape.in - block.channel_begin;
      for (int k = 0; k < block.taps(); ++k) {
        std::copy_n(
            from + k * block.channels(),
            shape.in,
            part + q * stride + k * shape.in);
      }
    }
    f(g, part, width, stride);
  }
}

// A depthwise weight, [C][O / C][taps], as its kernels take it, [O /
// C][taps][C].
template <typename R>
const R* pack_depthwise(
    ThreadPool::Session& session,
    const DeformConv2dParams& p,
    const R* weight) {
  const WeightShape shape(p);
  const int64_t row = shape.out * shape.row;
  R* packed = session.packed_weight().get<R>(shape.size);
  for (int64_t i = 0; i < row; ++i) {
    for (int c = 0; c < p.C; ++c) {
      packed[i * p.C + c] = weight[c * row + i];
    }
  }
  return packed;
}

// The gradient of a depthwise weight from the kernels' layout to the weight's.
template <typename R>
void unpack_depthwise(
    const DeformConv2dParams& p,
    const R* packed,
    R* grad_weight) {
  const WeightShape shape(p);
  const int64_t row = shape.out * shape.row;
  for (int64_t i = 0; i < row; ++i) {
    for (int c = 0; c < p.C; ++c) {
      grad_weight[c * row + i] = packed[i * p.C + c];
    }
  }
}

// output = columns * weight
template <typename R>
class ForwardProduct {
 public:
  ForwardProduct(
      ThreadPool::Session& session,
      const DeformConv2dParams& p,
      const R* weight)
      : params_(p),
        shape_(p),
        own_(products_for<R>(shape_.out, shape_.size)),
        weight_(weight) {
    if (shape_.depthwise()) {
      weight_ = pack_depthwise(session, p, weight);
    } else if (own_) {
      weight_ = pack(session);
    }
  }

  // Tiles of whole steps leave no part of a strip.
  int64_t pixel_step() const {
    return own_ ? own_->strip : 1;
  }

  // How many pixels a tile may have: fewer for our own products, so that the
  // sums stay in cache beside columns and weight.
  int64_t most_pixels() const {
    return own_ ? 16 * own_->strip : tile_pixels;
  }

  // Whether some columns are multiplied while the next are sampled.
  template <typename T>
  bool overlaps(const TileKernels<T, R>& kernels) const {
    return own_ && kernels.sample_beside && shape_.in >= channel_step &&
        shape_.out >= own_->panel;
  }

  // How many columns to take at once. With our own products at least all taps
  // of 64 channels and 3 x 3 taps; more of them where strips overlap, which are
  // short, as long as their weight stays in a core's cache.
  template <typename T>
  int64_t most_columns(const TileKernels<T, R>& kernels) const {
    constexpr int64_t least = 640, most = 4096, weight = least * 256;
    return !own_             ? block_width
        : !overlaps(kernels) ? least
                             : std::clamp(weight / shape_.out, least, most);
  }

  // How many pixels to sample between two products: so few that their columns
  // stay close, yet enough to use a panel of the weight a few times; BLAS wants
  // a whole tile.
  template <typename T>
  int64_t pixels_at_once(const TileKernels<T, R>& kernels, int64_t tile) const {
    return shape_.depthwise() ? depthwise_pixels
        : overlaps(kernels)   ? own_->strip
        : own_                ? 8 * own_->strip
                              : tile;
  }

  // Adds to the rows (O) of the columns' pixels, or sets them where nothing
  // came before: no bias, no other block of the same columns' group. Then, or
  // meanwhile, samples the next columns, if any.
  template <typename T>
  void add(
      const Source<T, R>& source,
      const Columns<R>& columns,
      R* rows,
      bool has_bias,
      const std::optional<Columns<R>>& next,
      Worker& worker) const {
    if (next && overlaps(source.kernels)) {
      source.kernels.sample_beside(
          params_,
          source.input,
          source.zeros.data(),
          *next,
          product(
              columns.block,
              columns.block.channel_begin / shape_.in,
              columns.data,
              columns.block.width(),
              columns.pixel_stride,
              rows,
              has_bias));
      return;
    }
    multiply(columns, rows, has_bias, worker);
    if (next) {
      source.sample(*next);
    }
  }

 private:
  static constexpr int64_t depthwise_pixels = 16;

  void multiply(
      const Columns<R>& columns,
      R* rows,
      bool has_bias,
      Worker& worker) const {
    const Block& block = columns.block;
    if (shape_.depthwise()) {
      depthwise_kernels<R>().multiply(
          params_,
          block,
          columns.data,
          columns.pixel_stride,
          weight_,
          rows,
          has_bias || block.tap_begin != 0);
      return;
    }
    for_each_group(
        shape_,
        block,
        columns.data,
        columns.pixel_stride,
        worker,
        [&](int g, const R* part, int64_t width, int64_t stride) {
          if (own_) {
            own_->multiply(
                product(block, g, part, width, stride, rows, has_bias));
            return;
          }
          const int64_t at = shape_.column(block, g);
          gemm<R>(
              Transpose::no,
              Transpose::yes,
              block.pixels(),
              shape_.out,
              width,
              part,
              stride,
              weight_ + g * shape_.out * shape_.row + at,
              shape_.row,
              has_bias || at != 0 ? R(1) : R(0),
              rows + g * shape_.out,
              params_.O);
        });
  }

  // Of our own: `width` columns of weight group g, whose pixels lie `stride`
  // apart.
  PackedProduct<R> product(
      const Block& block,
      int g,
      const R* columns,
      int64_t width,
      int64_t stride,
      R* rows,
      bool has_bias) const {
    const int64_t at = shape_.column(block, g);
    return {
        block.pixels(),
        shape_.out,
        width,
        columns,
        stride,
        weight_ + g * packed_group() + at * own_->panel,
        shape_.row * own_->panel,
        rows + g * shape_.out,
        params_.O,
        has_bias || at != 0};
  }

  int64_t packed_group() const {
    return own_->packed_size(shape_.row, shape_.out);
  }

  const R* pack(ThreadPool::Session& session) const {
    R* packed = session.packed_weight().get<R>(shape_.groups * packed_group());
    constexpr int64_t piece = 512; // elements of an output channel
    const int64_t panels = ceil_div(shape_.out, own_->panel);
    const int64_t pieces = ceil_div(shape_.row, piece);
    session.run(shape_.groups * panels * pieces, [&](int64_t i, Worker&) {
      const int64_t g = i / pieces / panels;
      const int64_t o = i / pieces % panels * own_->panel;
      const int64_t at = i % pieces * piece;
      own_->pack(
          weight_ + (g * shape_.out + o) * shape_.row + at,
          1,
          shape_.row,
          std::min(piece, shape_.row - at),
          std::min<int64_t>(own_->panel, shape_.out - o),
          packed + g * packed_group() + o * shape_.row + at * own_->panel);
    });
    return packed;
  }

  const DeformConv2dParams& params_;
  WeightShape shape_;
  const Products<R>* own_;
  const R* weight_; // packed, unless BLAS takes it
};

// grad_weight = cotangent^T * columns. Sums have the weight's layout, and for a
// depthwise weight its kernels'.
template <typename R>
class WeightGradProduct {
 public:
  explicit WeightGradProduct(const DeformConv2dParams& p)
      : params_(p), shape_(p), own_(products_for<R>(shape_.row, 0)) {}

  const WeightShape& shape() const {
    return shape_;
  }

  // The block's columns and the rows (O) of the cotangent at its pixels.
  void add(
      const Block& block,
      const R* columns,
      int64_t pixel_stride,
      const R* rows,
      R* sums,
      bool accumulate,
      Worker& worker) const {
    if (shape_.depthwise()) {
      depthwise_kernels<R>().weight_grad(
          params_, block, columns, pixel_stride, rows, sums, accumulate);
      return;
    }
    for_each_group(
        shape_,
        block,
        columns,
        pixel_stride,
        worker,
        [&](int g, const R* part, int64_t width, int64_t stride) {
          const R* a = rows + g * shape_.out;
          R* c = sums + g * shape_.out * shape_.row + shape_.column(block, g);
          if (own_) {
            const int64_t k = block.pixels();
            R* packed = worker.packed_rows.get<R>(
                own_->packed_transposed_size(k, shape_.out));
            own_->pack_transposed(a, params_.O, k, shape_.out, packed);
            own_->multiply_transposed(
                shape_.out,
                width,
                k,
                packed,
                part,
                stride,
                c,
                shape_.row,
                accumulate);
          } else {
            gemm<R>(
                Transpose::yes,
                Transpose::no,
                shape_.out,
                width,
                block.pixels(),
                a,
                params_.O,
                part,
                stride,
                accumulate ? R(1) : R(0),
                c,
                shape_.row);
          }
        });
  }

 private:
  const DeformConv2dParams& params_;
  WeightShape shape_;
  const Products<R>* own_;
};

// cotangent of the columns = cotangent * weight^T
template <typename R>
class ColumnCotangentProduct {
 public:
  ColumnCotangentProduct(
      ThreadPool::Session& session,
      const DeformConv2dParams& p,
      const R* weight)
      : params_(p),
        shape_(p),
        own_(products_for<R>(shape_.in, shape_.size)),
        weight_(weight) {
    if (shape_.depthwise()) {
      weight_ = pack_depthwise(session, p, weight);
    } else if (own_) {
      weight_ = pack(session);
    }
  }

  // Tiles of whole steps leave no part of a strip.
  int64_t pixel_step() const {
    return own_ ? own_->strip : 1;
  }

  // From the rows (O) of the cotangent at the block's pixels, for all channels:
  // out is [pixels][taps][C].
  void multiply(const Block& block, const R* rows, R* out, Worker& worker)
      const {
    if (shape_.depthwise()) {
      depthwise_kernels<R>().column_cotangent(
          params_, block, rows, weight_, out);
    } else if (own_) {
      for (int g = 0; g < shape_.groups; ++g) {
        for (int k = block.tap_begin; k < block.tap_end; ++k) {
          own_->multiply(
              {block.pixels(),
               shape_.in,
               shape_.out,
               rows + g * shape_.out,
               params_.O,
               weight_ + (int64_t(g) * shape_.taps + k) * packed_tap(),
               int64_t(shape_.out) * own_->panel,
               out + int64_t(k - block.tap_begin) * params_.C + g * shape_.in,
               block.width(),
               false});
        }
      }
    } else {
      multiply_by_blas(block, rows, out, worker);
    }
  }

 private:
  int64_t packed_tap() const {
    return own_->packed_size(shape_.out, shape_.in);
  }

  // The weight of each group and tap, (O / G x C / G), by itself.
  const R* pack(ThreadPool::Session& session) const {
    const int64_t count = int64_t(shape_.groups) * shape_.taps;
    R* packed = session.packed_weight().get<R>(count * packed_tap());
    session.run(count, [&](int64_t i, Worker&) {
      const int64_t g = i / shape_.taps;
      own_->pack(
          weight_ + g * shape_.out * shape_.row + i % shape_.taps * shape_.in,
          shape_.row,
          1,
          shape_.out,
          shape_.in,
          packed + i * packed_tap());
    });
    return packed;
  }

  void multiply_by_blas(
      const Block& block,
      const R* rows,
      R* out,
      Worker& worker) const {
    const int64_t width = int64_t(block.taps()) * shape_.in;
    const bool one_group = shape_.groups == 1;
    R* part = one_group ? out : worker.groups.get<R>(block.pixels() * width);
    for (int g = 0; g < shape_.groups; ++g) {
      gemm<R>(
          Transpose::no,
          Transpose::no,
          block.pixels(),
          width,
          shape_.out,
          rows + g * shape_.out,
          params_.O,
          weight_ + g * shape_.out * shape_.row +
              int64_t(block.tap_begin) * shape_.in,
          shape_.row,
          R(0),
          part,
          width);
      if (!one_group) {
        for (int64_t q = 0; q < block.pixels() * block.taps(); ++q) {
          std::copy_n(
              part + q * shape_.in,
              shape_.in,
              out + q * params_.C + g * shape_.in);
        }
      }
    }
  }

  const DeformConv2dParams& params_;
  WeightShape shape_;
  const Products<R>* own_;
  const R* weight_; // packed, unless BLAS takes it
};

} // namespace mlx_deform::cpu
