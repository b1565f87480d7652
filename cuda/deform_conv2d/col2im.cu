// Gradient of the columns by the input: every sample's gradient, times its
// mask, is added to the four corners it came from. grad_input is accumulated in
// float32, whatever T is, and must hold zeros or an earlier sum.

#include "cuda/channel_vector.h"
#include "cuda/launch.h"
#include "mlx_ops/deform_conv2d/corner_sums.h"
#include "mlx_ops/deform_conv2d/gpu_sample.h"

namespace mlx_deform {

using LaunchParams = DeformConv2dParams;

template <typename Index>
struct ImagePlace {
  float* grad_input;
  int step; // between the channels of a thread

  __device__ void add(Index at, int k, float sum) {
    atomicAdd(grad_input + at + Index(k * step), sum);
  }
};

// Scatter with atomics: the order of the additions, and with it the rounding,
// varies from run to run. Neighbouring threads take neighbouring channels: they
// then add to neighbouring words, one cache line for a whole warp, where
// vectors would spread each addition over several lines. A thread takes V
// channels, a row of threads apart, of pixels_per_thread pixels.
//
// grid: (lanes * blocks of V channels, kH * kW * DG, runs of pixels)
template <typename T, typename Index, int V, bool has_mask>
__device__ inline void deform_col2im(
    const T* __restrict__ grad_columns, // by column_index
    const float* __restrict__ offset, // (N, Ho, Wo, DG, kH, kW, 2)
    const float* __restrict__ mask, // (N, Ho, Wo, DG, kH, kW)
    float* __restrict__ grad_input, // (N, H, W, C)
    const LaunchArguments<LaunchParams>& launch) {
  const Position at = thread_position(launch.grid);
  if (!in_grid(at, launch.grid)) {
    return;
  }
  const DeformConv2dParams& p = launch.params;
  SampleId<Index> id;
  id.tap = at.y / p.DG;
  id.group = at.y - id.tap * p.DG;
  const int width = p.C / p.DG;
  const int first = id.group * width; // channel of the group
  const int channel = first + at.x;
  ImagePlace<Index> place;
  place.grad_input = grad_input;
  place.step = launch.grid.threads[0];

  const Index begin =
      Index(p.pixel_begin) + Index(at.z) * Index(launch.grid.walk);
  const Index last = begin + Index(launch.grid.walk);
  const Index end = last < Index(p.pixel_end) ? last : Index(p.pixel_end);
  CornerSums<V, Index> sums = no_sums<V, Index>();
  for (id.pixel = begin; id.pixel < end; ++id.pixel) {
    const SamplePosition<Index> position =
        sample_position<Index>(id, p, offset);
    const BilinearCell<float> cell =
        bilinear_cell<float>(position.y, position.x, p.H, p.W);
    if (!cell.inside) { // beyond the image or NaN: no pixel has a share
      continue;
    }
    sums = move_to<V, Index>(
        cell_index<Index>(position.image, cell, p), sums, channel, p, place);
    const CornerWeights<float> weights = value_weights<float>(cell);
    float scale = 1.0f;
    if constexpr (has_mask) {
      scale = mask[sample_index<Index>(id, p)];
    }
    for (int k = 0; k < V; ++k) {
      const int c = channel + k * place.step;
      if (c < first + width) {
        const float grad = scale *
            static_cast<float>(grad_columns[column_index<Index>(id, c, p)]);
        for (int i = 0; i < 4; ++i) {
          // An infinite gradient leaves a corner without weight alone.
          if (cell.corner[i] && weights.w[i] != 0.0f) {
            sums.at[i][k] += weights.w[i] * grad;
          }
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    sums = let_go<V, Index>(sums, i, channel, p, place);
  }
}

// The same sum in a fixed order, without atomics: bitwise equal on every run. A
// warp owns one image row of 32 channels of an offset group, one channel a
// lane, and nobody else writes there. It walks the image's samples in the order
// of the columns: its lanes look at 32 samples at once, and those that touch
// the row are taken up one by one, all lanes adding their channel.
//
// grid: (32 lanes * channel blocks, N * H), filled up to whole blocks
template <typename T, typename Index, int V, bool has_mask>
__device__ inline void deform_col2im_ordered(
    const T* __restrict__ grad_columns, // by column_index
    const float* __restrict__ offset, // (N, Ho, Wo, DG, kH, kW, 2)
    const float* __restrict__ mask, // (N, Ho, Wo, DG, kH, kW)
    float* __restrict__ grad_input, // (N, H, W, C)
    const LaunchArguments<LaunchParams>& launch) {
  static_assert(V == 1, "the plan gives a thread single channels");
  const Position block = block_position(launch.grid);
  const DeformConv2dParams& p = launch.params;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int width = p.C / p.DG;
  const int blocks = (width + 31) / 32;

  // Which row and channels: x counts the channel blocks of all offset groups,
  // y the rows of all images.
  const int task = static_cast<int>(
      (static_cast<unsigned int>(block.x) * blockDim.x + threadIdx.x) / 32);
  const int group = task / blocks;
  const int c = (task - group * blocks) * 32 + lane;
  // A whole warp, so no lane is missed below.
  if (group >= p.DG || block.z > 0) {
    return;
  }
  const Index image = Index(block.y) / Index(p.H);
  const int row = static_cast<int>(Index(block.y) - image * Index(p.H));
  const int channel = group * width + c;
  const Index row_index =
      Index(block.y) * Index(p.W) * Index(p.C) + Index(channel);

  // The image's pixels among those of this launch.
  const int taps = p.kH * p.kW;
  const Index plane = Index(p.Ho) * Index(p.Wo);
  const Index begin = Index(p.pixel_begin);
  const Index end = Index(p.pixel_end);
  const Index first = begin > image * plane ? begin : image * plane;
  const Index last = end < (image + 1) * plane ? end : (image + 1) * plane;

  SampleId<Index> id;
  id.group = group;
  // 32 samples from (pixel, tap) on; a block may end in a later pixel.
  Index pixel = first;
  int tap = 0;
  while (pixel < last) {
    const int mine = tap + lane;
    id.pixel = pixel + Index(mine / taps);
    id.tap = mine % taps;
    bool touches = false;
    float y = 0.0f;
    float x = 0.0f;
    if (id.pixel < last) {
      const SamplePosition<Index> position =
          sample_position<Index>(id, p, offset);
      y = position.y;
      x = position.x;
      const BilinearCell<float> cell = bilinear_cell<float>(y, x, p.H, p.W);
      touches = cell.inside && (cell.y == row || cell.y + 1 == row);
    }
    unsigned int hits = __ballot_sync(kAllLanes, touches);
    while (hits != 0u) {
      const int source = __ffs(static_cast<int>(hits)) - 1;
      hits &= hits - 1u;
      const float hit_y = __shfl_sync(kAllLanes, y, source);
      const float hit_x = __shfl_sync(kAllLanes, x, source);
      if (c < width) {
        const int hit = tap + source;
        SampleId<Index> hit_id;
        hit_id.group = group;
        hit_id.pixel = pixel + Index(hit / taps);
        hit_id.tap = hit % taps;
        const BilinearCell<float> cell =
            bilinear_cell<float>(hit_y, hit_x, p.H, p.W);
        const CornerWeights<float> weights = value_weights<float>(cell);
        float grad = static_cast<float>(
            grad_columns[column_index<Index>(hit_id, channel, p)]);
        if constexpr (has_mask) {
          grad *= mask[sample_index<Index>(hit_id, p)];
        }
        for (int i = 0; i < 4; ++i) {
          const bool touches_row = cell.y + (i >> 1) == row;
          if (cell.corner[i] && touches_row && weights.w[i] != 0.0f) {
            const Index x_at = Index(cell.x + (i & 1));
            grad_input[row_index + x_at * Index(p.C)] += weights.w[i] * grad;
          }
        }
      }
    }
    tap += 32;
    pixel += Index(tap / taps);
    tap = tap % taps;
  }
}

} // namespace mlx_deform
