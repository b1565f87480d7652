// Private functions of mlx_deform.torch, on memory of another library's: as an
// MLX array with no copy, and transposed.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "mlx/array.h"
#include "mlx_ops/cpu/transpose.h"
#include "mlx_ops/mlx_version.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

void init_memory(nb::module_& m) {
  m.def(
      "_borrow",
      [](uintptr_t address, const std::vector<int>& shape, mx::Dtype dtype) {
        mx::array out(
            mx::Shape(shape.begin(), shape.end()), dtype, nullptr, {});
        mlx_deform::borrow(out, address);
        out.set_status(mx::array::Status::available);
        return out;
      },
      "address"_a,
      "shape"_a,
      "dtype"_a,
      "An array over row-contiguous memory of the CPU, which must outlive "
      "every evaluation that reads it, as the array must: MLX could hand the "
      "memory of an array that nobody holds on to a result. For builds of MLX "
      "without a GPU.");
  m.def(
      "_transpose",
      [](uintptr_t from,
         uintptr_t to,
         int64_t count,
         int64_t rows,
         int64_t columns,
         size_t element_bytes) {
        mlx_deform::cpu::transpose(
            reinterpret_cast<const void*>(from),
            reinterpret_cast<void*>(to),
            count,
            rows,
            columns,
            element_bytes);
      },
      "from_"_a,
      "to"_a,
      "count"_a,
      "rows"_a,
      "columns"_a,
      "element_bytes"_a,
      nb::call_guard<nb::gil_scoped_release>(),
      "Writes the transposes of row-contiguous matrices, on all cores.");
}
