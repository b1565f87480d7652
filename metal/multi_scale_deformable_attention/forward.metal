// Multi-scale deformable attention: the weighted sum of a query's samples.

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/kernel_names.h"
#include "metal/multi_scale_deformable_attention/function_constants.h"
#include "mlx_ops/multi_scale_deformable_attention/gpu_sample.h"

using namespace mlx_deform;

// A thread takes V channels of one query and head and walks through all
// samples, so that sums stay in registers. Neighbouring threads read
// neighbouring channels of a pixel. Heads are the slowest axis: neighbouring
// queries sample the same surroundings, and one head's share of them is small
// enough for a cache.
//
// grid: (D / V, rows, M)
template <typename T, int V, typename Index>
[[kernel]] void msda_forward(
    const device T* value [[buffer(0)]], // (N, S, M, D)
    const device float* locations [[buffer(1)]], // (N, Q, M, K, 2)
    const device float* weights [[buffer(2)]], // (N, Q, M, K)
    constant int* levels [[buffer(3)]], // (L, 4)
    device T* out [[buffer(4)]], // (N, Q, M, D)
    constant MsdaParams& p [[buffer(5)]],
    metal::uint3 at [[thread_position_in_grid]]) {
  const int channel = int(at.x) * V;
  const Index row = Index(p.query_begin) + Index(at.y);
  const int head = int(at.z);
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
          cell.nan ? NAN : weights[sample]);
      for (int v = 0; v < V; ++v) {
        sum.at[v] += sampled.at[v];
      }
    }
  }
  ChannelIO<T, V>::store(
      out + query_index<Index>(row, head, p) + Index(channel), sum);
}

MLX_DEFORM_INSTANTIATE(
    msda_forward_v1,
    msda_forward<MLX_DEFORM_T, 1, MLX_DEFORM_INDEX>)
MLX_DEFORM_INSTANTIATE(
    msda_forward_v4,
    msda_forward<MLX_DEFORM_T, 4, MLX_DEFORM_INDEX>)
#if MLX_DEFORM_T_BYTES == 2
MLX_DEFORM_INSTANTIATE(
    msda_forward_v8,
    msda_forward<MLX_DEFORM_T, 8, MLX_DEFORM_INDEX>)
#endif
