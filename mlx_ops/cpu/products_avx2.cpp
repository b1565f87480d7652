// Compiled with -mavx2 -mfma; runs only where own_products() finds these. Like
// the tile kernels it keeps the standard library's inline functions out.

#define MLX_DEFORM_ISA avx2
#define MLX_DEFORM_VECTOR_BYTES 32

#include "mlx_ops/cpu/products.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::avx2 {

namespace {

template <typename R>
constexpr int panel_width = 2 * VectorOf<R>::width;

// 6 rows by 2 vectors: 12 sums, 2 vectors of b and one of a fill the registers.
constexpr int strip_rows = 6;

// Which factor is packed: a into strips, [k][strip_rows], or b into panels,
// [k][panel_width]. The rows of the other lie `stride` apart.
enum class Packed { a, b };

// A tile of c, `rows` by one panel.
template <int rows, bool accumulate, Packed packed, typename R>
void tile(
    int64_t k,
    const R* a,
    const R* b,
    int64_t stride,
    R* c,
    int64_t ldc) {
  constexpr int width = VectorOf<R>::width;
  constexpr bool strips = packed == Packed::a;
  // Beyond these, compilers no longer keep all the sums in registers.
  constexpr int unrolled = strips ? 2 : 8;
  const int64_t row_step = strips ? 1 : stride;
  const int64_t k_step = strips ? strip_rows : 1;
  const int64_t ldb = strips ? stride : panel_width<R>;

  Vector<R> sum[rows][2];
  MLX_DEFORM_UNROLL(6)
  for (int r = 0; r < rows; ++r) {
    sum[r][0] = accumulate ? load(c + r * ldc) : Vector<R>{};
    sum[r][1] = accumulate ? load(c + r * ldc + width) : Vector<R>{};
  }
  const auto step = [&](const R* from, const R* row) {
    const Vector<R> b0 = load(row);
    const Vector<R> b1 = load(row + width);
    MLX_DEFORM_UNROLL(6)
    for (int r = 0; r < rows; ++r) {
      const Vector<R> x =
          from[r * row_step] - Vector<R>{}; // the same in all lanes
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  };
  int64_t i = 0;
  for (; i + unrolled <= k; i += unrolled) {
    MLX_DEFORM_UNROLL(8)
    for (int j = 0; j < unrolled; ++j) {
      step(a, b);
      a += k_step;
      b += ldb;
    }
  }
  for (; i < k; ++i) {
    step(a, b);
    a += k_step;
    b += ldb;
  }
  MLX_DEFORM_UNROLL(6)
  for (int r = 0; r < rows; ++r) {
    store(c + r * ldc, sum[r][0]);
    store(c + r * ldc + width, sum[r][1]);
  }
}

template <bool accumulate, Packed packed, typename R>
void tile_of(
    int rows,
    int64_t k,
    const R* a,
    const R* b,
    int64_t stride,
    R* c,
    int64_t ldc) {
  switch (rows) {
#define ROWS(n)                                           \
  case n:                                                 \
    tile<n, accumulate, packed>(k, a, b, stride, c, ldc); \
    break;
    ROWS(1)
    ROWS(2)
    ROWS(3)
    ROWS(4)
    ROWS(5)
    ROWS(6)
#undef ROWS
  }
}

template <typename R>
int columns_left(int64_t n, int64_t j) {
  return int(n - j < panel_width<R> ? n - j : panel_width<R>);
}

// All rows of c at one panel, of which `columns` exist.
template <Packed packed, typename R>
void panel_of_c(
    int64_t m,
    int columns,
    int64_t k,
    const R* a,
    const R* b,
    int64_t stride,
    R* c,
    int64_t ldc,
    bool accumulate) {
  constexpr int panel = panel_width<R>;
  for (int64_t r = 0; r < m; r += strip_rows) {
    const int rows = int(m - r < strip_rows ? m - r : strip_rows);
    const R* from = a + r * (packed == Packed::a ? k : stride);
    R* to = c + r * ldc;
    if (columns == panel) {
      const auto run =
          accumulate ? tile_of<true, packed, R> : tile_of<false, packed, R>;
      run(rows, k, from, b, stride, to, ldc);
      continue;
    }
    // The last panel may reach beyond c.
    R part[strip_rows * panel];
    tile_of<false, packed>(rows, k, from, b, stride, part, panel);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        const R old = accumulate ? to[i * ldc + j] : R(0);
        to[i * ldc + j] = old + part[i * panel + j];
      }
    }
  }
}

template <typename R>
void multiply(
    int64_t m,
    int64_t n,
    int64_t k,
    const R* a,
    int64_t lda,
    const R* packed,
    int64_t panel_stride,
    R* c,
    int64_t ldc,
    bool accumulate) {
  for (int64_t j = 0; j < n; j += panel_width<R>) {
    const R* b = packed + j / panel_width<R> * panel_stride;
    const int columns = columns_left<R>(n, j);
    panel_of_c<Packed::b>(m, columns, k, a, b, lda, c + j, ldc, accumulate);
  }
}

template <typename R>
void multiply_transposed(
    int64_t m,
    int64_t n,
    int64_t k,
    const R* packed,
    const R* b,
    int64_t ldb,
    R* c,
    int64_t ldc,
    bool accumulate) {
  for (int64_t j = 0; j < n; j += panel_width<R>) {
    const int columns = columns_left<R>(n, j);
    panel_of_c<Packed::a>(
        m, columns, k, packed, b + j, ldb, c + j, ldc, accumulate);
  }
}

// Columns of b (k x n), element (i, j) at b[i * row_step + j * column_step], to
// [pieces][k][piece], filled up with zeros.
template <int piece, typename R>
void pack_pieces(
    const R* b,
    int64_t row_step,
    int64_t column_step,
    int64_t k,
    int64_t n,
    R* packed) {
  for (int64_t j = 0; j < n; j += piece) {
    const int columns = int(n - j < piece ? n - j : piece);
    for (int64_t i = 0; i < k; ++i) {
      const R* from = b + i * row_step + j * column_step;
      for (int q = 0; q < piece; ++q) {
        packed[q] = q < columns ? from[q * column_step] : R(0);
      }
      packed += piece;
    }
  }
}

template <typename R>
void pack(
    const R* b,
    int64_t row_step,
    int64_t column_step,
    int64_t k,
    int64_t n,
    R* packed) {
  pack_pieces<panel_width<R>>(b, row_step, column_step, k, n, packed);
}

template <typename R>
void pack_transposed(const R* a, int64_t lda, int64_t k, int64_t m, R* packed) {
  const int64_t whole = m / strip_rows * strip_rows;
  for (int64_t r = 0; r < whole; r += strip_rows) {
    for (int64_t i = 0; i < k; ++i) {
      __builtin_memcpy(packed, a + i * lda + r, strip_rows * sizeof(R));
      packed += strip_rows;
    }
  }
  pack_pieces<strip_rows>(a + whole, lda, 1, k, m - whole, packed);
}

template <typename R>
constexpr Products<R> table{
    panel_width<R>,
    strip_rows,
    pack<R>,
    multiply<R>,
    pack_transposed<R>,
    multiply_transposed<R>};

} // namespace

extern const Products<float> products_float32;
extern const Products<double> products_float64;

const Products<float> products_float32 = table<float>;
const Products<double> products_float64 = table<double>;

} // namespace mlx_deform::cpu::avx2
