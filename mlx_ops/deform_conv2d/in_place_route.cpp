// Where kernels write in place, Apple's GPUs: one command buffer, in which
// every product goes straight where it belongs. Beside the results there are
// two buffers of columns, whatever the image, and no more.
//
// The products are kernels of our own rather than MLX's matmul, which allocates
// each of its results and keeps it until the command buffer has run, and which
// rounds the weight's gradient of every chunk to half precision. Its kernels
// could be launched by name into our buffers, but names and arguments change
// from version to version. So products are float32 throughout, whatever
// MLX_ENABLE_TF32 says, and however many chunks there are; the price is that
// the neural accelerators of the M5 stay idle.

#include "mlx_ops/deform_conv2d/routes.h"

#include <algorithm>
#include <optional>

#include "mlx_ops/arrays.h"
#include "mlx_ops/deform_conv2d/chunks.h"
#include "mlx_ops/deform_conv2d/dispatch.h"
#include "mlx_ops/deform_conv2d/gpu_kernels.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform::gpu::in_place_route {

namespace {

constexpr int64_t kColumnMegabytes = 64;

// The chunks of a call, and memory for the columns of any of them.
struct Chunks {
  const DeformConv2dParams& p;
  mx::Dtype dtype;
  mx::Stream stream;
  std::vector<PixelRange> ranges;

  Chunks(const DeformConv2dParams& params, mx::Dtype t, mx::Stream s)
      : p(params), dtype(t), stream(s) {
    const int64_t itemsize = mx::size_of(dtype);
    ranges = plan_chunks(
        p,
        itemsize,
        chunk_budget(p, itemsize, column_budget(kColumnMegabytes)));
  }

  mx::array buffer() const {
    int64_t most = 0;
    for (const PixelRange& range : ranges) {
      most = std::max(most, range.end - range.begin);
    }
    mx::array out(
        {static_cast<int>(most), p.kH * p.kW * p.C}, dtype, nullptr, {});
    allocate(out);
    out.set_status(mx::array::Status::available);
    keep(out, stream);
    return out;
  }
};

} // namespace

void forward(const ConvArguments& at, mx::array& out, mx::Stream stream) {
  const mx::Dtype dtype = at.input.dtype();
  const mx::array weight = as_type(at.weight, dtype, stream);
  std::optional<mx::array> shift;
  if (at.bias) {
    shift = as_type(*at.bias, dtype, stream);
  }
  const mx::array* bias = shift ? &*shift : nullptr;
  if (is_direct(at.p)) {
    direct_output(
        at.p, at.input, at.offset, at.mask, weight, bias, out, stream);
    return;
  }

  const Chunks chunks(at.p, dtype, stream);
  // Two, in turns: while one chunk is multiplied, the next one is sampled,
  // because nothing that is encoded between two products waits for the first.
  std::vector<mx::array> buffers;
  const size_t count = chunks.ranges.size();
  for (size_t i = 0; i < std::min<size_t>(count, 2); ++i) {
    buffers.push_back(chunks.buffer());
  }
  const auto sample = [&](size_t i) {
    const PixelRange& range = chunks.ranges[i];
    im2col(
        with_pixels(at.p, range.begin, range.end),
        at.input,
        at.offset,
        at.mask,
        buffers[i % 2],
        stream);
  };
  for (size_t i = 0; i < count; ++i) {
    if (i == 0) {
      sample(0);
    }
    const PixelRange& range = chunks.ranges[i];
    output_product(
        with_pixels(at.p, range.begin, range.end),
        buffers[i % 2],
        weight,
        bias,
        out,
        stream);
    if (i + 1 < count) {
      sample(i + 1);
    }
  }
}

namespace {

// What the columns' cotangent gives.
void gradients_of_samples(
    const DeformConv2dParams& p,
    const ConvArguments& at,
    const ColumnCotangent& grad_columns,
    const Gradients& gradients,
    mx::Stream stream) {
  if (gradients.input) {
    col2im(
        p,
        grad_columns,
        at.offset,
        at.mask,
        *gradients.input,
        deterministic(),
        stream);
  }
  if (gradients.offset || gradients.mask) {
    offset_grad(
        p,
        at.input,
        at.offset,
        at.mask,
        grad_columns,
        gradients.offset,
        gradients.mask,
        stream);
  }
}

} // namespace

void backward(
    const ConvArguments& at,
    const mx::array& cotangent,
    const Gradients& gradients,
    mx::Stream stream) {
  const mx::Dtype dtype = at.input.dtype();
  const mx::array weight = as_type(at.weight, dtype, stream);
  if (is_direct(at.p)) {
    if (gradients.weight) {
      direct_weight(
          at.p,
          at.input,
          at.offset,
          at.mask,
          cotangent,
          *gradients.weight,
          deterministic(),
          stream);
    }
    gradients_of_samples(
        at.p, at, {nullptr, &cotangent, &weight}, gradients, stream);
    return;
  }

  const Chunks chunks(at.p, dtype, stream);
  if (chunks.ranges.empty()) {
    return;
  }
  std::optional<mx::array> columns;
  std::optional<mx::array> grad_columns;
  if (gradients.weight) {
    columns = chunks.buffer();
  }
  if (gradients.input || gradients.offset || gradients.mask) {
    grad_columns = chunks.buffer();
  }
  // Sampling and the product with the weight don't wait for one another, and
  // neither do what reads the columns and what reads their cotangent.
  for (const PixelRange& range : chunks.ranges) {
    const DeformConv2dParams p = with_pixels(at.p, range.begin, range.end);
    if (columns) {
      im2col(p, at.input, at.offset, at.mask, *columns, stream);
    }
    if (grad_columns) {
      column_product(p, cotangent, weight, *grad_columns, stream);
    }
    if (columns) {
      weight_product(
          p, cotangent, *columns, *gradients.weight, deterministic(), stream);
    }
    if (grad_columns) {
      gradients_of_samples(p, at, {&*grad_columns}, gradients, stream);
    }
  }
}

} // namespace mlx_deform::gpu::in_place_route
