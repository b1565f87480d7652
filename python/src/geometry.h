// How the bindings take stride, padding and dilation.

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
