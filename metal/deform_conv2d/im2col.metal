// Columns of a deformable convolution: every sample, times its mask.
//
// Neighbouring threads take neighbouring channels of one sample, so reads and
// writes are contiguous. A thread computes its sample's cell and weights once
// and loops over the sample's channels in steps of a whole row of threads.
//
// grid: (lanes, kH * kW * DG, pixels)

#include <metal_stdlib>

#include "metal/channel_vector.h"
#include "metal/deform_conv2d/function_constants.h"
#include "metal/kernel_names.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

using namespace mlx_deform;

template <typename T, int V, typename Index>
[[kernel]] void deform_im2col(
    const device T* input [[buffer(0)]], // (N, H, W, C)
    const device float* offset [[buffer(1)]], // (N, Ho, Wo, DG, kH, kW, 2)
    const device float* mask
    [[buffer(2), function_constant(has_mask)]], // (N, Ho, Wo, DG, kH, kW)
    device T* columns [[buffer(3)]], // by column_index
    constant DeformConv2dParams& p [[buffer(4)]],
    metal::uint3 at [[thread_position_in_grid]],
    metal::uint3 grid [[threads_per_grid]]) {
  SampleId<Index> id;
  id.pixel = Index(p.pixel_begin) + Index(at.z);
  id.tap = int(at.y) / p.DG;
  id.group = int(at.y) - id.tap * p.DG;

  const SamplePosition<Index> position = sample_position<Index>(id, p, offset);
  const BilinearCell<float> cell =
      bilinear_cell<float>(position.y, position.x, p.H, p.W);
  const CornerWeights<float> weights = value_weights<float>(cell);
  const Index corners = cell_index<Index>(position.image, cell, p);
  float scale = cell.nan ? not_a_number() : 1.0f;
  if (has_mask) {
    scale *= mask[sample_index<Index>(id, p)];
  }

  const int width = p.C / p.DG;
  for (int c = int(at.x) * V; c < width; c += int(grid.x) * V) {
    const int channel = id.group * width + c;
    const Corners<V> pixels =
        load_corners<T, V, Index>(input, cell, corners, channel, p);
    ChannelIO<T, V>::store(
        columns + column_index<Index>(id, channel, p),
        interpolate<V>(weights, pixels, scale));
  }
}

MLX_DEFORM_INSTANTIATE(
    deform_im2col_v1,
    deform_im2col<MLX_DEFORM_T, 1, MLX_DEFORM_INDEX>)
MLX_DEFORM_INSTANTIATE(
    deform_im2col_v4,
    deform_im2col<MLX_DEFORM_T, 4, MLX_DEFORM_INDEX>)
#if MLX_DEFORM_T_BYTES == 2
MLX_DEFORM_INSTANTIATE(
    deform_im2col_v8,
    deform_im2col<MLX_DEFORM_T, 8, MLX_DEFORM_INDEX>)
#endif
