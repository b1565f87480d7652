// Sampling beside a product: a product waits for its arithmetic, sampling for
// its loads. Of one instruction set, as tile_kernels_impl.h is.

#pragma once

#include "mlx_ops/cpu/sampling_impl.h"

// Where a tile's sums leave enough registers: of AVX2's 16 there are too few.
#define MLX_DEFORM_OVERLAPS (MLX_DEFORM_VECTOR_BYTES == 64)

#if MLX_DEFORM_OVERLAPS
#include "mlx_ops/cpu/products_impl.h"
#endif

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

#if MLX_DEFORM_OVERLAPS
template <typename T, typename R>
void sample_beside(
    const DeformConv2dParams& params,
    const T* input,
    const T* zeros,
    const Columns<R>& columns,
    const PackedProduct<R>& product) {
  // Of long rows, pieces: the more often sampling and product take turns, the
  // more of it is hidden.
  const int row = row_length(params, columns.block);
  const int pieces = row % piece_length<R> == 0 ? row / piece_length<R> : 1;
  with_length<R>(row / pieces, [&](auto length) {
    Rows<length.value, Place::beside, T, R> rows(
        params, input, zeros, columns, pieces);
    const int64_t times = pauses(product);
    const int64_t at_once = times ? (rows.left() + times - 1) / times : 0;
    multiply_beside(product, [&]() __attribute__((always_inline)) {
      for (int64_t i = 0; i < at_once && rows.left(); ++i) {
        rows.next();
      }
    });
    while (rows.left()) {
      rows.next();
    }
  });
}
#endif

// As the table of kernels has it.
template <typename T, typename R>
constexpr decltype(TileKernels<T, R>::sample_beside) sample_beside_or_null =
#if MLX_DEFORM_OVERLAPS
    sample_beside<T, R>;
#else
    nullptr;
#endif

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
