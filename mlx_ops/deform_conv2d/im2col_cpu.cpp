#include "mlx_ops/deform_conv2d/im2col.h"

#include <type_traits>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/cpu/memory.h"
#include "mlx_ops/cpu/sampling_vjp.h"
#include "mlx_ops/cpu/tiles.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform {

namespace cpu {

namespace {

template <typename T, typename R>
void im2col(const Source<T, R>& source, T* columns) {
  const DeformConv2dParams& p = source.params;
  const std::vector<ColumnRange> ranges = column_ranges(p, block_width);
  const EvenTiles tiles(
      source.pixels(), tile_pixels_most(source.pixels(), tile_pixels), 1);

  ThreadPool::Session session(ThreadPool::instance(), source.work());
  session.run(tiles.count(), [&](int64_t i, Worker& worker) {
    for (const ColumnRange& range : ranges) {
      const int64_t begin = tiles.begin(i);
      const Block block = range.at(begin, tiles.begin(i + 1));
      T* out = columns + begin * p.column_pixel +
          block.tap_begin * p.column_tap + block.channel_begin;
      const SampleBlock<R>* samples = source.plan(block, worker);
      if constexpr (std::is_same_v<T, R>) {
        source.sample(
            {block, block, samples, out, p.column_pixel, p.column_tap});
      } else {
        const int64_t width = block.width();
        R* sampled = worker.columns.get<R>(block.pixels() * width);
        source.sample(
            {block, block, samples, sampled, width, block.channels()});
        for (int64_t q = 0; q < block.pixels(); ++q) {
          for (int k = 0; k < block.taps(); ++k) {
            source.kernels.from_compute(
                sampled,
                out + q * p.column_pixel + k * p.column_tap,
                block.channels());
            sampled += block.channels();
          }
        }
      }
    }
  });
}

} // namespace

} // namespace cpu

void DeformIm2col::eval_cpu(
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
       has_mask = has_mask_]() mutable {
        cpu::dispatch_types(out.dtype(), [&]<typename T, typename R>() {
          const cpu::Source<T, R> source(
              p, in[0], in[1], has_mask ? &in[2] : nullptr);
          cpu::im2col<T, R>(source, out.data<T>());
        });
      });
}

void DeformIm2colVJP::eval_cpu(
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
          p, in[0], in[1], has_mask ? &in[3] : nullptr);
      const T* cotangent = in[2].data<T>();
      size_t next = 0;
      const auto take = [&](bool is_wanted) {
        return is_wanted ? out[next++].data<R>() : nullptr;
      };
      R* grad_input = take(wanted.input);
      R* grad_offset = take(wanted.offset);
      R* grad_mask = take(wanted.mask);
      cpu::NoOtherGrad no_other;
      cpu::ThreadPool::Session session(
          cpu::ThreadPool::instance(), 2 * source.work());
      cpu::sampling_vjp(
          session,
          source,
          [&](const cpu::Block& block, R* columns, cpu::Worker&) {
            for (int64_t q = block.pixel_begin; q < block.pixel_end; ++q) {
              source.kernels.to_compute(
                  cotangent + q * p.column_pixel +
                      block.tap_begin * p.column_tap,
                  columns,
                  block.width());
              columns += block.width();
            }
          },
          1,
          cpu::SamplingGrads<R>{grad_input, grad_offset, grad_mask},
          no_other);
    });
  });
}

} // namespace mlx_deform
