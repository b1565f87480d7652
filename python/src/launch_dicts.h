// Launches of a dispatch plan as Python dicts, for tests.

#pragma once

#include <array>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "mlx_ops/cuda/launch.h"
#include "mlx_ops/cuda/launch_arguments.h"
#include "mlx_ops/gpu/launch.h"

inline nanobind::tuple tuple_of(const std::array<int64_t, 3>& a) {
  return nanobind::make_tuple(a[0], a[1], a[2]);
}

inline nanobind::list list_of(const std::vector<std::string>& names) {
  nanobind::list out;
  for (const std::string& name : names) {
    out.append(name);
  }
  return out;
}

inline nanobind::dict dict_of(const mlx_deform::gpu::Launch& launch) {
  namespace nb = nanobind;
  nb::dict constants;
  for (const mlx_deform::gpu::FunctionConstant& c : launch.constants) {
    constants[c.name.c_str()] =
        c.is_bool ? nb::object(nb::bool_(c.value != 0)) : nb::int_(c.value);
  }
  nb::list buffers;
  for (const mlx_deform::gpu::Binding& b : launch.buffers) {
    buffers.append(nb::make_tuple(b.role, b.index, b.is_output));
  }
  nb::dict out;
  out["stem"] = launch.stem;
  out["kernel"] = launch.kernel;
  out["dtype"] = launch.library.dtype;
  out["index_bits"] = launch.library.index_bits;
  out["constants"] = constants;
  out["buffers"] = buffers;
  out["grid"] = tuple_of(launch.grid);
  out["group"] = tuple_of(launch.group);
  out["vector_width"] = launch.vector_width;
  out["empty"] = launch.empty();
  return out;
}

inline nanobind::dict dict_of(const mlx_deform::cuda::CustomKernel& kernel) {
  namespace nb = nanobind;
  nb::dict constants;
  constants["V"] = kernel.vector_width;
  for (const auto& [name, value] : kernel.flags) {
    constants[name.c_str()] = value;
  }
  nb::dict out;
  out["name"] = kernel.name;
  out["inputs"] = list_of(kernel.inputs);
  out["outputs"] = list_of(kernel.outputs);
  out["header"] = kernel.header;
  out["source"] = kernel.source;
  out["index"] = kernel.wide_index ? "int64" : "int32";
  out["constants"] = constants;
  out["grid"] = nb::make_tuple(kernel.grid[0], kernel.grid[1], kernel.grid[2]);
  out["group"] =
      nb::make_tuple(kernel.group[0], kernel.group[1], kernel.group[2]);
  out["words"] = nb::bytes(
      reinterpret_cast<const char*>(kernel.words.data()),
      kernel.words.size() * sizeof(kernel.words[0]));
  out["carrier_words"] = mlx_deform::kCarrierWords;
  return out;
}

// A struct as the kernels receive it.
template <typename Params>
nanobind::bytes python_bytes_of(const Params& params) {
  return nanobind::bytes(
      reinterpret_cast<const char*>(&params), sizeof(params));
}
