#include "mlx_ops/stand_in/kernels.h"

#include <cstdlib>
#include <functional>
#include <string>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"
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

mx::array weak(const mx::array& x) {
  return mx::array::unsafe_weak_copy(x);
}

std::vector<mx::array> weak_list(std::initializer_list<const mx::array*> list) {
  std::vector<mx::array> out;
  for (const mx::array* x : list) {
    if (x) {
      out.push_back(weak(*x));
    }
  }
  return out;
}

// Gives an output memory of its own where kernels do not write in place.
void own(mx::array* out, mx::Stream stream) {
  if (out && !in_place()) {
    allocate(*out);
    keep(*out, stream);
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
  own(&columns, stream);
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = weak_list({&input, &offset, mask}),
       columns = weak(columns)]() mutable {
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

// Calls f(source, sample, row) with the cotangent of each sample's columns.
template <typename T, typename R, typename F>
void for_each_cotangent(
    const DeformConv2dParams& p,
    const Source<T, R>& source,
    const T* grad_columns,
    const F& f) {
  OneSample<T, R> sample(p);
  std::vector<R> row(p.C);
  for_each_sample(p, [&](int64_t pixel, int tap) {
    sample.move_to(source, pixel, tap);
    for_each_part(p, pixel, tap, [&](int64_t part, int64_t column) {
      source.kernels.to_compute(
          grad_columns + column, row.data() + part, p.C / p.G);
    });
    f(sample, row.data());
  });
}

} // namespace

void col2im(
    const DeformConv2dParams& p,
    const mx::array& grad_columns,
    const mx::array& offset,
    const mx::array* mask,
    mx::array& grad_input,
    mx::Stream stream) {
  if (!in_place()) {
    zero_fill(grad_input, stream);
  }
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = weak_list({&grad_columns, &offset, mask}),
       grad_input = weak(grad_input)]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          // Scattering reads no image; the columns stand in for it.
          const Source<T, R> source(
              p, in[0], in[1], p.has_mask ? &in[2] : nullptr);
          for_each_cotangent(
              p,
              source,
              in[0].data<T>(),
              [&](const auto& sample, const R* row) {
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
    const mx::array& grad_columns,
    mx::array* grad_offset,
    mx::array* grad_mask,
    mx::Stream stream) {
  own(grad_offset, stream);
  own(grad_mask, stream);
  const int64_t first = in_place() ? 0 : p.pixel_begin * p.kH * p.kW * p.DG;
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = weak_list({&input, &offset, &grad_columns, mask}),
       out = weak_list({grad_offset, grad_mask}),
       first,
       wants_offset = grad_offset != nullptr,
       wants_mask = grad_mask != nullptr]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const Source<T, R> source(
              p, in[0], in[1], p.has_mask ? &in[3] : nullptr);
          // The kernels count from the first pixel of all.
          R* to_offset = wants_offset ? out[0].data<R>() - 2 * first : nullptr;
          R* to_mask = wants_mask ? out.back().data<R>() - first : nullptr;
          for_each_cotangent(
              p,
              source,
              in[2].data<T>(),
              [&](const auto& sample, const R* row) {
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

void column_product(
    const DeformConv2dParams& p,
    const mx::array& cotangent,
    const mx::array& weight,
    mx::array& grad_columns,
    mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [p,
       in = weak_list({&cotangent, &weight}),
       grad_columns = weak(grad_columns)]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          const auto& kernels = cpu::tile_kernels<T, R>();
          const int out = p.O / p.G;
          const int width = p.kH * p.kW * (p.C / p.G);
          std::vector<R> weights(int64_t(p.O) * width);
          std::vector<R> row(p.O);
          std::vector<R> sums(width);
          kernels.to_compute(
              in[1].data<T>(), weights.data(), int64_t(p.O) * width);
          for (int64_t q = p.pixel_begin; q < p.pixel_end; ++q) {
            kernels.to_compute(in[0].data<T>() + q * p.O, row.data(), p.O);
            for (int g = 0; g < p.G; ++g) {
              std::fill(sums.begin(), sums.end(), R(0));
              for (int o = g * out; o < (g + 1) * out; ++o) {
                for (int j = 0; j < width; ++j) {
                  sums[j] += row[o] * weights[int64_t(o) * width + j];
                }
              }
              kernels.from_compute(
                  sums.data(),
                  grad_columns.data<T>() + g * p.column_group +
                      (q - p.pixel_begin) * p.column_pixel,
                  width);
            }
          }
        });
      });
}

void zero_fill(mx::array& out, mx::Stream stream) {
  own(&out, stream);
  mx::cpu::get_command_encoder(stream).dispatch([out = weak(out)]() mutable {
    std::fill_n(out.data<char>(), out.nbytes(), char(0));
  });
}

void keep(const mx::array& x, mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).add_temporary(x);
}

} // namespace mlx_deform::stand_in
