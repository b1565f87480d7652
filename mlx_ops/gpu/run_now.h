// Evaluation in the middle of a primitive's own.

#pragma once

#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_deform::gpu {

// Encodes what a graph of a few nodes has not encoded yet, inputs first, and
// keeps their inputs until the stream has run it. An operation that can reuse
// the memory of an input that nobody else holds does so.
void run_now(const mlx::core::array& x, mlx::core::Stream stream);

} // namespace mlx_deform::gpu
