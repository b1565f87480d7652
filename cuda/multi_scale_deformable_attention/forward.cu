// Multi-scale deformable attention: the weighted sum of a query's samples.

#include "cuda/channel_vector.h"
#include "cuda/launch.h"
#include "mlx_ops/multi_scale_deformable_attention/gpu_sample.h"

namespace mlx_deform {

using LaunchParams = MsdaParams;

// A thread takes V channels of one query and head and walks through all
// samples, so that sums stay in registers. Neighbouring threads read
// neighbouring channels of a pixel. Heads are the slowest axis: neighbouring
// queries sample the same surroundings, and one head's share of them is small
// enough for a cache.
//
// grid: (D / V, rows, M)
template <typename T, typename Index, int V, bool is_discrete>
__device__ inline void msda_forward(
    const T* __restrict__ value, // (N, S, M, D)
    const float* __restrict__ locations, // (N, Q, M, K, 2)
    const float* __restrict__ weights, // (N, Q, M, K)
    const int* __restrict__ levels, // (L, 4)
    T* __restrict__ out, // (N, Q, M, D)
    const LaunchArguments<LaunchParams>& launch) {
  const Position at = thread_position(launch.grid);
  if (!in_grid(at, launch.grid)) {
    return;
  }
  const MsdaParams& p = launch.params;
  const int channel = at.x * V;
  const Index row = Index(p.query_begin) + Index(at.y);
  const int head = at.z;
  const Index image = row / Index(p.Q);
  const Index samples = samples_index<Index>(row, head, p);

  Channels<V> sum;
  for (int v = 0; v < V; ++v) {
    sum.at[v] = 0.0f;
  }
  for (int l = 0; l < p.L; ++l) {
    const Level level = level_at(levels, l, p);
    for (int k = level.first_sample; k < level.last_sample; ++k) {
      const Index sample = samples + Index(k);
      const BilinearCell<float> cell =
          sample_cell<Index>(locations, sample, level, is_discrete);
      const Index cell_at = head_cell_index<Index>(image, head, level, cell, p);
      const Channels<V> sampled = interpolate<V>(
          value_weights<float>(cell),
          load_head_corners<T, V, Index>(
              value, cell_at, channel, level, cell, p),
          cell.nan ? not_a_number() : weights[sample]);
      for (int v = 0; v < V; ++v) {
        sum.at[v] += sampled.at[v];
      }
    }
  }
  ChannelIO<T, V>::store(
      out + query_index<Index>(row, head, p) + Index(channel), sum);
}

} // namespace mlx_deform
