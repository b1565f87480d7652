// The vector loops of the op on the CPU, compiled once per instruction set
// (cpu_kernels_*.cpp) and chosen at run time; plain declarations only, for the
// reason that mlx_ops/cpu/tile_kernels.h gives.

#pragma once

#include <stdint.h>

#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/multi_scale_deformable_attention/params.h"

namespace mlx_deform::cpu {

// Queries that forward takes at once, for one head after the other.
constexpr int msda_queries = 32;

// T is the type of value, output and cotangent; R the type of everything else:
// locations, weights, sums and gradients (float for halves).
template <typename T, typename R>
struct MsdaKernels {
  // The output of the queries [query_begin, query_end) of image n, at most
  // msda_queries.
  void (*forward)(
      const MsdaParams& params,
      const MsdaLevel* levels, // [L]
      int n,
      int query_begin,
      int query_end,
      const T* value, // [N][S][M][D]
      const R* locations, // [N][Q][M][K][2]
      const R* weights, // [N][Q][M][K]
      R* sums, // room for [msda_queries][D]
      T* out); // [N][Q][M][D]

  // The gradients of some heads' samples on one level. Those of locations and
  // weights are written, that of value is added to: to this level's pixels and
  // these heads' channels alone, for each head in the order of queries. Each
  // output may be null.
  void (*backward)(
      const MsdaParams& params,
      const MsdaLevel* levels, // [L]
      int n,
      int head_begin,
      int head_end,
      int level,
      int query_begin,
      int query_end,
      const T* value, // [N][S][M][D]
      const R* locations, // [N][Q][M][K][2]
      const R* weights, // [N][Q][M][K]
      const T* cotangent, // [N][Q][M][D]
      R* grad_value, // as value
      R* grad_locations, // as locations
      R* grad_weights); // as weights
};

// The kernels for this machine.
template <typename T, typename R>
const MsdaKernels<T, R>& msda_kernels();

} // namespace mlx_deform::cpu
