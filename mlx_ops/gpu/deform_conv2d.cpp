// The convolution on a GPU: the backend's sampling kernels and MLX's matmul,
// chunk by chunk of output pixels. The memory of the columns is bounded
// whatever the image, and nothing of it outlives the call: where kernels write
// in place, one buffer holds the columns of every chunk. Elsewhere each chunk
// has columns of its own, which what is encoded on the stream keeps until it
// has run, so the stream runs dry before more than kChunksAtOnce chunks are
// held.

#include "mlx_ops/deform_conv2d.h"

#include <algorithm>
#include <optional>

#include "mlx/ops.h"
#include "mlx/stream.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/gpu/dispatch.h"
#include "mlx_ops/gpu/kernels.h"
#include "mlx_ops/gpu/run_now.h"

namespace mlx_deform {

namespace gpu {

namespace {

// Enough for the GPU to be busy for many times as long as it waits for the
// host, which encodes nothing meanwhile.
constexpr size_t kChunksAtOnce = 8;

// Whole arrays, before in-place kernels write them.
void prepare(std::initializer_list<mx::array*> arrays, mx::Stream stream) {
  for (mx::array* x : arrays) {
    if (x && in_place(stream)) {
      allocate(*x);
    }
  }
}

// `shape` elements of the buffer of `x`, from element `offset` on.
mx::array view_of(
    const mx::array& x,
    const mx::Shape& shape,
    const mx::Strides& strides,
    int64_t offset = 0) {
  mx::array view(shape, x.dtype(), nullptr, {});
  bool row_contiguous = true;
  int64_t size = 1;
  for (int i = static_cast<int>(shape.size()) - 1; i >= 0; --i) {
    row_contiguous = row_contiguous && (shape[i] == 1 || strides[i] == size);
    size *= shape[i];
  }
  view.copy_shared_buffer(
      x,
      strides,
      {row_contiguous, row_contiguous, row_contiguous && shape.size() == 1},
      size,
      offset);
  view.set_status(mx::array::Status::available);
  return view;
}

// The convolution as batched products, one for each weight group: columns
// (pixels x width) and weight (out x width) of a group.
struct Products {
  DeformConv2dParams p;
  mx::Dtype dtype;
  mx::Stream stream;
  std::vector<Chunk> chunks;
  int out; // output channels of a group
  int width; // columns of a group
  int64_t most_pixels{0};

  Products(const DeformConv2dParams& params, mx::Dtype t, mx::Stream s)
      : p(params),
        dtype(t),
        stream(s),
        chunks(plan_chunks(p, mx::size_of(t), column_budget())),
        out(p.O / p.G),
        width(p.kH * p.kW * (p.C / p.G)) {
    for (const Chunk& chunk : chunks) {
      most_pixels = std::max(most_pixels, chunk.pixel_end - chunk.pixel_begin);
    }
  }

  // The params of one chunk, whose columns lie as (G, pixels, kH * kW * C / G).
  DeformConv2dParams at(const Chunk& chunk) const {
    DeformConv2dParams q = p;
    q.pixel_begin = chunk.pixel_begin;
    q.pixel_end = chunk.pixel_end;
    q.column_group = (chunk.pixel_end - chunk.pixel_begin) * width;
    q.column_pixel = width;
    q.column_tap = p.C / p.G;
    return q;
  }

  // Memory for the columns of any chunk, where kernels write in place, and the
  // columns of one of them, which elsewhere get their memory when written.
  mx::array column_buffer() const {
    mx::array columns(
        {p.G, static_cast<int>(most_pixels), width}, dtype, nullptr, {});
    if (in_place(stream)) {
      allocate(columns);
      keep(columns, stream);
    }
    columns.set_status(mx::array::Status::available);
    return columns;
  }
  mx::array columns_at(const mx::array& buffer, const Chunk& chunk) const {
    const auto n = static_cast<int>(chunk.pixel_end - chunk.pixel_begin);
    const mx::Shape shape{p.G, n, width};
    if (in_place(stream)) {
      return view_of(buffer, shape, {int64_t(n) * width, width, 1});
    }
    mx::array columns(shape, dtype, nullptr, {});
    columns.set_status(mx::array::Status::available);
    return columns;
  }

  // After a chunk was encoded.
  void bound_memory(const Chunk& chunk) const {
    const size_t number = &chunk - chunks.data() + 1;
    if (!in_place(stream) && number % kChunksAtOnce == 0 &&
        number < chunks.size()) {
      mx::synchronize(stream);
    }
  }

  mx::array weight_groups(const mx::array& weight) const {
    return mx::reshape(
        mx::astype(weight, dtype, stream), {p.G, out, width}, stream);
  }
};

mx::array swapped(const mx::array& x, mx::Stream stream) {
  return mx::swapaxes(x, 1, 2, stream);
}

void forward(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array& weight,
    const mx::array* bias,
    const mx::array* mask,
    mx::array& out,
    mx::Stream stream) {
  if (out.size() == 0) {
    allocate(out);
    return;
  }
  const Products products(p, input.dtype(), stream);
  const mx::array buffer = products.column_buffer();
  const mx::array kernel = swapped(products.weight_groups(weight), stream);

  std::optional<mx::array> shift; // the bias, as the products broadcast it
  if (bias) {
    shift = mx::reshape(
        mx::astype(*bias, input.dtype(), stream),
        {p.G, 1, products.out},
        stream);
  }

  std::vector<mx::array> parts; // (pixels, G, O / G) of each chunk
  for (const Chunk& chunk : products.chunks) {
    mx::array columns = products.columns_at(buffer, chunk);
    im2col(products.at(chunk), input, offset, mask, columns, stream);
    const mx::array part = shift
        ? mx::addmm(*shift, columns, kernel, 1.0f, 1.0f, stream)
        : mx::matmul(columns, kernel, stream);
    run_now(part, stream);
    parts.push_back(mx::swapaxes(part, 0, 1, stream));
    products.bound_memory(chunk);
  }
  const mx::array all =
      parts.size() == 1 ? parts[0] : mx::concatenate(parts, 0, stream);
  const mx::array result =
      mx::contiguous(mx::reshape(all, out.shape(), stream), false, stream);
  run_now(result, stream);
  out.copy_shared_buffer(result);
}

// What the caller wants; null: not this one.
struct Gradients {
  mx::array* input;
  mx::array* offset;
  mx::array* weight;
  mx::array* mask;
};

// A gradient that the chunks make together. In place they share it;
// elsewhere each makes a part, the rows of its pixels or a summand.
struct Joined {
  mx::array* whole; // null: nobody wants it
  mx::Stream stream;
  std::vector<mx::array> parts{};

  // What the next chunk's kernel writes.
  mx::array* next(const mx::Shape& shape) {
    if (!whole || in_place(stream)) {
      return whole;
    }
    parts.emplace_back(
        shape, whole->dtype(), nullptr, std::vector<mx::array>{});
    parts.back().set_status(mx::array::Status::available);
    return &parts.back();
  }

  // After it was encoded, for summands: so that there is one at a time.
  void add_up() {
    if (parts.size() == 2) {
      parts = {mx::add(parts[0], parts[1], stream)};
      run_now(parts[0], stream);
    }
  }

  void finish() {
    if (parts.empty()) {
      return;
    }
    const mx::array all = mx::reshape(
        parts.size() == 1 ? parts[0] : mx::concatenate(parts, 0, stream),
        whole->shape(),
        stream);
    run_now(all, stream);
    whole->copy_shared_buffer(all);
  }
};

// The cotangent of a chunk's columns: rows (G, pixels, O / G) times the weight
// (G, O / G, width).
mx::array column_cotangent(
    const Products& products,
    const Chunk& chunk,
    const mx::array& cotangent,
    const mx::array& rows,
    const mx::array& kernel,
    std::optional<mx::array>& columns) {
  if (products.chunks.size() == 1 || !in_place(products.stream)) {
    const mx::array product = mx::matmul(rows, kernel, products.stream);
    run_now(product, products.stream);
    return product;
  }
  // MLX's matmul allocates its result, which would be all columns at once. This
  // product goes into the buffer that all chunks share.
  column_product(
      products.at(chunk), cotangent, kernel, *columns, products.stream);
  return *columns;
}

void backward(
    const DeformConv2dParams& p,
    const mx::array& input,
    const mx::array& offset,
    const mx::array& weight,
    const mx::array& cotangent,
    const mx::array* mask,
    Gradients gradients,
    mx::Stream stream) {
  const Products products(p, input.dtype(), stream);
  if (products.chunks.empty()) {
    for (mx::array* x :
         {gradients.input,
          gradients.offset,
          gradients.weight,
          gradients.mask}) {
      if (x) {
        prepare({x}, stream);
        zero_fill(*x, stream);
      }
    }
    return;
  }
  prepare({gradients.input, gradients.offset, gradients.mask}, stream);
  if (gradients.input && in_place(stream)) {
    zero_fill(*gradients.input, stream);
  }
  Joined grad_input{gradients.input, stream};
  Joined grad_offset{gradients.offset, stream};
  Joined grad_mask{gradients.mask, stream};
  const bool wants_columns =
      gradients.input || gradients.offset || gradients.mask;
  const mx::array kernel = products.weight_groups(weight);
  run_now(kernel, stream);
  // A single chunk needs it for the weight's gradient alone: MLX's matmul makes
  // the columns' cotangents then.
  std::optional<mx::array> buffer;
  if (gradients.weight || (products.chunks.size() > 1 && in_place(stream))) {
    buffer = products.column_buffer();
  }
  std::optional<mx::array> weight_sum;

  for (const Chunk& chunk : products.chunks) {
    const DeformConv2dParams q = products.at(chunk);
    const auto n = static_cast<int>(chunk.pixel_end - chunk.pixel_begin);
    // (G, pixels, O / G)
    const mx::array rows = view_of(
        cotangent,
        {p.G, n, products.out},
        {products.out, p.O, 1},
        chunk.pixel_begin * p.O);
    std::optional<mx::array> columns;
    if (buffer) {
      columns = products.columns_at(*buffer, chunk);
    }
    if (gradients.weight) {
      im2col(q, input, offset, mask, *columns, stream);
      // Summed in float32, as are the other gradients.
      const mx::array part = mx::astype(
          mx::matmul(swapped(rows, stream), *columns, stream),
          gradients.weight->dtype(),
          stream);
      weight_sum = weight_sum ? mx::add(*weight_sum, part, stream) : part;
      run_now(*weight_sum, stream);
    }
    if (wants_columns) {
      const mx::array grad_columns =
          column_cotangent(products, chunk, cotangent, rows, kernel, columns);
      if (gradients.input) {
        col2im(
            q,
            grad_columns,
            offset,
            mask,
            *grad_input.next(input.shape()),
            deterministic(),
            stream);
        grad_input.add_up();
      }
      if (gradients.offset || gradients.mask) {
        offset_grad(
            q,
            input,
            offset,
            mask,
            grad_columns,
            grad_offset.next({n, offset.shape(-1)}),
            grad_mask.next({n, p.DG * p.kH * p.kW}),
            stream);
      }
    }
    products.bound_memory(chunk);
  }
  grad_input.finish();
  grad_offset.finish();
  grad_mask.finish();
  if (gradients.weight) {
    const mx::array sum =
        mx::reshape(*weight_sum, gradients.weight->shape(), stream);
    run_now(sum, stream);
    gradients.weight->copy_shared_buffer(sum);
  }
}

} // namespace

} // namespace gpu

void DeformConv2d::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  gpu::forward(
      params(inputs),
      inputs[0],
      inputs[1],
      inputs[2],
      has_bias_ ? &inputs[bias_index()] : nullptr,
      has_mask_ ? &inputs[mask_index()] : nullptr,
      outputs[0],
      stream());
}

void DeformConv2dVJP::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  size_t next = 0;
  const auto take = [&](bool wanted) {
    return wanted ? &outputs[next++] : nullptr;
  };
  gpu::Gradients gradients{};
  gradients.input = take(wanted_.input);
  gradients.offset = take(wanted_.offset);
  gradients.weight = take(wanted_.weight);
  gradients.mask = take(wanted_.mask);
  gpu::backward(
      params(inputs),
      inputs[0],
      inputs[1],
      inputs[2],
      inputs[3],
      has_mask_ ? &inputs[4] : nullptr,
      gradients,
      stream());
}

} // namespace mlx_deform
