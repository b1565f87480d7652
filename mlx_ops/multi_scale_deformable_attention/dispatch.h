// How multi-scale deformable attention is laid out on a GPU, and how much of it
// one primitive does. Pure arithmetic on sizes, as mlx_ops/gpu/launch.h.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mlx_ops/gpu/launch.h"
#include "mlx_ops/multi_scale_deformable_attention/params.h"

namespace mlx_deform::gpu {

// Raises std::invalid_argument unless `levels` follow one another and cover S
// and K: kernels read and write where this table tells them to.
void check_levels(
    const MsdaParams& params,
    const std::vector<MsdaLevel>& levels);

// The output of the rows [query_begin, query_end).
Launch plan_msda_forward(
    const MsdaParams& params,
    const std::string& dtype,
    const PlanOptions& options = {});

// Adds those rows' share to grad_value, in float32. The deterministic kernel
// adds in a fixed order, so its result is bitwise the same on every run; it is
// slower. `map_rows`: the rows H of all levels. `rows_per_thread`: of the other
// kernel, a power of two, or 0 to leave it to the sizes.
Launch plan_msda_grad_value(
    const MsdaParams& params,
    const std::string& dtype,
    bool deterministic,
    int64_t map_rows,
    const PlanOptions& options = {},
    int rows_per_thread = 0);

// Writes those rows of grad_locations, grad_weights or both. Deterministic.
Launch plan_msda_grad_samples(
    const MsdaParams& params,
    const std::string& dtype,
    bool wants_locations,
    bool wants_weights,
    const PlanOptions& options = {});

int64_t msda_map_rows(const std::vector<MsdaLevel>& levels);

// What a primitive computes.
struct MsdaWork {
  bool output{false};
  bool grad_value{false};
  bool grad_samples{false}; // of locations or weights
  bool deterministic{false};
};

// Floating-point operations of the rows [query_begin, query_end), by all
// threads that share a sample.
double msda_operations(
    const MsdaParams& params,
    const MsdaWork& work,
    int64_t map_rows);

// The pieces that `work` on all rows is cut into, as gpu/pieces.h does; a piece
// has a row at least.
int msda_piece_count(
    const MsdaParams& params,
    const MsdaWork& work,
    int64_t map_rows);

// The rows of piece `index` of `count`, for any sizes.
MsdaParams msda_piece(const MsdaParams& params, int index, int count);

} // namespace mlx_deform::gpu
