// Matrix products for tiles that are already in cache. BLAS packs both factors
// anew at every call; here the weight is packed once, and the columns, a few
// pixels of them, are read where the sampling has just put them.

#pragma once

#include <stdint.h>

namespace mlx_deform::cpu {

// c (m x n) = a (m x k) * b (k x n) + (accumulate ? c : 0), for a packed b.
template <typename R>
struct PackedProduct {
  int64_t m;
  int64_t n;
  int64_t k;
  const R* a;
  int64_t lda;
  const R* packed; // the first of the k rows in the first panel
  int64_t panel_stride; // between the panels
  R* c;
  int64_t ldc;
  bool accumulate;
};

template <typename R>
struct Products {
  int panel; // columns of a packed panel
  int strip; // rows of c that a pass makes: the best number of pixels at a time

  // Packs b (k x n), element (i, j) at b[i * row_step + j * column_step], into
  // [panels][k][panel], filled up with zeros.
  void (*pack)(
      const R* b,
      int64_t row_step,
      int64_t column_step,
      int64_t k,
      int64_t n,
      R* packed);

  void (*multiply)(const PackedProduct<R>& product);

  // Packs a (k x m), rows lda apart, into [strips][k][strip], filled up with
  // zeros: where rows lie a power of two apart they push each other out of the
  // cache.
  void (*pack_transposed)(
      const R* a,
      int64_t lda,
      int64_t k,
      int64_t m,
      R* packed);

  // c (m x n) = a^T (m x k) * b (k x n) + (accumulate ? c : 0), for a (k x m)
  // packed as above. Rows of b are read up to a whole vector: ldb must leave
  // room.
  void (*multiply_transposed)(
      int64_t m,
      int64_t n,
      int64_t k,
      const R* packed,
      const R* b,
      int64_t ldb,
      R* c,
      int64_t ldc,
      bool accumulate);

  int64_t packed_transposed_size(int64_t k, int64_t m) const {
    return (m + strip - 1) / strip * strip * k;
  }

  int64_t packed_size(int64_t k, int64_t n) const {
    return (n + panel - 1) / panel * panel * k;
  }
};

// The products for this machine, or null where its BLAS is faster.
template <typename R>
const Products<R>* own_products();

} // namespace mlx_deform::cpu
