#include "mlx_ops/stand_in/kernels.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/stream.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/cpu/gemm.h"
#include "mlx_ops/cpu/tiles.h"

namespace mlx_deform::stand_in {

namespace {

using cpu::Block;
using cpu::Sample;
using cpu::Source;

// One sample of all channels, planned and ready.
template <typename T, typename R>
struct OneSample {
  Block block;
  std::vector<Sample<R>> plan;

  explicit OneSample(const DeformConv2dParams& p) : block{}, plan(p.DG) {
    block.channel_end = p.C;
  }

  void move_to(const Source<T, R>& source, int64_t pixel, int tap) {
    block.pixel_begin = pixel;
    block.pixel_end = pixel + 1;
    block.tap_begin = tap;
    block.tap_end = tap + 1;
    source.kernels.plan(
        source.params, block, source.offset, source.mask, plan.data());
  }
};

// Calls f(group, part, column) for each weight group of a sample: `part` is the
// group's place in a row of all channels, `column` its place among the columns.
template <typename F>
void for_each_part(
    const DeformConv2dParams& p,
    int64_t pixel,
    int tap,
    const F& f) {
  for (int g = 0; g < p.G; ++g) {
    f(int64_t(g) * (p.C / p.G),
      g * p.column_group + (pixel - p.pixel_begin) * p.column_pixel +
          tap * p.column_tap);
  }
}

template <typename F>
void for_each_sample(const DeformConv2dParams& p, const F& f) {
  for (int64_t pixel = p.pixel_begin; pixel < p.pixel_end; ++pixel) {
    for (int tap = 0; tap < p.kH * p.kW; ++tap) {
      f(pixel, tap);
    }
  }
}

// A task's own array over the same memory. A node of the graph would be
// destroyed on the stream's thread while others still change it.
mx::array memory_of(const mx::array& x) {
  mx::array out(x.shape(), x.dtype(), nullptr, {});
  out.copy_shared_buffer(x);
  out.set_status(mx::array::Status::available);
  return out;
}

// Arrays that a task takes along, and keeps until it has run.
std::vector<mx::array> list_of(std::initializer_list<const mx::array*> list) {
  std::vector<mx::array> out;
  for (const mx::array* x : list) {
    if (x) {
      out.push_back(memory_of(*x));
    }
  }
  return out;
}

// Numbers of type R from an array of type T.
template <typename T, typename R>
std::vector<R> numbers(const mx::array& x) {
  std::vector<R> out(x.size());
  cpu::tile_kernels<T, R>().to_compute(x.data<T>(), out.data(), x.size());
  return out;
}

// Gives an output memory of its own where kernels do not write in place.
void own(mx::array* out) {
  if (out && !in_place()) {
    allocate(*out);
  }
}

} // namespace

bool in_place() {
  const char* text = std::getenv("MLX_DEFORM_STAND_IN");
  return text == nullptr || std::string(text) != "own";
}

void im2col(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& columns,
    mx::Stream stream) {
  own(&columns);
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = list_of({&input, &offset, mask}),
       columns = memory_of(columns)]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const Source<T, R> source(
              p, in[0], in[1], p.has_mask ? &in[2] : nullptr);
          OneSample<T, R> sample(p);
          std::vector<R> row(p.C);
          T* out = columns.data<T>();
          for_each_sample(p, [&](int64_t pixel, int tap) {
            sample.move_to(source, pixel, tap);
            source.kernels.sample(
                p,
                sample.block,
                sample.plan.data(),
                source.input,
                source.zeros.data(),
                row.data(),
                p.C,
                p.C);
            for_each_part(p, pixel, tap, [&](int64_t part, int64_t column) {
              source.kernels.from_compute(
                  row.data() + part, out + column, p.C / p.G);
            });
          });
        });
      });
}

namespace {

// A task's copy of a ColumnCotangent.
struct CotangentSource {
  std::optional<mx::array> columns;
  std::optional<mx::array> cotangent;
  std::optional<mx::array> weight;

  explicit CotangentSource(const ColumnCotangent& from) {
    if (from.columns) {
      columns = memory_of(*from.columns);
    } else {
      cotangent = memory_of(*from.cotangent);
      weight = memory_of(*from.weight);
    }
  }

  mx::Dtype dtype() const {
    return columns ? columns->dtype() : cotangent->dtype();
  }

  // Writes the cotangent of all channels of a sample's columns.
  template <typename T, typename R>
  void read(const DeformConv2dParams& p, int64_t pixel, int tap, R* row) const {
    const auto& kernels = cpu::tile_kernels<T, R>();
    const int width = p.C / p.G;
    const int outputs = p.O / p.G;
    for_each_part(p, pixel, tap, [&](int64_t part, int64_t column) {
      if (columns) {
        kernels.to_compute(columns->data<T>() + column, row + part, width);
        return;
      }
      std::vector<R> grads(outputs);
      std::vector<R> weights(width);
      const int64_t first = part / width * outputs;
      kernels.to_compute(
          cotangent->data<T>() + pixel * p.O + first, grads.data(), outputs);
      std::fill_n(row + part, width, R(0));
      for (int o = 0; o < outputs; ++o) {
        kernels.to_compute(
            weight->data<T>() + ((first + o) * p.kH * p.kW + tap) * width,
            weights.data(),
            width);
        for (int c = 0; c < width; ++c) {
          row[part + c] += grads[o] * weights[c];
        }
      }
    });
  }
};

// Calls f(sample, row) with the cotangent of each sample's columns.
template <typename T, typename R, typename F>
void for_each_cotangent(
    const DeformConv2dParams& p,
    const Source<T, R>& source,
    const CotangentSource& from,
    const F& f) {
  OneSample<T, R> sample(p);
  std::vector<R> row(p.C);
  for_each_sample(p, [&](int64_t pixel, int tap) {
    sample.move_to(source, pixel, tap);
    from.read<T, R>(p, pixel, tap, row.data());
    f(sample, row.data());
  });
}

} // namespace

void col2im(
    const DeformConv2dParams& p,
    const ColumnCotangent& grad_columns,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& grad_input,
    mx::Stream stream) {
  if (!in_place()) {
    zero_fill(grad_input, stream);
  }
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       from = CotangentSource(grad_columns),
       in = list_of({&offset, mask}),
       grad_input = memory_of(grad_input)]() mutable {
        cpu::dispatch_types(from.dtype(), [&]<typename T, typename R>() {
          // Scattering reads no image; anything stands in for it.
          const Source<T, R> source(
              p, in[0], in[0], p.has_mask ? &in[1] : nullptr);
          for_each_cotangent(
              p, source, from, [&](const auto& sample, const R* row) {
                source.kernels.scatter(
                    p,
                    sample.block,
                    sample.plan.data(),
                    row,
                    0,
                    grad_input.size(),
                    grad_input.data<R>());
              });
        });
      });
}

void offset_grad(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const ColumnCotangent& grad_columns,
    mx::array* grad_offset,
    mx::array* grad_mask,
    mx::Stream stream) {
  own(grad_offset);
  own(grad_mask);
  const int64_t first = in_place() ? 0 : p.pixel_begin * p.kH * p.kW * p.DG;
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       from = CotangentSource(grad_columns),
       in = list_of({&input, &offset, mask}),
       out = list_of({grad_offset, grad_mask}),
       first,
       wants_offset = grad_offset != nullptr,
       wants_mask = grad_mask != nullptr]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const Source<T, R> source(
              p, in[0], in[1], p.has_mask ? &in[2] : nullptr);
          // The kernels count from the first pixel of all.
          R* to_offset = wants_offset ? out[0].data<R>() - 2 * first : nullptr;
          R* to_mask = wants_mask ? out.back().data<R>() - first : nullptr;
          for_each_cotangent(
              p, source, from, [&](const auto& sample, const R* row) {
                source.kernels.offset_grad(
                    p,
                    sample.block,
                    sample.plan.data(),
                    source.input,
                    source.zeros.data(),
                    row,
                    to_offset,
                    to_mask);
              });
        });
      });
}

namespace {

// Sizes of a weight group's matrices.
struct GroupSizes {
  int64_t pixels;
  int64_t outputs;
  int64_t width;

  explicit GroupSizes(const DeformConv2dParams& p)
      : pixels(p.pixel_end - p.pixel_begin),
        outputs(p.O / p.G),
        width(int64_t(p.kH) * p.kW * (p.C / p.G)) {}
};

constexpr auto no = cpu::Transpose::no;
constexpr auto yes = cpu::Transpose::yes;

// The bias, or zeros.
template <typename T, typename R>
std::vector<R> bias_or_zeros(
    const DeformConv2dParams& p,
    const std::vector<mx::array>& in,
    size_t index) {
  return index < in.size() ? numbers<T, R>(in[index]) : std::vector<R>(p.O);
}

// The cotangents of the pixels, (pixels x O).
template <typename T, typename R>
std::vector<R> cotangent_rows(
    const DeformConv2dParams& p,
    const mx::array& cotangent) {
  std::vector<R> out((p.pixel_end - p.pixel_begin) * p.O);
  cpu::tile_kernels<T, R>().to_compute(
      cotangent.data<T>() + p.pixel_begin * p.O, out.data(), out.size());
  return out;
}

} // namespace

void output_product(
    const DeformConv2dParams& p,
    const mx::array& columns,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = list_of({&columns, &weight, bias}),
       out = memory_of(out)]() mutable {
        cpu::dispatch_types(out.dtype(), [&]<typename T, typename R>() {
          const GroupSizes size(p);
          const auto values = numbers<T, R>(in[0]);
          const auto weights = numbers<T, R>(in[1]);
          const auto shift = bias_or_zeros<T, R>(p, in, 2);
          std::vector<R> sums;
          for (int64_t i = 0; i < size.pixels; ++i) {
            sums.insert(sums.end(), shift.begin(), shift.end());
          }
          for (int g = 0; g < p.G; ++g) {
            cpu::gemm<R>(
                no,
                yes,
                size.pixels,
                size.outputs,
                size.width,
                values.data() + g * p.column_group,
                size.width,
                weights.data() + g * size.outputs * size.width,
                size.width,
                1,
                sums.data() + g * size.outputs,
                p.O);
          }
          cpu::tile_kernels<T, R>().from_compute(
              sums.data(), out.data<T>() + p.pixel_begin * p.O, sums.size());
        });
      });
}

void column_product(
    const DeformConv2dParams& p,
    const mx::array& cotangent,
    const mx::array& weight,
    mx::array& grad_columns,
    mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = list_of({&cotangent, &weight}),
       grad_columns = memory_of(grad_columns)]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const GroupSizes size(p);
          const auto rows = cotangent_rows<T, R>(p, in[0]);
          const auto weights = numbers<T, R>(in[1]);
          std::vector<R> sums(size.pixels * size.width);
          for (int g = 0; g < p.G; ++g) {
            cpu::gemm<R>(
                no,
                no,
                size.pixels,
                size.width,
                size.outputs,
                rows.data() + g * size.outputs,
                p.O,
                weights.data() + g * size.outputs * size.width,
                size.width,
                0,
                sums.data(),
                size.width);
            cpu::tile_kernels<T, R>().from_compute(
                sums.data(),
                grad_columns.data<T>() + g * p.column_group,
                sums.size());
          }
        });
      });
}

void weight_product(
    const DeformConv2dParams& p,
    const mx::array& cotangent,
    const mx::array& columns,
    mx::array& grad_weight,
    mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = list_of({&cotangent, &columns}),
       grad_weight = memory_of(grad_weight)]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const GroupSizes size(p);
          const auto rows = cotangent_rows<T, R>(p, in[0]);
          const auto values = numbers<T, R>(in[1]);
          for (int g = 0; g < p.G; ++g) {
            cpu::gemm<R>(
                yes,
                no,
                size.outputs,
                size.width,
                size.pixels,
                rows.data() + g * size.outputs,
                p.O,
                values.data() + g * p.column_group,
                size.width,
                1,
                grad_weight.data<R>() + g * size.outputs * size.width,
                size.width);
          }
        });
      });
}

namespace {

// Calls f(pixel, tap, row) with the columns of each sample, of all channels.
template <typename T, typename R, typename F>
void for_each_column(
    const DeformConv2dParams& p,
    const Source<T, R>& source,
    const F& f) {
  OneSample<T, R> sample(p);
  std::vector<R> row(p.C);
  for_each_sample(p, [&](int64_t pixel, int tap) {
    sample.move_to(source, pixel, tap);
    source.kernels.sample(
        p,
        sample.block,
        sample.plan.data(),
        source.input,
        source.zeros.data(),
        row.data(),
        p.C,
        p.C);
    f(pixel, tap, row.data());
  });
}

// Calls f(output, channel, element of the weight) for a tap.
template <typename F>
void for_each_weight(const DeformConv2dParams& p, int tap, const F& f) {
  const int width = p.C / p.G;
  for (int o = 0; o < p.O; ++o) {
    const int channel = o / (p.O / p.G) * width;
    for (int c = 0; c < width; ++c) {
      f(o, channel + c, (int64_t(o) * p.kH * p.kW + tap) * width + c);
    }
  }
}

} // namespace

void direct_output(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& weight,
    const mx::array* bias,
    mx::array& out,
    mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = list_of({&input, &offset, mask}),
       weights_in = list_of({&weight, bias}),
       out = memory_of(out)]() mutable {
        cpu::dispatch_types(out.dtype(), [&]<typename T, typename R>() {
          const Source<T, R> source(
              p, in[0], in[1], p.has_mask ? &in[2] : nullptr);
          const auto weights = numbers<T, R>(weights_in[0]);
          const auto shift = bias_or_zeros<T, R>(p, weights_in, 1);
          std::vector<R> sums(p.O);
          for_each_column(p, source, [&](int64_t pixel, int tap, const R* row) {
            if (tap == 0) {
              sums = shift;
            }
            for_each_weight(p, tap, [&](int o, int channel, int64_t at) {
              sums[o] += weights[at] * row[channel];
            });
            if (tap == p.kH * p.kW - 1) {
              source.kernels.from_compute(
                  sums.data(), out.data<T>() + pixel * p.O, p.O);
            }
          });
        });
      });
}

void direct_weight(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array* mask,
    const mx::array& cotangent,
    mx::array& grad_weight,
    mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = list_of({&input, &offset, mask}),
       cotangent = memory_of(cotangent),
       grad_weight = memory_of(grad_weight)]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const Source<T, R> source(
              p, in[0], in[1], p.has_mask ? &in[2] : nullptr);
          const auto rows = cotangent_rows<T, R>(p, cotangent);
          for_each_column(p, source, [&](int64_t pixel, int tap, const R* row) {
            const R* grads = rows.data() + (pixel - p.pixel_begin) * p.O;
            for_each_weight(p, tap, [&](int o, int channel, int64_t at) {
              grad_weight.data<R>()[at] += grads[o] * row[channel];
            });
          });
        });
      });
}

void zero_fill(mx::array& out, mx::Stream stream) {
  own(&out);
  mx::cpu::get_command_encoder(stream).dispatch(
      [out = memory_of(out)]() mutable {
        std::fill_n(out.data<char>(), out.nbytes(), char(0));
      });
}

void keep(const mx::array& x, mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [data = x.data_shared_ptr()]() {});
}

void drain(mx::Stream stream) {
  mx::synchronize(stream);
  // MLX would let go of them at the end of the whole primitive.
  mx::cpu::get_command_encoder(stream).temporaries().clear();
}

} // namespace mlx_deform::stand_in
