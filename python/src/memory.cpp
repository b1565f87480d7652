// Private functions of mlx_deform.torch, on memory of another library's: as an
// MLX array with no copy, and transposed.

#include <functional>
#include <numeric>

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx_ops/cpu/transpose.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

// An array over memory that MLX did not allocate. On Linux MLX itself copies
// such memory, for a buffer of its CPU allocator has a header before the data.
// Here the buffer is one of the allocator's own, of a few bytes, and the
// array's offset leads from there to the data. As the array does not own its
// memory, MLX never writes to it.
mx::array borrow(uintptr_t address, mx::Shape shape, mx::Dtype dtype) {
  const size_t size = std::accumulate(
      shape.begin(), shape.end(), size_t(1), std::multiplies<size_t>());
  mx::array out(std::move(shape), dtype, nullptr, {});
  mx::allocator::Buffer anchor = mx::allocator::allocator().malloc(1);
  const int64_t offset = static_cast<int64_t>(address) -
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(anchor.raw_ptr()));
  out.set_data(
      mx::allocator::Data(
          anchor,
          [](mx::allocator::Buffer b) { mx::allocator::allocator().free(b); }),
      size,
      out.strides(),
      mx::array::Flags{true, true, false},
      offset);
  out.set_status(mx::array::Status::available);
  return out;
}

} // namespace

void init_memory(nb::module_& m) {
  m.def(
      "_borrow",
      [](uintptr_t address, const std::vector<int>& shape, mx::Dtype dtype) {
        return borrow(address, mx::Shape(shape.begin(), shape.end()), dtype);
      },
      "address"_a,
      "shape"_a,
      "dtype"_a,
      "An array over row-contiguous memory of the CPU, which must outlive "
      "every "
      "evaluation that reads it. For builds of MLX without a GPU.");
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
