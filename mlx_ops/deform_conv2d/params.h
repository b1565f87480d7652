// Sizes and strides of one deformable convolution, read by C++, Metal and CUDA
// alike: no includes, plain fields, the same layout everywhere (`int` has 32
// bits and `long` 64 on every platform that MLX supports).

#pragma once

namespace mlx_deform {

struct DeformConv2dParams {
  int N; // batch
  int H; // input rows
  int W; // input columns
  int C; // input channels
  int O; // output channels; 0 where there is no weight (deform_im2col)
  int kH; // kernel rows
  int kW; // kernel columns
  int Ho; // output rows
  int Wo; // output columns
  int stride_h;
  int stride_w;
  int pad_h;
  int pad_w;
  int dilation_h;
  int dilation_w;
  int G; // weight groups: C / G input and O / G output channels each
  int DG; // offset groups: C / DG input channels share one offset
  int has_mask; // 0: no modulation mask (DCNv1), 1: DCNv2

  // The output pixels to work on, [pixel_begin, pixel_end) of N * Ho * Wo.
  // Offsets, masks and their gradients are indexed by the absolute pixel;
  // columns by the pixel's distance from pixel_begin.
  long pixel_begin;
  long pixel_end;

  // Where a column element lies, in elements. With p the pixel relative to
  // pixel_begin, k = i * kW + j the tap, and c the channel within weight group
  // g: column[g * column_group + p * column_pixel + k * column_tap + c].
  long column_group;
  long column_pixel;
  long column_tap;
};

} // namespace mlx_deform
