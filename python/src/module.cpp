#include <nanobind/nanobind.h>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "mlx_ops/cpu/isa.h"
#include "mlx_ops/portable.h"

namespace nb = nanobind;
using namespace nb::literals;

// One function per op, each in a file of its name.
void init_deform_conv2d(nb::module_& m);
void init_deform_im2col(nb::module_& m);
void init_multi_scale_deformable_attention(nb::module_& m);

// A private function of mlx_deform.torch: memory of another library's.
void init_memory(nb::module_& m);

// Private functions for tests: the GPU's dispatch plans.
void init_deform_conv2d_dispatch(nb::module_& m);
void init_msda_dispatch(nb::module_& m);

NB_MODULE(_ext, m) {
  m.doc() = "Deformable sampling for MLX: the compiled ops.";
  init_deform_conv2d(m);
  init_deform_im2col(m);
  init_multi_scale_deformable_attention(m);
  init_deform_conv2d_dispatch(m);
  init_msda_dispatch(m);
  init_memory(m);
  m.def(
      "_set_portable",
      &mlx_deform::set_portable,
      "value"_a,
      "Builds this thread's ops of MLX's own primitives; returns the earlier "
      "setting.");

  // A wrong MLX_DEFORM_ISA is an error of the import: an op's work begins on a
  // thread of MLX's, where nobody catches anything.
  m.attr("_isa") = mlx_deform::cpu::isa_name(mlx_deform::cpu::isa());
  m.def(
      "_isas",
      [] {
        std::vector<std::string> names;
        for (const auto isa : mlx_deform::cpu::isas()) {
          names.push_back(mlx_deform::cpu::isa_name(isa));
        }
        return names;
      },
      "The instruction sets of this machine that MLX_DEFORM_ISA may name, the "
      "best first. `_isa` is the chosen one.");
}
