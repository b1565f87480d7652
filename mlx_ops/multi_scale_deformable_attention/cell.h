// Which pixels a sample of a level takes, stated once for C++, Metal and CUDA:
// the cell of mlx_ops/sampling.h that a location in units of the map falls
// into.

#pragma once

#include "mlx_ops/sampling.h"

namespace mlx_deform {

// The nearest pixel as RT-DETRv2 and D-FINE have it: location * size + 0.5,
// towards zero, and clamped to the border. NaN gives 0.
template <typename T>
MLX_DEFORM_FN int discrete_index(T location, int size) {
  const T at = location * T(size) + T(0.5f);
  // Compared as floating-point numbers, before a conversion to int that a huge
  // one would overflow.
  if (at >= T(size)) {
    return size - 1;
  }
  return at >= T(0) ? int(at) : 0;
}

// As a cell that lies on its upper left corner alone, with weight 1. A map
// without pixels has none.
template <typename T>
MLX_DEFORM_FN BilinearCell<T>
discrete_cell(T location_y, T location_x, int H, int W) {
  BilinearCell<T> cell;
  cell.nan = !(location_y == location_y) || !(location_x == location_x);
  cell.inside = !cell.nan && H > 0 && W > 0;
  cell.y = cell.inside ? discrete_index<T>(location_y, H) : 0;
  cell.x = cell.inside ? discrete_index<T>(location_x, W) : 0;
  cell.ly = T(0);
  cell.lx = T(0);
  cell.corner[0] = cell.inside;
  cell.corner[1] = false;
  cell.corner[2] = false;
  cell.corner[3] = false;
  return cell;
}

// Locations run from 0 to 1 over a map, whose first pixel's centre is half a
// pixel inside.
template <typename T>
MLX_DEFORM_FN BilinearCell<T>
location_cell(T location_y, T location_x, int H, int W, bool is_discrete) {
  if (is_discrete) {
    return discrete_cell<T>(location_y, location_x, H, W);
  }
  return bilinear_cell<T>(
      location_y * T(H) - T(0.5f), location_x * T(W) - T(0.5f), H, W);
}

} // namespace mlx_deform
