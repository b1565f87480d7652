// The fused convolution: a tile of output pixels is sampled into a column tile
// that stays in cache and goes straight to a matrix product.

#include "mlx_ops/deform_conv2d.h"

#include <type_traits>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/cpu/gemm.h"
#include "mlx_ops/cpu/products.h"
#include "mlx_ops/cpu/tiles.h"
#include "mlx_ops/gpu/kernels.h"

namespace mlx_deform {

namespace cpu {

namespace {

// Weights beyond this are not packed: they would no longer stay in cache, nor
// the scratch memory small.
constexpr int64_t packed_bytes_most = 16 << 20;

// Nor are partial sums of a weight's gradient taken beyond this, all together.
constexpr int64_t partial_bytes_most = 16 << 20;

// Room after a row of columns for a product that reads whole panels.
constexpr int64_t panel_room = 16;

// Where a range's columns lie in a row of the weight, [kH * kW][C / G].
int64_t weight_column(const DeformConv2dParams& p, const Block& block, int g) {
  const int group = p.C / p.G;
  return int64_t(block.tap_begin) * group +
      std::max(block.channel_begin - g * group, 0);
}

// Calls f(g, columns, width, pixel_stride) for every weight group of a sampled
// block: the group's columns, how many, and how far apart its pixels lie.
template <typename R, typename F>
void for_each_group(
    const DeformConv2dParams& p,
    const Block& block,
    const R* columns,
    int64_t pixel_stride,
    Worker& worker,
    const F& f) {
  const int group = p.C / p.G;
  const int first = block.channel_begin / group;
  const int last = static_cast<int>(ceil_div(block.channel_end, group));
  if (last - first == 1) {
    f(first, columns, block.width(), pixel_stride);
    return;
  }
  // Several groups were sampled together: copy out one after the other.
  const int64_t width = int64_t(block.taps()) * group;
  const int64_t stride = width + (pixel_stride - block.width());
  R* part = worker.groups.get<R>(block.pixels() * stride + panel_room);
  for (int g = first; g < last; ++g) {
    for (int64_t q = 0; q < block.pixels(); ++q) {
      const R* from =
          columns + q * pixel_stride + g * group - block.channel_begin;
      for (int k = 0; k < block.taps(); ++k) {
        std::copy_n(
            from + k * block.channels(), group, part + q * stride + k * group);
      }
    }
    f(g, part, width, stride);
  }
}

// Our own products where this machine has them, a panel of `columns` columns is
// reasonably full, and the packed weight is small; else BLAS. Depends on the
// problem and the machine alone.
template <typename R>
const Products<R>* products_for(int64_t columns, int64_t packed) {
  const Products<R>* own = own_products<R>();
  return own && 2 * columns >= own->panel &&
          packed * int64_t(sizeof(R)) <= packed_bytes_most
      ? own
      : nullptr;
}

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
  const int64_t row = int64_t(source.taps()) * (p.C / p.G); // of the weight
  const int out_group = p.O / p.G;
  const std::vector<ColumnRange> ranges = column_ranges(p, block_width);
  const int64_t tile = pixels_per_tile(source.pixels());

  ThreadPool::Session session(ThreadPool::instance());
  const Products<R>* own = products_for<R>(out_group, p.O * row);
  R* packed = nullptr;
  int64_t packed_group = 0;
  if (own) {
    packed_group = own->packed_size(row, out_group);
    packed = session.packed_weight().get<R>(p.G * packed_group);
    const int64_t panels = ceil_div(out_group, own->panel);
    session.run(p.G * panels, [&](int64_t i, Worker&) {
      const int64_t o = i % panels * own->panel;
      own->pack(
          weight + (i / panels * out_group + o) * row,
          1,
          row,
          row,
          std::min<int64_t>(own->panel, out_group - o),
          packed + i / panels * packed_group + o * row);
    });
  }
  // Our own products take two strips of pixels at a time, so few that their
  // columns stay close, yet enough to use a panel of the weight twice; BLAS
  // wants a whole tile.
  const int64_t strip = own ? 2 * own->strip : tile;

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
      const Block whole = range.at(begin, end);
      const Sample<R>* samples = source.plan(whole, worker);
      const int64_t pixel_samples =
          int64_t(whole.taps()) * source.groups(whole).count();
      for (int64_t s = begin; s < end; s += strip) {
        const Block block = range.at(s, std::min(s + strip, end));
        const R* columns = source.sample(
            block,
            samples + (s - begin) * pixel_samples,
            block.width(),
            worker);
        for_each_group(
            p,
            block,
            columns,
            block.width(),
            worker,
            [&](int g, const R* part, int64_t width, int64_t stride) {
              const int64_t at = weight_column(p, block, g);
              R* c = sums + (s - begin) * p.O + g * out_group;
              const bool accumulate = at != 0 || bias;
              if (own) {
                own->multiply(
                    block.pixels(),
                    out_group,
                    width,
                    part,
                    stride,
                    packed + g * packed_group + at * own->panel,
                    row * own->panel,
                    c,
                    p.O,
                    accumulate);
              } else {
                gemm<R>(
                    Transpose::no,
                    Transpose::yes,
                    block.pixels(),
                    out_group,
                    width,
                    part,
                    stride,
                    weight + g * out_group * row + at,
                    row,
                    accumulate ? R(1) : R(0),
                    c,
                    p.O);
              }
            });
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
  const int64_t row = int64_t(source.taps()) * (p.C / p.G);
  const int64_t size = p.O * row;
  const int out_group = p.O / p.G;
  if (source.pixels() == 0) {
    std::fill_n(grad_weight, size, R(0));
    return;
  }
  // Tasks own ranges of columns and sum over all pixels, so they share nothing.
  // Where the ranges are few, the pixels are split as well, into a few partial
  // sums that are added up in order.
  constexpr int64_t tasks_wanted = 16;
  const std::vector<ColumnRange> ranges = column_ranges(p, block_width);
  const auto count = static_cast<int64_t>(ranges.size());
  const int64_t tiles = ceil_div(source.pixels(), tile_pixels);
  const int64_t most_splits = std::max<int64_t>(
      1,
      std::min(
          {ceil_div(tasks_wanted, count),
           tiles,
           partial_bytes_most / int64_t(size * sizeof(R))}));
  const int64_t split_pixels =
      round_up(ceil_div(source.pixels(), most_splits), tile_pixels);
  const int64_t splits = ceil_div(source.pixels(), split_pixels);
  R* partial = splits == 1 ? grad_weight
                           : session.shared_columns().get<R>(splits * size);
  const Products<R>* own = products_for<R>(row, 0);

  session.run(count * splits, [&](int64_t i, Worker& worker) {
    R* sums = partial + i / count * size;
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
      for_each_group(
          p,
          block,
          columns,
          stride,
          worker,
          [&](int g, const R* part, int64_t width, int64_t part_stride) {
            R* c = sums + g * out_group * row + weight_column(p, block, g);
            if (own) {
              own->multiply_transposed(
                  out_group,
                  width,
                  block.pixels(),
                  rows + g * out_group,
                  p.O,
                  part,
                  part_stride,
                  c,
                  row,
                  begin != first);
            } else {
              gemm<R>(
                  Transpose::yes,
                  Transpose::no,
                  out_group,
                  width,
                  block.pixels(),
                  rows + g * out_group,
                  p.O,
                  part,
                  part_stride,
                  begin == first ? R(0) : R(1),
                  c,
                  row);
            }
          });
    }
  });

  if (splits > 1) {
    constexpr int64_t piece = 1 << 14;
    session.run(ceil_div(size, piece), [&](int64_t i, Worker&) {
      const int64_t end = std::min(size, (i + 1) * piece);
      for (int64_t j = i * piece; j < end; ++j) {
        R sum = partial[j];
        for (int64_t s = 1; s < splits; ++s) {
          sum += partial[s * size + j];
        }
        grad_weight[j] = sum;
      }
    });
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
  const DeformConv2dParams& p = source.params;
  const int taps = source.taps();
  const int group = p.C / p.G;
  const int out_group = p.O / p.G;
  const int64_t row = int64_t(taps) * group;

  ThreadPool::Session session(ThreadPool::instance());
  if (grad_weight) {
    weight_vjp(session, source, cotangent, grad_weight);
  }
  if (!grad_input && !grad_offset && !grad_mask) {
    return;
  }

  // The weight of each group and tap, (O / G x C / G), packed by itself.
  const Products<R>* own = products_for<R>(group, p.O * row);
  const int64_t packed_tap = own ? own->packed_size(out_group, group) : 0;
  R* packed = nullptr;
  if (own) {
    packed = session.packed_weight().get<R>(p.G * taps * packed_tap);
    session.run(p.G * taps, [&](int64_t i, Worker&) {
      own->pack(
          weight + i / taps * out_group * row + i % taps * group,
          row,
          1,
          out_group,
          group,
          packed + i * packed_tap);
    });
  }

  // cotangent (pixels x O) times weight (O x columns)
  const auto column_cotangent =
      [&](const Block& block, R* out, Worker& worker) {
        const R* rows = cotangent_rows(
            source, cotangent, block.pixel_begin, block.pixel_end, worker);
        if (own) {
          for (int g = 0; g < p.G; ++g) {
            for (int k = block.tap_begin; k < block.tap_end; ++k) {
              own->multiply(
                  block.pixels(),
                  group,
                  out_group,
                  rows + g * out_group,
                  p.O,
                  packed + (int64_t(g) * taps + k) * packed_tap,
                  int64_t(out_group) * own->panel,
                  out + int64_t(k - block.tap_begin) * p.C + g * group,
                  block.width(),
                  false);
            }
          }
          return;
        }
        const int64_t width = int64_t(block.taps()) * group;
        R* part = p.G == 1 ? out : worker.groups.get<R>(block.pixels() * width);
        for (int g = 0; g < p.G; ++g) {
          gemm<R>(
              Transpose::no,
              Transpose::no,
              block.pixels(),
              width,
              out_group,
              rows + g * out_group,
              p.O,
              weight + g * out_group * row + int64_t(block.tap_begin) * group,
              row,
              R(0),
              part,
              width);
          if (p.G > 1) {
            for (int64_t q = 0; q < block.pixels() * block.taps(); ++q) {
              std::copy_n(part + q * group, group, out + q * p.C + g * group);
            }
          }
        }
      };
  sampling_vjp(
      session, source, column_cotangent, grad_input, grad_offset, grad_mask);
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
  allocate(outputs);
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
  allocate(outputs);
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
