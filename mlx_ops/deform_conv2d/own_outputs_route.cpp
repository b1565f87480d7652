// Where every kernel has outputs of its own, CUDA: the sampling kernels and
// MLX's matmul, chunk by chunk. What a chunk makes is kept by what is encoded
// on the stream, so the stream runs dry after every other chunk; results are
// put together in place, by operations of MLX that reuse their first argument's
// memory. Beside the results there are the columns of two chunks and what two
// chunks add to them: each a weight in float32, and the images that its pixels
// lie in.

#include "mlx_ops/deform_conv2d/routes.h"

#include <algorithm>
#include <optional>

#include "mlx/ops.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/deform_conv2d/chunks.h"
#include "mlx_ops/deform_conv2d/gpu_kernels.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/gpu/run_now.h"
#include "mlx_ops/mlx_version.h"

namespace mlx_deform::gpu::own_outputs_route {

namespace {

// Large GPUs want large chunks.
constexpr int64_t kColumnMegabytes = 256;
constexpr size_t kChunksAtOnce = 2;

// An array that is to get its memory from a kernel.
mx::array unwritten(const mx::Shape& shape, mx::Dtype dtype) {
  mx::array out(shape, dtype, nullptr, {});
  out.set_status(mx::array::Status::available);
  return out;
}

// The images [begin, end) of an array whose first axis is the batch.
mx::array images_of(const mx::array& x, int begin, int end) {
  mx::Shape shape = x.shape();
  shape[0] = end - begin;
  const int64_t size = x.size() / std::max(x.shape(0), 1);
  mx::Strides strides(shape.size(), 1);
  for (int i = static_cast<int>(shape.size()) - 2; i >= 0; --i) {
    strides[i] = strides[i + 1] * shape[i + 1];
  }
  return view_of(x, shape, strides, begin * size);
}

// The convolution of some pixels, on the images that they lie in.
struct Chunk {
  DeformConv2dParams p; // of those images
  int first_image;
  int last_image; // and one
  int64_t pixel; // the first one, counted from the first of all
  int pixels;
  mx::array input;
  mx::array offset;
  std::optional<mx::array> mask;

  Chunk(const ConvArguments& at, const PixelRange& range)
      : p(at.p),
        first_image(range.begin / (int64_t(p.Ho) * p.Wo)),
        last_image((range.end - 1) / (int64_t(p.Ho) * p.Wo) + 1),
        pixel(range.begin),
        pixels(range.end - range.begin),
        input(images_of(at.input, first_image, last_image)),
        offset(images_of(at.offset, first_image, last_image)) {
    if (at.mask) {
      mask = images_of(*at.mask, first_image, last_image);
    }
    const int64_t before = int64_t(first_image) * p.Ho * p.Wo;
    p.N = last_image - first_image;
    p = with_pixels(p, range.begin - before, range.end - before);
  }

  const mx::array* mask_or_null() const {
    return mask ? &*mask : nullptr;
  }

  // (G, pixels, width)
  mx::array columns(mx::Stream stream) const {
    mx::array out =
        unwritten({p.G, pixels, p.kH * p.kW * (p.C / p.G)}, input.dtype());
    im2col(p, input, offset, mask_or_null(), out, stream);
    return out;
  }

  // (G, pixels, O / G)
  mx::array rows_of(const mx::array& cotangent) const {
    return view_of(
        cotangent, {p.G, pixels, p.O / p.G}, {p.O / p.G, p.O, 1}, pixel * p.O);
  }
};

std::vector<PixelRange>
chunks_of(const DeformConv2dParams& p, int64_t itemsize, int buffers) {
  // A row of products may be longer than one of columns.
  DeformConv2dParams q = p;
  q.pixel_begin = 0;
  q.pixel_end = int64_t(p.N) * p.Ho * p.Wo;
  const int64_t columns = int64_t(p.kH) * p.kW * p.C;
  const int64_t wider =
      std::max<int64_t>(1, p.O / std::max<int64_t>(columns, 1));
  const int64_t budget = column_budget(kColumnMegabytes) /
      (int64_t(kChunksAtOnce) * buffers * wider);
  return plan_chunks(q, itemsize, std::max<int64_t>(budget, 1));
}

mx::array
weight_groups(const ConvArguments& at, mx::Dtype dtype, mx::Stream s) {
  return mx::reshape(
      mx::astype(at.weight, dtype, s),
      {at.p.G, at.p.O / at.p.G, at.p.kH * at.p.kW * (at.p.C / at.p.G)},
      s);
}

mx::array swapped(const mx::array& x, mx::Stream s) {
  return mx::swapaxes(x, 1, 2, s);
}

// A result that chunks put together.
struct Whole {
  mx::array* result; // null: nobody wants it
  mx::Shape shape; // as which it is put together
  mx::Stream stream;
  std::optional<mx::array> made{};

  // `part` at the places from `start` on along the first axis, which nobody
  // else writes, or which it is added to.
  void put(const mx::array& part, int start) {
    place(part, start, false);
  }
  void add(const mx::array& part, int start) {
    place(part, start, true);
  }

  void finish() {
    if (result) {
      if (!made) {
        made = mx::zeros(shape, result->dtype(), stream);
      }
      const mx::array out = mx::reshape(*made, result->shape(), stream);
      made.reset();
      run_now(out, stream);
      result->copy_shared_buffer(out);
    }
  }

 private:
  void place(const mx::array& part, int start, bool adds) {
    if (!made && part.shape() == shape) { // the only one, or the first sum
      made = part;
    } else if (made && adds && part.shape() == shape) {
      made = mx::add(*made, part, stream);
    } else {
      if (!made) {
        made = mx::zeros(shape, part.dtype(), stream);
        run_now(*made, stream);
      }
      mx::Shape from(shape.size(), 0);
      mx::Shape to = shape;
      from[0] = start;
      to[0] = start + part.shape(0);
      made = adds ? slice_update_add(*made, part, from, to, stream)
                  : mx::slice_update(*made, part, from, to, stream);
    }
    run_now(*made, stream);
  }
};

// After every chunk.
void bound_memory(size_t chunk, mx::Stream stream) {
  if ((chunk + 1) % kChunksAtOnce == 0) {
    drain(stream);
  }
}

} // namespace

void forward(const ConvArguments& at, mx::array& out, mx::Stream stream) {
  const DeformConv2dParams& p = at.p;
  const mx::Dtype dtype = at.input.dtype();
  const mx::array kernel = swapped(weight_groups(at, dtype, stream), stream);
  std::optional<mx::array> shift; // the bias, as the products broadcast it
  if (at.bias) {
    shift = mx::reshape(
        mx::astype(*at.bias, dtype, stream), {p.G, 1, p.O / p.G}, stream);
  }
  const std::vector<PixelRange> chunks = chunks_of(p, mx::size_of(dtype), 1);
  const int pixels = static_cast<int>(int64_t(p.N) * p.Ho * p.Wo);
  Whole whole{&out, {pixels, p.O}, stream};
  for (size_t i = 0; i < chunks.size(); ++i) {
    const Chunk chunk(at, chunks[i]);
    const mx::array columns = chunk.columns(stream);
    const mx::array product = shift
        ? mx::addmm(*shift, columns, kernel, 1.0f, 1.0f, stream)
        : mx::matmul(columns, kernel, stream);
    const mx::array part = mx::reshape(
        mx::swapaxes(product, 0, 1, stream), {chunk.pixels, p.O}, stream);
    run_now(part, stream);
    whole.put(part, static_cast<int>(chunk.pixel));
    bound_memory(i, stream);
  }
  whole.finish();
}

void backward(
    const ConvArguments& at,
    const mx::array& cotangent,
    const Gradients& gradients,
    mx::Stream stream) {
  const DeformConv2dParams& p = at.p;
  const mx::Dtype dtype = at.input.dtype();
  const mx::Dtype compute = at.offset.dtype(); // of sums: float32 on a GPU
  const mx::array kernel = weight_groups(at, dtype, stream);
  run_now(kernel, stream);
  const int samples = p.DG * p.kH * p.kW;
  const int pixels = static_cast<int>(int64_t(p.N) * p.Ho * p.Wo);
  Whole grad_input{gradients.input, {p.N, p.H, p.W, p.C}, stream};
  Whole grad_offset{gradients.offset, {pixels, 2 * samples}, stream};
  Whole grad_mask{gradients.mask, {pixels, samples}, stream};
  Whole grad_weight{gradients.weight, kernel.shape(), stream};

  // Columns and their cotangent. In half types the former also in float32: a
  // product of halves would be rounded to half in every chunk, and TF32 holds
  // halves as they are.
  const std::vector<PixelRange> chunks = chunks_of(p, mx::size_of(compute), 2);
  for (size_t i = 0; i < chunks.size(); ++i) {
    const Chunk chunk(at, chunks[i]);
    const mx::array rows = chunk.rows_of(cotangent);
    if (gradients.weight) {
      const mx::array part = mx::matmul(
          swapped(mx::astype(rows, compute, stream), stream),
          mx::astype(chunk.columns(stream), compute, stream),
          stream);
      run_now(part, stream);
      grad_weight.add(part, 0);
    }
    if (gradients.input || gradients.offset || gradients.mask) {
      const mx::array grad_columns = mx::matmul(rows, kernel, stream);
      run_now(grad_columns, stream);
      if (gradients.input) {
        mx::array part = unwritten(chunk.input.shape(), compute);
        col2im(
            chunk.p,
            {&grad_columns},
            chunk.offset,
            chunk.mask_or_null(),
            part,
            deterministic(),
            stream);
        grad_input.add(part, chunk.first_image);
      }
      if (gradients.offset || gradients.mask) {
        mx::array to_offset = unwritten({chunk.pixels, 2 * samples}, compute);
        mx::array to_mask = unwritten({chunk.pixels, samples}, compute);
        offset_grad(
            chunk.p,
            chunk.input,
            chunk.offset,
            chunk.mask_or_null(),
            {&grad_columns},
            gradients.offset ? &to_offset : nullptr,
            gradients.mask ? &to_mask : nullptr,
            stream);
        if (gradients.offset) {
          grad_offset.put(to_offset, static_cast<int>(chunk.pixel));
        }
        if (gradients.mask) {
          grad_mask.put(to_mask, static_cast<int>(chunk.pixel));
        }
      }
    }
    bound_memory(i, stream);
  }
  for (Whole* whole : {&grad_input, &grad_offset, &grad_mask, &grad_weight}) {
    whole->finish();
  }
}

} // namespace mlx_deform::gpu::own_outputs_route
