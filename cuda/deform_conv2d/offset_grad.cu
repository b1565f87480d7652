// Gradients of the columns by offset and mask: sums over the channels that
// share a sample. A segment of 1 to 32 neighbouring lanes of a warp takes one
// sample and adds up by shuffles: no atomics, no shared memory, the same order
// of additions on every run.
//
// Value and slopes are three combinations of the same four numbers, so a lane
// sums grad * pixel per corner and the weights are applied once at the end.

#include "cuda/channel_vector.h"
#include "cuda/launch.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

namespace mlx_deform {

using LaunchParams = DeformConv2dParams;

// Samples are numbered in the order of the columns; a block takes blockDim.x /
// segment_lanes of them. The outputs hold the launch's pixels alone: row
// 0 is that of params.pixel_begin.
template <
    typename T,
    typename Index,
    int V,
    bool has_mask,
    bool wants_offset,
    bool wants_mask>
__device__ inline void deform_offset_grad(
    const T* __restrict__ input, // (N, H, W, C)
    const float* __restrict__ offset, // (N, Ho, Wo, DG, kH, kW, 2)
    const float* __restrict__ mask, // (N, Ho, Wo, DG, kH, kW)
    const T* __restrict__ grad_columns, // by column_index
    float* __restrict__ grad_offset, // (pixels, DG, kH, kW, 2)
    float* __restrict__ grad_mask, // (pixels, DG, kH, kW)
    const LaunchArguments<LaunchParams>& launch) {
  const Position block = block_position(launch.grid);
  if (block.z > 0) { // a whole block
    return;
  }
  const DeformConv2dParams& p = launch.params;
  const int segment_lanes = launch.grid.segment_lanes;
  const int segments = 32 / segment_lanes; // in a warp
  const int warp_lane = static_cast<int>(threadIdx.x % 32);
  const int segment = warp_lane / segment_lanes;
  const int lane = warp_lane - segment * segment_lanes;
  const Index block_index =
      Index(block.y) * Index(launch.grid.blocks[0]) + Index(block.x);
  const Index warp =
      block_index * Index(blockDim.x / 32) + Index(threadIdx.x / 32);
  const Index sample = warp * Index(segments) + Index(segment);

  const int samples_per_pixel = p.kH * p.kW * p.DG;
  const Index pixel = sample / Index(samples_per_pixel);
  const int rest = static_cast<int>(sample - pixel * Index(samples_per_pixel));
  SampleId<Index> id;
  id.pixel = Index(p.pixel_begin) + pixel;
  id.tap = rest / p.DG;
  id.group = rest - id.tap * p.DG;
  // Lanes without a sample stay for the shuffles.
  const bool active = id.pixel < Index(p.pixel_end);

  BilinearCell<float> cell =
      bilinear_cell<float>(not_a_number(), not_a_number(), p.H, p.W);
  CornerWeights<float> sums; // over the lane's channels, of grad * corner
  for (int i = 0; i < 4; ++i) {
    sums.w[i] = 0.0f;
  }
  if (active) {
    const SamplePosition<Index> position =
        sample_position<Index>(id, p, offset);
    cell = bilinear_cell<float>(position.y, position.x, p.H, p.W);
    if (cell.inside) {
      const Index corners = cell_index<Index>(position.image, cell, p);
      const int width = p.C / p.DG;
      for (int c = lane * V; c < width; c += segment_lanes * V) {
        const int channel = id.group * width + c;
        const Channels<V> grad = ChannelIO<T, V>::load(
            grad_columns + column_index<Index>(id, channel, p));
        const Corners<V> pixels =
            load_corners<T, V, Index>(input, cell, corners, channel, p);
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
    const Index at = sample_index<Index>(id, p);
    const Index out = at - Index(p.pixel_begin) * Index(samples_per_pixel);
    const float outside = cell.nan ? not_a_number() : 0.0f;
    if constexpr (wants_offset) {
      float scale = 1.0f;
      if constexpr (has_mask) {
        scale = mask[at];
      }
      grad_offset[2 * out] = cell.inside
          ? scale * weighted_sum(slope_weights_y<float>(cell), sums)
          : outside;
      grad_offset[2 * out + 1] = cell.inside
          ? scale * weighted_sum(slope_weights_x<float>(cell), sums)
          : outside;
    }
    if constexpr (wants_mask) {
      grad_mask[out] = cell.inside
          ? weighted_sum(value_weights<float>(cell), sums)
          : outside;
    }
  }
}

} // namespace mlx_deform
