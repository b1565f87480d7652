// Gradients of multi-scale deformable attention by its locations and weights:
// sums over the D channels that share a sample. A segment of 1 to 32
// neighbouring lanes of a warp takes one sample and adds up by shuffles:
// no atomics, no shared memory, the same order of additions on every run.
//
// Value and slopes are three combinations of the same four numbers, so a lane
// sums cotangent * pixel per corner and the corners' weights come once at the
// end.

#include "cuda/channel_vector.h"
#include "cuda/launch.h"
#include "mlx_ops/multi_scale_deformable_attention/gpu_sample.h"

namespace mlx_deform {

using LaunchParams = MsdaParams;

// Samples of a head are numbered by (row, k), and a block takes
// blockDim.x / segment_lanes of them.
//
// grid: (threads, rows of blocks, M)
template <
    typename T,
    typename Index,
    int V,
    bool is_discrete,
    bool wants_locations,
    bool wants_weights>
__device__ inline void msda_grad_samples(
    const T* __restrict__ value, // (N, S, M, D)
    const T* __restrict__ cotangent, // (N, Q, M, D)
    const float* __restrict__ locations, // (N, Q, M, K, 2)
    const float* __restrict__ weights, // (N, Q, M, K)
    const int* __restrict__ levels, // (L, 4)
    float* __restrict__ grad_locations, // as locations
    float* __restrict__ grad_weights, // as weights
    const LaunchArguments<LaunchParams>& launch) {
  const Position block = block_position(launch.grid);
  const MsdaParams& p = launch.params;
  if (block.z >= p.M) { // a whole block
    return;
  }
  const int segment_lanes = launch.grid.segment_lanes;
  const int warp_lane = static_cast<int>(threadIdx.x % 32);
  const int segments = 32 / segment_lanes; // in a warp
  const int segment = warp_lane / segment_lanes;
  const int lane = warp_lane - segment * segment_lanes;
  const Index block_index =
      Index(block.y) * Index(launch.grid.blocks[0]) + Index(block.x);
  const Index warp =
      block_index * Index(blockDim.x / 32) + Index(threadIdx.x / 32);
  const Index number = warp * Index(segments) + Index(segment);

  const int head = block.z;
  const Index rows_before = number / Index(p.K);
  const Index row = Index(p.query_begin) + rows_before;
  const int k = int(number - rows_before * Index(p.K));
  // Lanes without a sample stay for the shuffles.
  const bool active = row < Index(p.query_end);

  Level level = level_at(levels, 0, p);
  BilinearCell<float> cell =
      bilinear_cell<float>(not_a_number(), not_a_number(), level.H, level.W);
  CornerWeights<float> sums; // over the lane's channels, of cotangent * corner
  for (int i = 0; i < 4; ++i) {
    sums.w[i] = 0.0f;
  }
  const Index sample =
      active ? samples_index<Index>(row, head, p) + Index(k) : 0;
  if (active) {
    level = level_of_sample(levels, k, p);
    cell = sample_cell<Index>(locations, sample, level, is_discrete);
    if (cell.inside) {
      const Index image = row / Index(p.Q);
      const Index query_at = query_index<Index>(row, head, p);
      const Index cell_at = head_cell_index<Index>(image, head, level, cell, p);
      for (int c = lane * V; c < p.D; c += segment_lanes * V) {
        const Channels<V> grad =
            ChannelIO<T, V>::load(cotangent + query_at + Index(c));
        const Corners<V> pixels =
            load_head_corners<T, V, Index>(value, cell_at, c, level, cell, p);
        for (int i = 0; i < 4; ++i) {
          if (cell.corner[i]) { // Inf * 0 would be NaN
            for (int v = 0; v < V; ++v) {
              sums.w[i] += grad.at[v] * pixels.at[i].at[v];
            }
          }
        }
      }
    }
  }
  for (int step = segment_lanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < 4; ++i) {
      sums.w[i] += __shfl_xor_sync(kAllLanes, sums.w[i], step);
    }
  }

  if (active && lane == 0) {
    const float outside = cell.nan ? not_a_number() : 0.0f;
    if constexpr (wants_locations) {
      float grad_x = is_discrete ? 0.0f : outside;
      float grad_y = grad_x;
      if (!is_discrete && cell.inside) {
        const float scale = weights[sample];
        grad_x = scale * float(level.W) *
            weighted_sum(slope_weights_x<float>(cell), sums);
        grad_y = scale * float(level.H) *
            weighted_sum(slope_weights_y<float>(cell), sums);
      }
      grad_locations[2 * sample] = grad_x;
      grad_locations[2 * sample + 1] = grad_y;
    }
    if constexpr (wants_weights) {
      grad_weights[sample] = cell.inside
          ? weighted_sum(value_weights<float>(cell), sums)
          : outside;
    }
  }
}

} // namespace mlx_deform
