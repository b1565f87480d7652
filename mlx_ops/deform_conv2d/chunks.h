// How the work of a convolution is cut on a GPU: into pieces, each a primitive
// of MLX's graph, so that none of them outlives a GPU's watchdog; and a piece
// into chunks, whose columns share a small memory. Pure arithmetic, as the
// dispatch plans.

#pragma once

#include <cstdint>
#include <vector>

#include "mlx_ops/deform_conv2d/params.h"

namespace mlx_deform::gpu {

// Output pixels [begin, end).
struct PixelRange {
  int64_t begin;
  int64_t end;
};

// What a primitive computes.
struct Work {
  bool output{false};
  bool grad_weight{false};
  bool grad_input{false};
  bool grad_samples{false}; // of offset or mask
  bool deterministic{false};
};

// Floating-point operations of the pixels [pixel_begin, pixel_end), on the
// route of Apple's GPUs.
double operations(const DeformConv2dParams& params, const Work& work);

// The pieces that `work` on all pixels is cut into: as many as keep each below
// MLX_DEFORM_PIECE_GFLOP, but no smaller than an output row.
int piece_count(const DeformConv2dParams& params, const Work& work);

// The pixels of piece `index` of `count`: whole output rows, and all of them
// together. For any sizes, since a compiled graph may be fed other ones than
// those that it was cut for.
PixelRange piece_pixels(const DeformConv2dParams& params, int index, int count);

// Cuts the pixels [pixel_begin, pixel_end) so that one chunk's columns take at
// most `budget` bytes where a single pixel does: whole output rows where one
// fits and the range consists of such, and chunks of nearly equal size.
std::vector<PixelRange>
plan_chunks(const DeformConv2dParams& params, int64_t itemsize, int64_t budget);

// Bytes for the columns that exist at once: the environment's
// MLX_DEFORM_COLUMN_BUDGET_MB, or this many MB.
int64_t column_budget(int64_t default_megabytes);

// The budget of one chunk where two buffers take turns: sampling one chunk
// overlaps multiplying the other. Columns that would fit into a buffer are cut
// too, into three or four, unless that makes them small.
int64_t
chunk_budget(const DeformConv2dParams& params, int64_t itemsize, int64_t all);

} // namespace mlx_deform::gpu
