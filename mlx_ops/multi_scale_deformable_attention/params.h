// Sizes of one multi-scale deformable attention, read by C++, Metal and CUDA
// alike: no includes, plain fields, the same layout everywhere (`int` has 32
// bits and `long` 64 on every platform that MLX supports).

#pragma once

namespace mlx_deform {

struct MsdaParams {
  int N; // batch
  int S; // rows of value: the pixels of all levels
  int Q; // queries
  int M; // heads
  int D; // channels of a head
  int L; // levels
  int K; // samples of a query and head, on all levels
  int is_discrete; // 0: bilinear sampling, 1: the pixel that a location lies in

  // The queries to work on, as rows n * Q + q.
  long query_begin;
  long query_end;
};

// One level of the pyramid: a map whose pixels are rows of value.
struct MsdaLevel {
  int H; // rows of the map
  int W; // columns
  int start; // the first of its pixels among the S
  int first; // the first of its samples among the K
};

} // namespace mlx_deform
