// The fused convolution: a tile of output pixels is sampled into a column tile
// that stays in cache and goes straight to a matrix product.

#include "mlx_ops/deform_conv2d/op.h"

#include <type_traits>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/cpu/memory.h"
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
      column_ranges(p, product.most_columns());
  const int64_t tile = pixels_per_tile(
      source.pixels(), product.most_pixels(), product.pixel_step());
  const int64_t strip = product.pixels_at_once(tile);

  session.run(ceil_div(source.pixels(), tile), [&](int64_t i, Worker& worker) {
    const int64_t begin = i * tile;
    const int64_t end = std::min(begin + tile, source.pixels());
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
    for (const ColumnRange& range : ranges) {
      for (int64_t s = begin; s < end; s += strip) {
        const Block block = range.at(s, std::min(s + strip, end));
        const R* columns = source.sample(
            block, source.plan(block, worker), block.width(), worker);
        product.add(block, columns, sums + (s - begin) * p.O, bias, worker);
      }
    }
    if constexpr (!std::is_same_v<T, R>) {
      source.kernels.from_compute(sums, out + begin * p.O, (end - begin) * p.O);
    }
  });
}

template <typename T, typename R>
void weight_vjp(
    ThreadPool::Session& session,
    const Source<T, R>& source,
    const T* cotangent,
    R* grad_weight) {
  const DeformConv2dParams& p = source.params;
  const WeightGradProduct<R> product(p);
  const WeightShape& shape = product.shape();
  if (source.pixels() == 0) {
    std::fill_n(grad_weight, shape.size, R(0));
    return;
  }
  // Tasks own ranges of columns and sum over all pixels, so they share nothing.
  // Where the ranges are few, the pixels are split as well, into partial sums
  // that are added up in order: a few, or as many as large machines can use
  // where each has many tiles to sum.
  const std::vector<ColumnRange> ranges = column_ranges(p, block_width);
  const auto count = static_cast<int64_t>(ranges.size());
  const int64_t tiles = ceil_div(source.pixels(), tile_pixels);
  const int64_t tasks_wanted = std::clamp<int64_t>(tiles / 8 * count, 16, 64);
  const int64_t most_splits = std::max<int64_t>(
      1,
      std::min(
          {ceil_div(tasks_wanted, count),
           tiles,
           partial_bytes_most / int64_t(shape.size * sizeof(R))}));
  const int64_t split_pixels =
      round_up(ceil_div(source.pixels(), most_splits), tile_pixels);
  const int64_t splits = ceil_div(source.pixels(), split_pixels);
  const bool direct = splits == 1 && !shape.depthwise();
  R* partial = direct ? grad_weight
                      : session.shared_columns().get<R>(splits * shape.size);

  session.run(count * splits, [&](int64_t i, Worker& worker) {
    R* sums = partial + i / count * shape.size;
    const ColumnRange& range = ranges[i % count];
    const int64_t first = i / count * split_pixels;
    const int64_t last = std::min(first + split_pixels, source.pixels());
    for (int64_t begin = first; begin < last; begin += tile_pixels) {
      const int64_t end = std::min(begin + tile_pixels, last);
      const Block block = range.at(begin, end);
      // Not a multiple of the cache's way size, which a walk down a column
      // would pay for.
      const int64_t stride = block.width() + panel_room;
      const R* columns =
          source.sample(block, source.plan(block, worker), stride, worker);
      const R* rows = cotangent_rows(source, cotangent, begin, end, worker);
      product.add(block, columns, stride, rows, sums, begin != first, worker);
    }
  });

  if (splits > 1) {
    constexpr int64_t piece = 1 << 14;
    R* out = shape.depthwise() ? partial : grad_weight;
    session.run(ceil_div(shape.size, piece), [&](int64_t i, Worker&) {
      const int64_t end = std::min(shape.size, (i + 1) * piece);
      for (int64_t j = i * piece; j < end; ++j) {
        R sum = partial[j];
        for (int64_t s = 1; s < splits; ++s) {
          sum += partial[s * shape.size + j];
        }
        out[j] = sum;
      }
    });
  }
  if (shape.depthwise()) {
    unpack_depthwise(p, partial, grad_weight);
  }
}

template <typename T, typename R>
void backward(
    const Source<T, R>& source,
    const R* weight,
    const T* cotangent,
    R* grad_input,
    R* grad_offset,
    R* grad_weight,
    R* grad_mask) {
  ThreadPool::Session session(ThreadPool::instance(), 2 * source.work());
  if (grad_weight) {
    weight_vjp(session, source, cotangent, grad_weight);
  }
  if (!grad_input && !grad_offset && !grad_mask) {
    return;
  }
  const ColumnCotangentProduct<R> product(session, source.params, weight);
  sampling_vjp(
      session,
      source,
      [&](const Block& block, R* out, Worker& worker) {
        const R* rows = cotangent_rows(
            source, cotangent, block.pixel_begin, block.pixel_end, worker);
        product.multiply(block, rows, out, worker);
      },
      product.pixel_step(),
      grad_input,
      grad_offset,
      grad_mask);
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
          grad_input,
          grad_offset,
          grad_weight,
          grad_mask);
    });
  });
}

} // namespace mlx_deform
