// Private functions that hand the GPU's dispatch plan and kernel source to the
// tests and to benchmarks/metal_roofline.py. They need no GPU.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "mlx_ops/cuda/launch.h"
#include "mlx_ops/deform_conv2d/chunks.h"
#include "mlx_ops/deform_conv2d/dispatch.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/metal/sources.h"
#include "python/src/launch_dicts.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

namespace cuda = mlx_deform::cuda;
namespace gpu = mlx_deform::gpu;
using mlx_deform::DeformConv2dParams;

// A struct from a dict with a value for every field, by name.
DeformConv2dParams params_from(const nb::dict& fields) {
  DeformConv2dParams p{};
#define READ(field) p.field = nb::cast<decltype(p.field)>(fields[#field])
  READ(N);
  READ(H);
  READ(W);
  READ(C);
  READ(O);
  READ(kH);
  READ(kW);
  READ(Ho);
  READ(Wo);
  READ(stride_h);
  READ(stride_w);
  READ(pad_h);
  READ(pad_w);
  READ(dilation_h);
  READ(dilation_w);
  READ(G);
  READ(DG);
  READ(has_mask);
  READ(pixel_begin);
  READ(pixel_end);
  READ(column_group);
  READ(column_pixel);
  READ(column_tap);
#undef READ
  return p;
}

nb::list list_of(const std::vector<gpu::PixelRange>& ranges) {
  nb::list out;
  for (const gpu::PixelRange& range : ranges) {
    out.append(nb::make_tuple(range.begin, range.end));
  }
  return out;
}

gpu::Launch plan(
    const std::string& op,
    const nb::dict& fields,
    const std::string& dtype,
    bool deterministic,
    bool wants_offset,
    bool wants_mask,
    bool has_bias,
    bool direct,
    const gpu::PlanOptions& options) {
  if (op == "zero_fill") {
    return gpu::plan_zero_fill(
        nb::cast<int64_t>(fields["size"]), dtype, options);
  }
  const DeformConv2dParams params = params_from(fields);
  if (op == "im2col") {
    return gpu::plan_im2col(params, dtype, options);
  }
  if (op == "col2im") {
    return gpu::plan_col2im(params, dtype, deterministic, direct, options);
  }
  if (op == "offset_grad") {
    return gpu::plan_offset_grad(
        params, dtype, wants_offset, wants_mask, direct, options);
  }
  if (op == "column_product") {
    return gpu::plan_column_product(params, dtype, options);
  }
  if (op == "output_product") {
    return gpu::plan_output_product(params, dtype, has_bias, options);
  }
  if (op == "weight_product") {
    return gpu::plan_weight_product(params, dtype, deterministic, options);
  }
  if (op == "direct_output") {
    return gpu::plan_direct_output(params, dtype, has_bias, options);
  }
  if (op == "direct_weight") {
    return gpu::plan_direct_weight(params, dtype, deterministic, options);
  }
  throw nb::value_error(
      ("[_dispatch_plan] op must be im2col, col2im, offset_grad, "
       "output_product, column_product, weight_product, direct_output, "
       "direct_weight or zero_fill; got " +
       op)
          .c_str());
}

// Binds f(launch, params) under the arguments that make a plan.
template <typename F>
void def_planned(nb::module_& m, const char* name, const char* doc, F f) {
  m.def(
      name,
      [f](const std::string& op,
          const nb::dict& params,
          const std::string& dtype,
          bool deterministic,
          bool wants_offset,
          bool wants_mask,
          bool has_bias,
          bool direct,
          int alignment,
          int vector_width,
          int index_bits,
          int64_t groups_per_row,
          int64_t max_threads) {
        gpu::PlanOptions options;
        options.alignment = alignment;
        options.vector_width = vector_width;
        options.index_bits = index_bits;
        options.groups_per_row = groups_per_row;
        gpu::Launch launch = plan(
            op,
            params,
            dtype,
            deterministic,
            wants_offset,
            wants_mask,
            has_bias,
            direct,
            options);
        if (max_threads > 0) {
          launch.group = gpu::fit_group(launch, max_threads);
        }
        return f(launch, params);
      },
      "op"_a,
      "params"_a,
      "dtype"_a = "float32",
      nb::kw_only(),
      "deterministic"_a = false,
      "wants_offset"_a = true,
      "wants_mask"_a = true,
      "has_bias"_a = true,
      "direct"_a = false,
      "alignment"_a = gpu::PlanOptions{}.alignment,
      "vector_width"_a = 0,
      "index_bits"_a = 0,
      "groups_per_row"_a = gpu::PlanOptions{}.groups_per_row,
      "max_threads"_a = 0,
      doc);
}

} // namespace

void init_deform_conv2d_dispatch(nb::module_& m) {
  def_planned(
      m,
      "_dispatch_plan",
      "The launch of a GPU kernel, as the Metal backend encodes it. `params` "
      "holds the fields of DeformConv2dParams, or `size` for zero_fill.",
      [](const gpu::Launch& launch, const nb::dict&) {
        return dict_of(launch);
      });

  def_planned(
      m,
      "_cuda_kernel",
      "What the CUDA backend makes of a launch that is not empty: the "
      "arguments "
      "of MLX's cuda_kernel, and the words that carry the sizes.",
      [](const gpu::Launch& launch, const nb::dict& params) {
        return dict_of(
            cuda::custom_kernel(launch, gpu::bytes_of(params_from(params))));
      });

  m.def(
      "_params_bytes",
      [](const nb::dict& params) {
        return python_bytes_of(params_from(params));
      },
      "params"_a,
      "A DeformConv2dParams as the kernels receive it.");

  m.def(
      "_chunk_plan",
      [](const nb::dict& params, int64_t itemsize, int64_t budget) {
        const DeformConv2dParams p = params_from(params);
        if (budget == 0) {
          budget = gpu::chunk_budget(p, itemsize, gpu::column_budget(64));
        }
        return list_of(gpu::plan_chunks(p, itemsize, budget));
      },
      "params"_a,
      "itemsize"_a,
      "budget"_a = 0,
      "The [begin, end) output pixels of every chunk of columns, of a budget "
      "in bytes; 0 is what an Apple GPU's chunks have.");

  m.def(
      "_piece_plan",
      [](const nb::dict& params,
         bool output,
         bool grad_weight,
         bool grad_input,
         bool grad_samples,
         bool deterministic) {
        const DeformConv2dParams p = params_from(params);
        const int count = gpu::piece_count(
            p, {output, grad_weight, grad_input, grad_samples, deterministic});
        std::vector<gpu::PixelRange> out;
        for (int i = 0; i < count; ++i) {
          out.push_back(gpu::piece_pixels(p, i, count));
        }
        return list_of(out);
      },
      "params"_a,
      nb::kw_only(),
      "output"_a = false,
      "grad_weight"_a = false,
      "grad_input"_a = false,
      "grad_samples"_a = false,
      "deterministic"_a = false,
      "The [begin, end) output pixels of every primitive that shares the "
      "work.");

  m.def(
      "_operations",
      [](const nb::dict& params,
         bool output,
         bool grad_weight,
         bool grad_input,
         bool grad_samples,
         bool deterministic) {
        return gpu::operations(
            params_from(params),
            {output, grad_weight, grad_input, grad_samples, deterministic});
      },
      "params"_a,
      nb::kw_only(),
      "output"_a = false,
      "grad_weight"_a = false,
      "grad_input"_a = false,
      "grad_samples"_a = false,
      "deterministic"_a = false,
      "Floating-point operations of the pixels [pixel_begin, pixel_end).");

  m.def(
      "_is_direct",
      [](const nb::dict& params) {
        return gpu::is_direct(params_from(params));
      },
      "params"_a,
      "Whether an Apple GPU does without columns.");

  m.def(
      "_metal_source",
      [](const std::string& dtype, int index_bits) {
        return gpu::library_header({dtype, index_bits}) +
            mlx_deform::metal::kernel_source;
      },
      "dtype"_a,
      "index_bits"_a,
      "The text that Metal compiles for a data type and an index width.");
}
