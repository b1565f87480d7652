// Checks that every op makes before anything is scheduled. They throw
// std::invalid_argument (a ValueError in Python) that reads
// "[tag] rule; got value".

#pragma once

#include <string>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_deform {

namespace mx = mlx::core;

// The argument must hold real floating-point numbers.
void check_floating(
    const std::string& tag,
    const std::string& name,
    const mx::array& x);

// The stream's device must have kernels, and float64 exists on the CPU only.
void check_device(
    const std::string& tag,
    const mx::Dtype& dtype,
    const mx::Stream& stream);

} // namespace mlx_deform
