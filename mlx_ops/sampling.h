// The bilinear sampling rule, stated once for C++, Metal and CUDA: which cell a
// coordinate falls into, the weights of the cell's four corners, and their
// slopes. No pointers and no memory: callers load the corners themselves.
//
// The image is extended by zeros without end and interpolated bilinearly inside
// the cell that `floor` gives. The slope is the one of that cell, so at an
// integer coordinate it is the right-hand derivative; at -1, where the value is
// 0, it need not be 0. Beyond the image, at infinity too, value and slope are
// 0. A NaN coordinate has no cell: `nan` is set and no corner may be read.

#pragma once

#if defined(__METAL_VERSION__)
#define MLX_DEFORM_FN inline
#define MLX_DEFORM_DEVICE device
#define MLX_DEFORM_CONSTANT constant
#elif defined(__CUDACC__)
#define MLX_DEFORM_FN __device__ inline
#define MLX_DEFORM_DEVICE
#define MLX_DEFORM_CONSTANT const
#else
// Internal linkage: the CPU kernels are compiled once per instruction set, and
// the linker must not merge these functions across them.
#define MLX_DEFORM_FN static inline
#endif

namespace mlx_deform {

MLX_DEFORM_FN float floor_of(float x) {
#if defined(__METAL_VERSION__)
  return metal::floor(x);
#elif defined(__CUDACC__)
  return floorf(x);
#else
  return __builtin_floorf(x);
#endif
}

#if !defined(__METAL_VERSION__)
MLX_DEFORM_FN double floor_of(double x) {
#if defined(__CUDACC__)
  return floor(x);
#else
  return __builtin_floor(x);
#endif
}
#endif

// The coordinate on one axis that a kernel tap samples for an output position.
// T is float or double, never a half: a half cannot hold 700.3.
template <typename T>
MLX_DEFORM_FN T sample_coordinate(
    int out,
    int stride,
    int pad,
    int tap,
    int dilation,
    T offset) {
  return T(out * stride - pad + tap * dilation) + offset;
}

// The corners of a cell are numbered 0: (y, x), 1: (y, x + 1), 2: (y + 1, x),
// 3: (y + 1, x + 1).
template <typename T>
struct BilinearCell {
  int y; // upper left corner; may be -1, so test `corner` before reading
  int x;
  T ly; // position inside the cell, in [0, 1)
  T lx;
  bool inside; // else the sample lies beyond the image: value and slopes are 0
  bool nan; // a coordinate is NaN: value and slopes are NaN
  bool corner[4]; // the corner lies in the image
};

template <typename T>
struct CornerWeights {
  T w[4];
};

template <typename T>
MLX_DEFORM_FN BilinearCell<T> bilinear_cell(T y, T x, int H, int W) {
  BilinearCell<T> cell;
  cell.nan = !(y == y) || !(x == x);
  // Compared as floating-point numbers, before any conversion to int that a
  // huge coordinate would overflow.
  cell.inside = y >= T(-1) && y < T(H) && x >= T(-1) && x < T(W);
  const T y0 = cell.inside ? floor_of(y) : T(0);
  const T x0 = cell.inside ? floor_of(x) : T(0);
  cell.y = int(y0);
  cell.x = int(x0);
  cell.ly = cell.inside ? y - y0 : T(0);
  cell.lx = cell.inside ? x - x0 : T(0);
  const bool top = cell.inside && cell.y >= 0 && cell.y < H;
  const bool bottom = cell.inside && cell.y + 1 < H;
  const bool left = cell.x >= 0 && cell.x < W;
  const bool right = cell.x + 1 < W;
  cell.corner[0] = top && left;
  cell.corner[1] = top && right;
  cell.corner[2] = bottom && left;
  cell.corner[3] = bottom && right;
  return cell;
}

// value = sum over the corners of w[i] * image[corner i]
template <typename T>
MLX_DEFORM_FN CornerWeights<T> value_weights(BilinearCell<T> cell) {
  const T hy = T(1) - cell.ly;
  const T hx = T(1) - cell.lx;
  CornerWeights<T> out;
  out.w[0] = hy * hx;
  out.w[1] = hy * cell.lx;
  out.w[2] = cell.ly * hx;
  out.w[3] = cell.ly * cell.lx;
  return out;
}

// d value / d y = sum over the corners of w[i] * image[corner i]
template <typename T>
MLX_DEFORM_FN CornerWeights<T> slope_weights_y(BilinearCell<T> cell) {
  const T hx = T(1) - cell.lx;
  CornerWeights<T> out;
  out.w[0] = -hx;
  out.w[1] = -cell.lx;
  out.w[2] = hx;
  out.w[3] = cell.lx;
  return out;
}

// d value / d x = sum over the corners of w[i] * image[corner i]
template <typename T>
MLX_DEFORM_FN CornerWeights<T> slope_weights_x(BilinearCell<T> cell) {
  const T hy = T(1) - cell.ly;
  CornerWeights<T> out;
  out.w[0] = -hy;
  out.w[1] = hy;
  out.w[2] = -cell.ly;
  out.w[3] = cell.ly;
  return out;
}

} // namespace mlx_deform
