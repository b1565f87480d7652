// Gradient of multi-scale deformable attention by the value: every query's
// cotangent, times a sample's weight, is added to the four corners that it came
// from. grad_value is accumulated in float32, whatever T is, and must hold
// zeros or an earlier sum.

#include "cuda/channel_vector.h"
#include "cuda/launch.h"
#include "mlx_ops/multi_scale_deformable_attention/gpu_sample.h"

namespace mlx_deform {

using LaunchParams = MsdaParams;

// Adds two corners' sums, those of the cell's left (0) or right (1) column.
template <typename Index>
__device__ inline void add_column(
    float* grad_value, // (N, S, M, D)
    int column,
    CornerWeights<float> sums,
    BilinearCell<float> cell,
    Index cell_at,
    Level level,
    const MsdaParams& p) {
  for (int i = column; i < 4; i += 2) {
    // No atomic where there is no share. A NaN is not equal to zero and is
    // added.
    if (cell.corner[i] && sums.w[i] != 0.0f) {
      atomicAdd(
          grad_value + head_corner_index<Index>(cell_at, i, level, p),
          sums.w[i]);
    }
  }
}

// Scatter with atomics: the order of the additions, and with it the rounding,
// varies from run to run. A thread takes one channel: neighbouring threads then
// add to neighbouring words, one cache line for a whole warp. Heads come
// before queries, whose neighbours would add to the same words at once.
//
// It walks rows_per_thread queries, sample number by sample number. Where
// queries are the pixels of a map, as in an encoder, neighbours sample the same
// cell or the one to the right; the sums of corners that they share stay in
// registers and are added to memory once.
//
// grid: (D, M, rows / rows_per_thread)
template <typename T, typename Index, int V, bool is_discrete>
__device__ inline void msda_grad_value(
    const T* __restrict__ cotangent, // (N, Q, M, D)
    const float* __restrict__ locations, // (N, Q, M, K, 2)
    const float* __restrict__ weights, // (N, Q, M, K)
    const int* __restrict__ levels, // (L, 4)
    float* __restrict__ grad_value, // (N, S, M, D)
    const LaunchArguments<LaunchParams>& launch) {
  static_assert(V == 1, "the plan gives a thread single channels");
  const Position at = thread_position(launch.grid);
  if (!in_grid(at, launch.grid)) {
    return;
  }
  const MsdaParams& p = launch.params;
  const int rows_per_thread = launch.grid.walk;
  const Index channel = Index(at.x);
  const int head = at.y;
  const Index first =
      Index(p.query_begin) + Index(at.z) * Index(rows_per_thread);
  const Index beyond = first + Index(rows_per_thread);
  const Index end = Index(p.query_end);
  const Index last = beyond < end ? beyond : end;
  const Index first_image = first / Index(p.Q);

  for (int l = 0; l < p.L; ++l) {
    const Level level = level_at(levels, l, p);
    for (int k = level.first_sample; k < level.last_sample; ++k) {
      // The cell of the samples before, and its corners' sums so far.
      BilinearCell<float> cell = bilinear_cell<float>(
          not_a_number(), not_a_number(), level.H, level.W);
      Index cell_at = 0;
      CornerWeights<float> sums;
      for (int i = 0; i < 4; ++i) {
        sums.w[i] = 0.0f;
      }
      Index image = first_image;
      for (Index row = first; row < last; ++row) {
        const bool is_next_image = row == (image + 1) * Index(p.Q);
        if (is_next_image) {
          ++image;
        }
        const Index sample = samples_index<Index>(row, head, p) + Index(k);
        const BilinearCell<float> next =
            sample_cell<Index>(locations, sample, level, is_discrete);
        if (!next.inside && !is_next_image) {
          continue; // beyond the map or NaN: no pixel has a share
        }
        const bool is_row = !is_next_image && next.y == cell.y;
        if (is_row && next.x == cell.x + 1) {
          add_column<Index>(grad_value, 0, sums, cell, cell_at, level, p);
          sums.w[0] = sums.w[1];
          sums.w[2] = sums.w[3];
          sums.w[1] = 0.0f;
          sums.w[3] = 0.0f;
        } else if (!is_row || next.x != cell.x) {
          add_column<Index>(grad_value, 0, sums, cell, cell_at, level, p);
          add_column<Index>(grad_value, 1, sums, cell, cell_at, level, p);
          for (int i = 0; i < 4; ++i) {
            sums.w[i] = 0.0f;
          }
        }
        cell = next;
        cell_at = head_cell_index<Index>(image, head, level, cell, p) + channel;
        if (cell.inside) {
          const CornerWeights<float> corners = value_weights<float>(cell);
          const float sampled =
              weights[sample] *
              static_cast<float>(
                  cotangent[query_index<Index>(row, head, p) + channel]);
          for (int i = 0; i < 4; ++i) {
            sums.w[i] += corners.w[i] * sampled;
          }
        }
      }
      add_column<Index>(grad_value, 0, sums, cell, cell_at, level, p);
      add_column<Index>(grad_value, 1, sums, cell, cell_at, level, p);
    }
  }
}

// The same sum in a fixed order, without atomics: bitwise equal on every run.
// A warp owns one row of a level's map, for 32 channels of a head, one
// channel a lane, and nobody else writes there. It walks the image's samples of
// that level in the order of the queries: its lanes look at 32 samples at once,
// and those that touch the row are taken up one by one, all lanes adding their
// channel.
//
// grid: (M * channel blocks * 32 lanes, rows of all levels, N), along x filled
// up to whole blocks
template <typename T, typename Index, int V, bool is_discrete>
__device__ inline void msda_grad_value_ordered(
    const T* __restrict__ cotangent, // (N, Q, M, D)
    const float* __restrict__ locations, // (N, Q, M, K, 2)
    const float* __restrict__ weights, // (N, Q, M, K)
    const int* __restrict__ levels, // (L, 4)
    float* __restrict__ grad_value, // (N, S, M, D)
    const LaunchArguments<LaunchParams>& launch) {
  static_assert(V == 1, "the plan gives a thread single channels");
  const Position block = block_position(launch.grid);
  const MsdaParams& p = launch.params;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int blocks = (p.D + 31) / 32;
  const int task = static_cast<int>(
      (static_cast<unsigned int>(block.x) * blockDim.x + threadIdx.x) / 32);
  const int head = task / blocks;
  const int channel = (task - head * blocks) * 32 + lane;
  // A whole warp, so no lane is missed below.
  if (head >= p.M || block.z >= p.N) {
    return;
  }
  const Index image = Index(block.z);
  int map_row = block.y;
  int l = 0;
  Level level = level_at(levels, 0, p);
  while (map_row >= level.H) {
    map_row -= level.H;
    ++l;
    level = level_at(levels, l, p);
  }
  const int points = level.last_sample - level.first_sample;
  if (points == 0) {
    return;
  }
  const Index row_at = ((image * Index(p.S) + Index(level.start) +
                         Index(map_row) * Index(level.W)) *
                            Index(p.M) +
                        Index(head)) *
          Index(p.D) +
      Index(channel);

  // The image's queries among those of this launch.
  const Index begin = Index(p.query_begin);
  const Index end = Index(p.query_end);
  const Index before = image * Index(p.Q);
  const Index beyond = before + Index(p.Q);
  const Index first = begin > before ? begin : before;
  const Index last = end < beyond ? end : beyond;

  // 32 samples from (query, point) on; a block may end in a later query.
  Index query = first;
  int point = 0;
  while (query < last) {
    const int mine = point + lane;
    const Index row = query + Index(mine / points);
    bool touches = false;
    float y = 0.0f;
    float x = 0.0f;
    if (row < last) {
      const Index sample = samples_index<Index>(row, head, p) +
          Index(level.first_sample + mine % points);
      x = locations[2 * sample];
      y = locations[2 * sample + 1];
      const BilinearCell<float> cell =
          location_cell<float>(y, x, level.H, level.W, is_discrete);
      touches = cell.inside && (cell.y == map_row || cell.y + 1 == map_row);
    }
    unsigned int hits = __ballot_sync(kAllLanes, touches);
    while (hits != 0u) {
      const int source = __ffs(static_cast<int>(hits)) - 1;
      hits &= hits - 1u;
      const float hit_y = __shfl_sync(kAllLanes, y, source);
      const float hit_x = __shfl_sync(kAllLanes, x, source);
      if (channel < p.D) {
        const int hit = point + source;
        const Index hit_row = query + Index(hit / points);
        const Index sample = samples_index<Index>(hit_row, head, p) +
            Index(level.first_sample + hit % points);
        const BilinearCell<float> cell =
            location_cell<float>(hit_y, hit_x, level.H, level.W, is_discrete);
        const CornerWeights<float> corners = value_weights<float>(cell);
        const float sampled =
            weights[sample] *
            static_cast<float>(
                cotangent
                    [query_index<Index>(hit_row, head, p) + Index(channel)]);
        for (int i = 0; i < 4; ++i) {
          if (cell.corner[i] && cell.y + (i >> 1) == map_row) {
            const Index at =
                row_at + Index(cell.x + (i & 1)) * Index(p.M * p.D);
            grad_value[at] += corners.w[i] * sampled;
          }
        }
      }
    }
    point += 32;
    query += Index(point / points);
    point = point % points;
  }
}

} // namespace mlx_deform
