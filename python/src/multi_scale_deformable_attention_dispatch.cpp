// Private functions that hand the GPU's plans of multi-scale deformable
// attention to the tests and to benchmarks/msda_roofline.py. They need no GPU.

#include <array>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "mlx_ops/gpu/run.h"
#include "mlx_ops/multi_scale_deformable_attention/dispatch.h"
#include "python/src/launch_dicts.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

namespace cuda = mlx_deform::cuda;
namespace gpu = mlx_deform::gpu;
using mlx_deform::MsdaLevel;
using mlx_deform::MsdaParams;

// A struct from a dict with a value for every field, by name.
MsdaParams params_from(const nb::dict& fields) {
  MsdaParams p{};
#define READ(field) p.field = nb::cast<decltype(p.field)>(fields[#field])
  READ(N);
  READ(S);
  READ(Q);
  READ(M);
  READ(D);
  READ(L);
  READ(K);
  READ(is_discrete);
  READ(query_begin);
  READ(query_end);
#undef READ
  return p;
}

std::vector<MsdaLevel> levels_from(
    const std::vector<std::array<int, 4>>& rows) {
  std::vector<MsdaLevel> out;
  for (const auto& [H, W, start, first] : rows) {
    out.push_back({H, W, start, first});
  }
  return out;
}

gpu::Launch plan(
    const std::string& op,
    const MsdaParams& params,
    const std::vector<MsdaLevel>& levels,
    const std::string& dtype,
    bool deterministic,
    bool wants_locations,
    bool wants_weights,
    int rows_per_thread,
    const gpu::PlanOptions& options) {
  gpu::check_levels(params, levels);
  if (op == "forward") {
    return gpu::plan_msda_forward(params, dtype, options);
  }
  if (op == "grad_value") {
    return gpu::plan_msda_grad_value(
        params,
        dtype,
        deterministic,
        gpu::msda_map_rows(levels),
        options,
        rows_per_thread);
  }
  if (op == "grad_samples") {
    return gpu::plan_msda_grad_samples(
        params, dtype, wants_locations, wants_weights, options);
  }
  throw nb::value_error(
      ("[_msda_plan] op must be forward, grad_value or grad_samples; got " + op)
          .c_str());
}

// Binds f(launch, params) under the arguments that make a plan.
template <typename F>
void def_planned(nb::module_& m, const char* name, const char* doc, F f) {
  m.def(
      name,
      [f](const std::string& op,
          const nb::dict& fields,
          const std::vector<std::array<int, 4>>& levels,
          const std::string& dtype,
          bool deterministic,
          bool wants_locations,
          bool wants_weights,
          int rows_per_thread,
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
        const MsdaParams params = params_from(fields);
        gpu::Launch launch = plan(
            op,
            params,
            levels_from(levels),
            dtype,
            deterministic,
            wants_locations,
            wants_weights,
            rows_per_thread,
            options);
        if (max_threads > 0) {
          launch.group = gpu::fit_group(launch, max_threads);
        }
        return f(launch, params);
      },
      "op"_a,
      "params"_a,
      "levels"_a,
      "dtype"_a = "float32",
      nb::kw_only(),
      "deterministic"_a = false,
      "wants_locations"_a = true,
      "wants_weights"_a = true,
      "rows_per_thread"_a = 0,
      "alignment"_a = gpu::PlanOptions{}.alignment,
      "vector_width"_a = 0,
      "index_bits"_a = 0,
      "groups_per_row"_a = gpu::PlanOptions{}.groups_per_row,
      "max_threads"_a = 0,
      doc);
}

gpu::MsdaWork
work_of(bool output, bool grad_value, bool grad_samples, bool deterministic) {
  return {output, grad_value, grad_samples, deterministic};
}

} // namespace

void init_msda_dispatch(nb::module_& m) {
  def_planned(
      m,
      "_msda_plan",
      "The launch of a GPU kernel, as the Metal backend encodes it. `params` "
      "holds the fields of MsdaParams, `levels` those of each MsdaLevel.",
      [](const gpu::Launch& launch, const MsdaParams&) {
        return dict_of(launch);
      });

  def_planned(
      m,
      "_msda_cuda_kernel",
      "What the CUDA backend makes of a launch that is not empty: the "
      "arguments of MLX's cuda_kernel, and the words that carry the sizes.",
      [](const gpu::Launch& launch, const MsdaParams& params) {
        return dict_of(cuda::custom_kernel(launch, gpu::bytes_of(params)));
      });

  m.def(
      "_msda_params_bytes",
      [](const nb::dict& params) {
        return python_bytes_of(params_from(params));
      },
      "params"_a,
      "An MsdaParams as the kernels receive it.");

  m.def(
      "_msda_pieces",
      [](const nb::dict& fields,
         const std::vector<std::array<int, 4>>& levels,
         bool output,
         bool grad_value,
         bool grad_samples,
         bool deterministic) {
        const MsdaParams p = params_from(fields);
        const int count = gpu::msda_piece_count(
            p,
            work_of(output, grad_value, grad_samples, deterministic),
            gpu::msda_map_rows(levels_from(levels)));
        nb::list out;
        for (int i = 0; i < count; ++i) {
          const MsdaParams piece = gpu::msda_piece(p, i, count);
          out.append(nb::make_tuple(piece.query_begin, piece.query_end));
        }
        return out;
      },
      "params"_a,
      "levels"_a,
      nb::kw_only(),
      "output"_a = false,
      "grad_value"_a = false,
      "grad_samples"_a = false,
      "deterministic"_a = false,
      "The [begin, end) rows of every primitive that shares the work.");

  m.def(
      "_msda_operations",
      [](const nb::dict& fields,
         const std::vector<std::array<int, 4>>& levels,
         bool output,
         bool grad_value,
         bool grad_samples,
         bool deterministic) {
        return gpu::msda_operations(
            params_from(fields),
            work_of(output, grad_value, grad_samples, deterministic),
            gpu::msda_map_rows(levels_from(levels)));
      },
      "params"_a,
      "levels"_a,
      nb::kw_only(),
      "output"_a = false,
      "grad_value"_a = false,
      "grad_samples"_a = false,
      "deterministic"_a = false,
      "Floating-point operations of the rows [query_begin, query_end).");
}
