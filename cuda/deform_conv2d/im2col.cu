// Columns of a deformable convolution: every sample, times its mask.
//
// Neighbouring threads take neighbouring channels of one sample, so reads and
// writes are contiguous. A thread computes its sample's cell and weights once
// and loops over the sample's channels in steps of a whole row of threads.
//
// grid: (lanes, kH * kW * DG, pixels)

#include "cuda/channel_vector.h"
#include "cuda/launch.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

namespace mlx_deform {

using LaunchParams = DeformConv2dParams;

template <typename T, typename Index, int V, bool has_mask>
__device__ inline void deform_im2col(
    const T* __restrict__ input, // (N, H, W, C)
    const float* __restrict__ offset, // (N, Ho, Wo, DG, kH, kW, 2)
    const float* __restrict__ mask, // (N, Ho, Wo, DG, kH, kW)
    T* __restrict__ columns, // by column_index
    const LaunchArguments<LaunchParams>& launch) {
  const Position at = thread_position(launch.grid);
  if (!in_grid(at, launch.grid)) {
    return;
  }
  const DeformConv2dParams& p = launch.params;
  SampleId<Index> id;
  id.pixel = Index(p.pixel_begin) + Index(at.z);
  id.tap = at.y / p.DG;
  id.group = at.y - id.tap * p.DG;

  const SamplePosition<Index> position = sample_position<Index>(id, p, offset);
  const BilinearCell<float> cell =
      bilinear_cell<float>(position.y, position.x, p.H, p.W);
  const CornerWeights<float> weights = value_weights<float>(cell);
  const Index corners = cell_index<Index>(position.image, cell, p);
  float scale = cell.nan ? not_a_number() : 1.0f;
  if constexpr (has_mask) {
    scale *= mask[sample_index<Index>(id, p)];
  }

  const int width = p.C / p.DG;
  for (int c = at.x * V; c < width; c += launch.grid.threads[0] * V) {
    const int channel = id.group * width + c;
    const Corners<V> pixels =
        load_corners<T, V, Index>(input, cell, corners, channel, p);
    ChannelIO<T, V>::store(
        columns + column_index<Index>(id, channel, p),
        interpolate<V>(weights, pixels, scale));
  }
}

} // namespace mlx_deform
