// The op's GPU kernels as plain functions, pixel by pixel.

#include "mlx_ops/stand_in/numbers.h"
#include "mlx_ops/stand_in/registry.h"

#include <algorithm>
#include <vector>

#include "mlx_ops/cpu/gemm.h"
#include "mlx_ops/cpu/tiles.h"
#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform::stand_in {

namespace {

using cpu::Block;
using cpu::Columns;
using cpu::SampleBlock;
using cpu::Source;

// One sample of all channels, planned and ready.
template <typename T, typename R>
struct OneSample {
  Block block;
  std::vector<SampleBlock<R>> plan;

  explicit OneSample(const DeformConv2dParams& p)
      : block{}, plan(SampleBlock<R>::blocks(p.DG)) {
    block.channel_end = p.C;
  }

  void move_to(const Source<T, R>& source, int64_t pixel, int tap) {
    block.pixel_begin = pixel;
    block.pixel_end = pixel + 1;
    block.tap_begin = tap;
    block.tap_end = tap + 1;
    source.plan(block, plan.data());
  }

  Columns<R> columns(R* row) const {
    const int C = block.channels();
    return {block, block, plan.data(), row, C, C};
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

void im2col(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  cpu::dispatch_types(in.at("input").dtype(), [&]<typename T, typename R>() {
    const Source<T, R> source(
        p, in.at("input"), in.at("offset"), find(in, "mask"));
    OneSample<T, R> sample(p);
    std::vector<R> row(p.C);
    T* columns = out.at("columns").data<T>();
    for_each_sample(p, [&](int64_t pixel, int tap) {
      sample.move_to(source, pixel, tap);
      source.sample(sample.columns(row.data()));
      for_each_part(p, pixel, tap, [&](int64_t part, int64_t column) {
        source.kernels.from_compute(
            row.data() + part, columns + column, p.C / p.G);
      });
    });
  });
}

// The columns' cotangent: read, or made of the output's and the weight.
struct CotangentSource {
  const mx::array* columns;
  const mx::array* cotangent;
  const mx::array* weight;

  explicit CotangentSource(const Arrays& in)
      : columns(find(in, "grad_columns")),
        cotangent(find(in, "cotangent")),
        weight(find(in, "weight")) {}

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

void col2im(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  const CotangentSource from(in);
  mx::array& grad_input = out.at("grad_input");
  cpu::dispatch_types(from.dtype(), [&]<typename T, typename R>() {
    // Scattering reads no image; anything stands in for it.
    const Source<T, R> source(
        p, in.at("offset"), in.at("offset"), find(in, "mask"));
    std::vector<R> sink(p.C / p.DG);
    for_each_cotangent(p, source, from, [&](const auto& sample, const R* row) {
      source.kernels.scatter(
          p,
          sample.block,
          sample.plan.data(),
          row,
          0,
          grad_input.size(),
          sink.data(),
          grad_input.data<R>());
    });
  });
}

void offset_grad(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  const CotangentSource from(in);
  const bool wants_offset = out.count("grad_offset") > 0;
  const bool wants_mask = out.count("grad_mask") > 0;
  // Outputs of their own hold the pixels' rows alone.
  const int64_t first = in_place() ? 0 : p.pixel_begin * p.kH * p.kW * p.DG;
  cpu::dispatch_types(in.at("input").dtype(), [&]<typename T, typename R>() {
    const Source<T, R> source(
        p, in.at("input"), in.at("offset"), find(in, "mask"));
    // The kernels count from the first pixel of all.
    R* to_offset =
        wants_offset ? out.at("grad_offset").data<R>() - 2 * first : nullptr;
    R* to_mask = wants_mask ? out.at("grad_mask").data<R>() - first : nullptr;
    for_each_cotangent(p, source, from, [&](const auto& sample, const R* row) {
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
}

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

template <typename T, typename R>
std::vector<R> bias_or_zeros(const DeformConv2dParams& p, const Arrays& in) {
  const mx::array* bias = find(in, "bias");
  return bias ? numbers<T, R>(*bias) : std::vector<R>(p.O);
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

void output_product(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  cpu::dispatch_types(in.at("columns").dtype(), [&]<typename T, typename R>() {
    const GroupSizes size(p);
    const auto values = numbers<T, R>(in.at("columns"));
    const auto weights = numbers<T, R>(in.at("weight"));
    const auto shift = bias_or_zeros<T, R>(p, in);
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
        sums.data(),
        out.at("out").data<T>() + p.pixel_begin * p.O,
        sums.size());
  });
}

void column_product(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  cpu::dispatch_types(
      in.at("cotangent").dtype(), [&]<typename T, typename R>() {
        const GroupSizes size(p);
        const auto rows = cotangent_rows<T, R>(p, in.at("cotangent"));
        const auto weights = numbers<T, R>(in.at("weight"));
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
              out.at("grad_columns").data<T>() + g * p.column_group,
              sums.size());
        }
      });
}

void weight_product(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  cpu::dispatch_types(
      in.at("cotangent").dtype(), [&]<typename T, typename R>() {
        const GroupSizes size(p);
        const auto rows = cotangent_rows<T, R>(p, in.at("cotangent"));
        const auto values = numbers<T, R>(in.at("columns"));
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
              out.at("grad_weight").data<R>() + g * size.outputs * size.width,
              size.width);
        }
      });
}

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
    source.sample(sample.columns(row.data()));
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

void direct_output(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  cpu::dispatch_types(in.at("input").dtype(), [&]<typename T, typename R>() {
    const Source<T, R> source(
        p, in.at("input"), in.at("offset"), find(in, "mask"));
    const auto weights = numbers<T, R>(in.at("weight"));
    const auto shift = bias_or_zeros<T, R>(p, in);
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
            sums.data(), out.at("out").data<T>() + pixel * p.O, p.O);
      }
    });
  });
}

void direct_weight(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const auto p = params_from<DeformConv2dParams>(params);
  cpu::dispatch_types(in.at("input").dtype(), [&]<typename T, typename R>() {
    const Source<T, R> source(
        p, in.at("input"), in.at("offset"), find(in, "mask"));
    const auto rows = cotangent_rows<T, R>(p, in.at("cotangent"));
    for_each_column(p, source, [&](int64_t pixel, int tap, const R* row) {
      const R* grads = rows.data() + (pixel - p.pixel_begin) * p.O;
      for_each_weight(p, tap, [&](int o, int channel, int64_t at) {
        out.at("grad_weight").data<R>()[at] += grads[o] * row[channel];
      });
    });
  });
}

const Registration registrations[] = {
    {"deform_im2col", im2col},
    {"deform_col2im", col2im},
    {"deform_col2im_ordered", col2im},
    {"deform_offset_grad", offset_grad},
    {"deform_output_product", output_product},
    {"deform_column_product", column_product},
    {"deform_weight_product", weight_product},
    {"deform_grouped_output", direct_output},
    {"deform_depthwise_output", direct_output},
    {"deform_grouped_weight", direct_weight},
    {"deform_depthwise_weight", direct_weight},
};

} // namespace

} // namespace mlx_deform::stand_in
