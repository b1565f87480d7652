// The fused convolution: a tile of output pixels is sampled into a column tile
// that stays in cache and goes straight to a matrix product.

#include "mlx_ops/deform_conv2d/op.h"

#include <optional>
#include <type_traits>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/cpu/memory.h"
#include "mlx_ops/cpu/sampling_vjp.h"
#include "mlx_ops/cpu/tiles.h"
#include "mlx_ops/cpu/weight_products.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform {

namespace cpu {

namespace {

// Partial sums of a weight's gradient take no more than this, all together.
constexpr int64_t partial_bytes_most = 16 << 20;

// The cotangent of some pixels in the compute type, [pixels][O].
template <typename T, typename R>
const R* cotangent_rows(
    const Source<T, R>& source,
    const T* cotangent,
    int64_t begin,
    int64_t end,
    Worker& worker) {
  const T* rows = cotangent + begin * source.params.O;
  if constexpr (std::is_same_v<T, R>) {
    return rows;
  } else {
    const int64_t count = (end - begin) * source.params.O;
    R* out = worker.rows.get<R>(count);
    source.kernels.to_compute(rows, out, count);
    return out;
  }
}

// The columns of a tile, strip by strip of its pixels, range after range. Each
// is planned, with some that follow, but not sampled.
template <typename T, typename R>
class Strips {
 public:
  // Where two `overlap`, their columns take turns with two buffers, for one
  // strip to be sampled while the one before is multiplied.
  Strips(
      const Source<T, R>& source,
      const std::vector<ColumnRange>& ranges,
      int64_t begin,
      int64_t end,
      int64_t strip,
      bool overlap,
      Worker& worker)
      : source_(source),
        ranges_(ranges),
        worker_(worker),
        begin_(begin),
        end_(end),
        strip_(strip),
        at_(begin) {
    int64_t room = 0;
    for (const ColumnRange& range : ranges) {
      room = std::max(room, strip * range.at(0, 1).width());
    }
    columns_ = worker.columns.get<R>(overlap ? 2 * room : room);
    other_columns_ = columns_ + (overlap ? room : 0);
  }

  // The next one; none behind the last. Forgets the plan of the one before.
  std::optional<Columns<R>> next() {
    if (at_ == end_) {
      at_ = begin_;
      ++range_;
    }
    if (range_ == ranges_.size()) {
      return std::nullopt;
    }
    const ColumnRange& range = ranges_[range_];
    if (at_ == begin_ || at_ == planned_.pixel_end) {
      const Block one = range.at(at_, at_ + 1);
      const int64_t samples = strip_ * one.taps() * source_.groups(one).count();
      const int64_t strips = std::max<int64_t>(1, samples_at_once / samples);
      planned_ = range.at(at_, std::min(at_ + strips * strip_, end_));
      samples_ = source_.plan(planned_, worker_);
    }
    const Block block = range.at(at_, std::min(at_ + strip_, end_));
    at_ = block.pixel_end;
    std::swap(columns_, other_columns_);
    return Columns<R>{
        block, planned_, samples_, columns_, block.width(), block.channels()};
  }

 private:
  static constexpr int64_t samples_at_once = 1024;

  const Source<T, R>& source_;
  const std::vector<ColumnRange>& ranges_;
  Worker& worker_;
  const int64_t begin_, end_, strip_;
  // The next strip's:
  size_t range_ = 0;
  int64_t at_;
  Block planned_{};
  const SampleBlock<R>* samples_ = nullptr;
  R* columns_;
  R* other_columns_;
};

template <typename T, typename R>
void forward(
    const Source<T, R>& source,
    const R* weight,
    const R* bias,
    T* out) {
  const DeformConv2dParams& p = source.params;
  ThreadPool::Session session(ThreadPool::instance(), source.work());
  const ForwardProduct<R> product(session, p, weight);
  const std::vector<ColumnRange> ranges =
      column_ranges(p, product.most_columns(source.kernels));
  const EvenTiles tiles(
      source.pixels(),
      tile_pixels_most(source.pixels(), product.most_pixels()),
      product.pixel_step());
  const int64_t strip =
      product.pixels_at_once(source.kernels, tiles.most_pixels());

  session.run(tiles.count(), [&](int64_t i, Worker& worker) {
    const int64_t begin = tiles.begin(i);
    const int64_t end = tiles.begin(i + 1);
    R* sums;
    if constexpr (std::is_same_v<T, R>) {
      sums = out + begin * p.O;
    } else {
      sums = worker.rows.get<R>((end - begin) * p.O);
    }
    if (bias) {
      for (int64_t q = 0; q < end - begin; ++q) {
        std::copy_n(bias, p.O, sums + q * p.O);
      }
    }
    Strips<T, R> strips(
        source,
        ranges,
        begin,
        end,
        strip,
        product.overlaps(source.kernels),
        worker);
    std::optional<Columns<R>> columns = strips.next();
    if (columns) {
      source.sample(*columns);
    }
    while (columns) {
      const std::optional<Columns<R>> next = strips.next();
      R* rows = sums + (columns->block.pixel_begin - begin) * p.O;
      product.add(source, *columns, rows, bias, next, worker);
      columns = next;
    }
    if constexpr (!std::is_same_v<T, R>) {
      source.kernels.from_compute(sums, out + begin * p.O, (end - begin) * p.O);
    }
  });
}

// The weight's gradient, chunk by chunk. Tasks own ranges of columns and sum
// over all pixels, so they share nothing. Where the ranges are few, the pixels
// are split as well, into partial sums that are added up in order: a few, or as
// many as large machines can use where each has many tiles to sum.
template <typename T, typename R>
class WeightGrad {
 public:
  // Nothing to do where grad_weight is null.
  WeightGrad(
      ThreadPool::Session& session,
      const Source<T, R>& source,
      const T* cotangent,
      R* grad_weight)
      : session_(session),
        source_(source),
        cotangent_(cotangent),
        grad_weight_(grad_weight),
        product_(source.params) {}

  int64_t tasks(const Chunk<R>& chunk) {
    if (!grad_weight_) {
      return 0;
    }
    ranges_ = column_ranges(
        source_.params,
        block_width,
        chunk.block.tap_begin,
        chunk.block.tap_end);
    if (splits_ == 0) {
      split(chunk);
    }
    return static_cast<int64_t>(ranges_.size()) *
        ceil_div(chunk.tiles.count(), split_tiles_);
  }

  void run(const Chunk<R>& chunk, int64_t task, Worker& worker) const {
    const auto count = static_cast<int64_t>(ranges_.size());
    const ColumnRange& range = ranges_[task % count];
    const int64_t first = task / count * split_tiles_;
    const int64_t last = std::min(first + split_tiles_, chunk.tiles.count());
    R* sums = partial_ + task / count * product_.shape().size;
    const int64_t at_once =
        std::max<int64_t>(1, tile_pixels / chunk.tiles.most_pixels());
    for (int64_t begin = first; begin < last; begin += at_once) {
      const int64_t end = std::min(begin + at_once, last);
      const Block block = range.at(
          chunk.tile_at(begin).pixel_begin, chunk.tile_at(end - 1).pixel_end);
      // Not a multiple of the cache's way size, which a walk down a column
      // would pay for.
      const int64_t stride = block.width() + panel_room;
      R* columns = worker.columns.get<R>((block.pixels() + 1) * stride);
      for (int64_t i = begin; i < end; ++i) {
        const Block tile = chunk.tile_at(i);
        const Block part = range.at(tile.pixel_begin, tile.pixel_end);
        source_.sample(
            {part,
             chunk.samples ? tile : part,
             chunk.samples ? chunk.samples_of(i) : source_.plan(part, worker),
             columns + (tile.pixel_begin - block.pixel_begin) * stride,
             stride,
             block.channels()});
      }
      const R* rows = cotangent_rows(
          source_, cotangent_, block.pixel_begin, block.pixel_end, worker);
      const bool accumulate = chunk.block.pixel_begin > 0 || begin > first;
      product_.add(block, columns, stride, rows, sums, accumulate, worker);
    }
  }

  // Adds up the partial sums.
  void finish() {
    if (!grad_weight_) {
      return;
    }
    const WeightShape& shape = product_.shape();
    if (splits_ == 0) { // no pixels
      std::fill_n(grad_weight_, shape.size, R(0));
      return;
    }
    if (splits_ > 1) {
      constexpr int64_t piece = 1 << 14;
      R* out = shape.depthwise() ? partial_ : grad_weight_;
      session_.run(ceil_div(shape.size, piece), [&](int64_t i, Worker&) {
        const int64_t end = std::min(shape.size, (i + 1) * piece);
        for (int64_t j = i * piece; j < end; ++j) {
          R sum = partial_[j];
          for (int64_t s = 1; s < splits_; ++s) {
            sum += partial_[s * shape.size + j];
          }
          out[j] = sum;
        }
      });
    }
    if (shape.depthwise()) {
      unpack_depthwise(source_.params, partial_, grad_weight_);
    }
  }

 private:
  static constexpr int64_t least_pixels = tile_pixels; // of a split

  // As the first chunk, the largest, allows.
  void split(const Chunk<R>& chunk) {
    const WeightShape& shape = product_.shape();
    const auto count = static_cast<int64_t>(ranges_.size());
    const int64_t tasks_wanted = std::clamp<int64_t>(
        ceil_div(source_.pixels(), tile_pixels) / 8 * count, 16, 64);
    const int64_t most = std::max<int64_t>(
        1,
        std::min(
            {ceil_div(tasks_wanted, count),
             chunk.block.pixels() / least_pixels,
             partial_bytes_most / int64_t(shape.size * sizeof(R))}));
    split_tiles_ = ceil_div(chunk.tiles.count(), most);
    splits_ = ceil_div(chunk.tiles.count(), split_tiles_);
    partial_ = splits_ == 1 && !shape.depthwise()
        ? grad_weight_
        : session_.shared_sums().get<R>(splits_ * shape.size);
  }

  ThreadPool::Session& session_;
  const Source<T, R>& source_;
  const T* cotangent_;
  R* grad_weight_;
  WeightGradProduct<R> product_;
  std::vector<ColumnRange> ranges_; // of the chunk's taps
  int64_t split_tiles_ = 0;
  int64_t splits_ = 0;
  R* partial_ = nullptr; // [splits][weight]
};

template <typename T, typename R>
void backward(
    const Source<T, R>& source,
    const R* weight,
    const T* cotangent,
    const SamplingGrads<R>& grads,
    R* grad_weight) {
  const DeformConv2dParams& p = source.params;
  ThreadPool::Session session(ThreadPool::instance(), 2 * source.work());
  WeightGrad<T, R> weight_grad(session, source, cotangent, grad_weight);
  const auto sampling = [&](auto& other) {
    const ColumnCotangentProduct<R> product(session, p, weight);
    sampling_vjp(
        session,
        source,
        [&](const Block& block, R* out, Worker& worker) {
          const R* rows = cotangent_rows(
              source, cotangent, block.pixel_begin, block.pixel_end, worker);
          product.multiply(block, rows, out, worker);
        },
        product.pixel_step(),
        grads,
        other);
  };
  if (grads.any() && chunk_taps(p) == source.taps()) {
    sampling(weight_grad);
  } else {
    // With many channels a plan costs little, and long sums of a part of the
    // weight's gradient, which then stays in cache, save more.
    const Chunk<R> all{
        {0, source.pixels(), 0, source.taps(), 0, p.C},
        EvenTiles(source.pixels(), chunk_tile_pixels, 1),
        0,
        nullptr,
        nullptr};
    session.run(
        source.pixels() ? weight_grad.tasks(all) : 0,
        [&](int64_t task, Worker& worker) {
          weight_grad.run(all, task, worker);
        });
    if (grads.any()) {
      NoOtherGrad no_other;
      sampling(no_other);
    }
  }
  weight_grad.finish();
}

} // namespace

} // namespace cpu

void DeformConv2d::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (gpu::stands_in_on_cpu()) {
    return eval_gpu(inputs, outputs);
  }
  const DeformConv2dParams p = params(inputs);
  cpu::allocate(outputs);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [p,
       in = weak_copies(inputs),
       out = mx::array::unsafe_weak_copy(outputs[0]),
       bias_at = has_bias_ ? bias_index() : -1,
       mask_at = has_mask_ ? mask_index() : -1]() mutable {
        cpu::dispatch_types(out.dtype(), [&]<typename T, typename R>() {
          const cpu::Source<T, R> source(
              p, in[0], in[1], mask_at < 0 ? nullptr : &in[mask_at]);
          cpu::forward<T, R>(
              source,
              in[2].data<R>(),
              bias_at < 0 ? nullptr : in[bias_at].data<R>(),
              out.data<T>());
        });
      });
}

void DeformConv2dVJP::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (gpu::stands_in_on_cpu()) {
    return eval_gpu(inputs, outputs);
  }
  const DeformConv2dParams p = params(inputs);
  cpu::allocate(outputs);
  mx::cpu::get_command_encoder(stream()).dispatch([p,
                                                   in = weak_copies(inputs),
                                                   out = weak_copies(outputs),
                                                   has_mask = has_mask_,
                                                   wanted = wanted_]() mutable {
    cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
      const cpu::Source<T, R> source(
          p, in[0], in[1], has_mask ? &in[4] : nullptr);
      size_t next = 0;
      const auto take = [&](bool is_wanted) {
        return is_wanted ? out[next++].data<R>() : nullptr;
      };
      R* grad_input = take(wanted.input);
      R* grad_offset = take(wanted.offset);
      R* grad_weight = take(wanted.weight);
      R* grad_mask = take(wanted.mask);
      cpu::backward<T, R>(
          source,
          in[2].data<R>(),
          in[3].data<T>(),
          {grad_input, grad_offset, grad_mask},
          grad_weight);
    });
  });
}

} // namespace mlx_deform
