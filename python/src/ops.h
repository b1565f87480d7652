// What the bindings of all ops share.

#pragma once

#include <string>
#include <variant>
#include <vector>

#include <nanobind/nanobind.h>

#include "mlx_ops/deform_conv2d/shapes.h"

namespace nb = nanobind;

using IntOrPair = std::variant<int, std::vector<int>>;

// An int stands for both axes.
mlx_deform::Pair to_pair(
    const std::string& tag,
    const std::string& name,
    const IntOrPair& value);

mlx_deform::Geometry to_geometry(
    const std::string& tag,
    const IntOrPair& stride,
    const IntOrPair& padding,
    const IntOrPair& dilation);

// One function per op, each in a file of its name.
void init_deform_conv2d(nb::module_& m);
void init_deform_im2col(nb::module_& m);
void init_multi_scale_deformable_attention(nb::module_& m);

// A private function of mlx_deform.torch: memory of another library's.
void init_memory(nb::module_& m);

// Private functions for tests: the GPU's dispatch plans.
void init_deform_conv2d_dispatch(nb::module_& m);
void init_msda_dispatch(nb::module_& m);
