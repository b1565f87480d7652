// Bodies of the products, included as tile_kernels_impl.h is; like the tile
// kernels they keep the standard library's inline functions out.

#pragma once

#include "mlx_ops/cpu/products.h"
#include "mlx_ops/cpu/shuffles.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// The sums of a tile of c, rows by vectors, with the vectors of b and one of a,
// all in registers: AVX-512 and NEON have 32 of them, AVX2 has 16. Two vectors
// fit common numbers of channels better than three, but four floats are few.
constexpr int strip_rows = MLX_DEFORM_VECTOR_BYTES == 64 ? 12
    : MLX_DEFORM_VECTOR_BYTES == 32                      ? 6
                                                         : 8;
constexpr int panel_vectors = MLX_DEFORM_VECTOR_BYTES == 16 ? 3 : 2;

template <typename R>
constexpr int panel_width = panel_vectors * VectorOf<R>::width;

// Which factor is packed: a into strips, [k][strip_rows], or b into panels,
// [k][panel_width]. The rows of the other lie `stride` apart.
enum class Packed { a, b };

// What a tile of c, (rows x k) * (k x columns), is made of.
template <typename R>
struct Factors {
  int64_t k;
  const R* a;
  const R* b;
  int64_t stride;
  R* c;
  int64_t ldc;
  bool accumulate;
};

// Where a tile is in its factors: at a step, of which each takes `rows`
// elements of a, one of each row, and a row of b.
template <int rows, Packed packed, typename R>
struct Walk {
  static constexpr bool strips = packed == Packed::a;
  // A pointer to every third row, from which the others lie so many elements
  // beyond: one for each row would take all registers there are.
  static constexpr int rows_each = strips ? rows : 3;
  static constexpr int pointers = (rows + rows_each - 1) / rows_each;
  static constexpr int strides = strips ? 1 : 2;

  const R* a[pointers];
  const R* b;
  int64_t beyond[strides];

  explicit Walk(const Factors<R>& of) : b(of.b) {
    MLX_DEFORM_UNROLL(4)
    for (int i = 0; i < pointers; ++i) {
      a[i] = of.a + i * rows_each * of.stride;
    }
    MLX_DEFORM_UNROLL(2)
    for (int i = 0; i < strides; ++i) {
      beyond[i] = (i + 1) * of.stride;
    }
  }

  MLX_DEFORM_INLINE R element(int row, int step) const {
    const R* from = a[row / rows_each];
    const int i = row % rows_each;
    return strips ? from[step * strip_rows + i]
        : i == 0  ? from[step]
                  : from[beyond[i - 1] + step];
  }
  MLX_DEFORM_INLINE const R* row(int step) const {
    return b + step * (strips ? beyond[0] : panel_width<R>);
  }

  MLX_DEFORM_INLINE void advance(int steps) {
    b = row(steps);
    MLX_DEFORM_UNROLL(4)
    for (int i = 0; i < pointers; ++i) {
      a[i] += steps * (strips ? strip_rows : 1);
      __asm__("" : "+r"(a[i])); // else the compiler adds pointers of its own
    }
  }

  // In memory, for all registers to be free. The compiler itself would put some
  // into vectors, whose way back is as long as the queue of sums.
  struct Kept {
    const R* volatile a[pointers];
    const R* volatile b;
    volatile int64_t beyond[strides];
  };
  MLX_DEFORM_INLINE void keep(Kept& kept) const {
    MLX_DEFORM_UNROLL(4)
    for (int i = 0; i < pointers; ++i) {
      kept.a[i] = a[i];
    }
    kept.b = b;
    MLX_DEFORM_UNROLL(2)
    for (int i = 0; i < strides; ++i) {
      kept.beyond[i] = beyond[i];
    }
  }
  MLX_DEFORM_INLINE void take_back(const Kept& kept) {
    MLX_DEFORM_UNROLL(4)
    for (int i = 0; i < pointers; ++i) {
      a[i] = kept.a[i];
    }
    b = kept.b;
    MLX_DEFORM_UNROLL(2)
    for (int i = 0; i < strides; ++i) {
      beyond[i] = kept.beyond[i];
    }
  }
};

// A tile of c, `rows` by the first `vectors` of a panel. With a `pause`, calls
// meanwhile() once in so many steps.
template <
    int rows,
    int vectors,
    Packed packed,
    int pause,
    typename R,
    typename F>
static MLX_DEFORM_INLINE void tile_beside(
    const Factors<R>& of,
    const F& meanwhile) {
  constexpr int width = VectorOf<R>::width;
  R* const c = of.c;
  const int64_t ldc = of.ldc;
  // Beyond these, compilers no longer keep all the sums in registers.
  constexpr int unrolled =
      packed == Packed::b && MLX_DEFORM_VECTOR_BYTES == 32 ? 8 : 2;

  Vector<R> sum[rows][vectors];
  MLX_DEFORM_UNROLL(12)
  for (int r = 0; r < rows; ++r) {
    MLX_DEFORM_UNROLL(3)
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = of.accumulate ? load(c + r * ldc + v * width) : Vector<R>{};
    }
  }
  Walk<rows, packed, R> at(of);
  const auto step = [&](int i) __attribute__((always_inline)) {
    Vector<R> y[vectors];
    MLX_DEFORM_UNROLL(3)
    for (int v = 0; v < vectors; ++v) {
      y[v] = load(at.row(i) + v * width);
    }
    MLX_DEFORM_UNROLL(12)
    for (int r = 0; r < rows; ++r) {
      const Vector<R> x = at.element(r, i) - Vector<R>{}; // in all lanes
      MLX_DEFORM_UNROLL(3)
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] += x * y[v];
      }
    }
  };
  const auto steps = [&](int64_t n) __attribute__((always_inline)) {
    for (; n >= unrolled; n -= unrolled) {
      MLX_DEFORM_UNROLL(8)
      for (int i = 0; i < unrolled; ++i) {
        step(i);
      }
      at.advance(unrolled);
    }
    return n;
  };
  int64_t k = of.k;
  if constexpr (pause > 0) {
    for (; k >= pause; k -= pause) {
      steps(pause);
      typename Walk<rows, packed, R>::Kept kept;
      at.keep(kept);
      meanwhile();
      at.take_back(kept);
    }
  }
  for (k = steps(k); k > 0; --k) {
    step(0);
    at.advance(1);
  }
  MLX_DEFORM_UNROLL(12)
  for (int r = 0; r < rows; ++r) {
    MLX_DEFORM_UNROLL(3)
    for (int v = 0; v < vectors; ++v) {
      store(c + r * ldc + v * width, sum[r][v]);
    }
  }
}

template <int rows, int vectors, Packed packed, typename R>
void tile(const Factors<R>& of) {
  tile_beside<rows, vectors, packed, 0>(of, [] {});
}

template <typename R>
using Tile = void (*)(const Factors<R>&);

// The tiles of 1 to strip_rows rows.
template <int vectors, Packed packed, typename R>
struct Tiles {
  Tile<R> of[strip_rows + 1];

  constexpr Tiles() : of{} {
    set<1>();
  }

 private:
  template <int rows>
  constexpr void set() {
    of[rows] = tile<rows, vectors, packed, R>;
    if constexpr (rows < strip_rows) {
      set<rows + 1>();
    }
  }
};

template <int vectors, Packed packed, typename R>
constexpr Tiles<vectors, packed, R> tiles;

// The tiles as wide as `columns` columns of a panel.
template <Packed packed, typename R>
const Tile<R>* tiles_for(int columns) {
  constexpr int width = VectorOf<R>::width;
  if (panel_vectors == 3 && columns > 2 * width) {
    return tiles<panel_vectors, packed, R>.of;
  }
  return columns > width ? tiles<2, packed, R>.of : tiles<1, packed, R>.of;
}

template <typename R>
int columns_left(int64_t n, int64_t j) {
  return int(n - j < panel_width<R> ? n - j : panel_width<R>);
}

// c += part or c = part, at the first `columns` of a panel.
template <typename R>
void put_row(const R* part, int columns, R* c, bool accumulate) {
  constexpr int width = VectorOf<R>::width;
  int j = 0;
  for (; j + width <= columns; j += width) {
    const Vector<R> old = accumulate ? load(c + j) : Vector<R>{};
    store(c + j, old + load(part + j));
  }
  if (has_masks && j < columns) {
    const int left = columns - j;
    const Vector<R> old = accumulate ? load_first(c + j, left) : Vector<R>{};
    store_first(c + j, left, old + load(part + j));
    return;
  }
  for (; j < columns; ++j) {
    c[j] = (accumulate ? c[j] : R(0)) + part[j];
  }
}

// All rows of c at one panel, of which `columns` exist, from its first tile on.
template <Packed packed, typename R>
void panel_of_c(int64_t m, int columns, const Factors<R>& first) {
  constexpr int panel = panel_width<R>;
  const bool whole = columns % VectorOf<R>::width == 0;
  const Tile<R>* run = tiles_for<packed, R>(columns);
  for (int64_t r = 0; r < m; r += strip_rows) {
    const int rows = int(m - r < strip_rows ? m - r : strip_rows);
    Factors<R> of = first;
    of.a += r * (packed == Packed::a ? first.k : first.stride);
    of.c += r * first.ldc;
    if (whole) {
      run[rows](of);
      continue;
    }
    // The last vector reaches beyond c.
    R* const to = of.c;
    R part[strip_rows * panel];
    of.c = part;
    of.ldc = panel;
    of.accumulate = false;
    run[rows](of);
    for (int i = 0; i < rows; ++i) {
      put_row(part + i * panel, columns, to + i * first.ldc, first.accumulate);
    }
  }
}

// Of the tile at row r and column j, where a panel begins.
template <typename R>
static inline Factors<R>
factors_at(const PackedProduct<R>& p, int64_t r, int64_t j) {
  return {
      p.k,
      p.a + r * p.lda,
      p.packed + j / panel_width<R> * p.panel_stride,
      p.lda,
      p.c + r * p.ldc + j,
      p.ldc,
      p.accumulate};
}

template <typename R>
void multiply(const PackedProduct<R>& p) {
  for (int64_t j = 0; j < p.n; j += panel_width<R>) {
    panel_of_c<Packed::b>(p.m, columns_left<R>(p.n, j), factors_at(p, 0, j));
  }
}

// How often multiply_beside() calls meanwhile().
constexpr int steps_between = 8;
template <typename R>
int64_t pauses(const PackedProduct<R>& p) {
  const int64_t tiles = (p.m / strip_rows) * (p.n / panel_width<R>);
  return tiles * (p.k / steps_between);
}

// multiply(), and meanwhile() every few steps. That must be inlined: a call
// would spill the sums of a tile.
template <typename R, typename F>
static MLX_DEFORM_INLINE void multiply_beside(
    const PackedProduct<R>& p,
    const F& meanwhile) {
  const int64_t rows = p.m / strip_rows * strip_rows;
  const int64_t columns = p.n / panel_width<R> * panel_width<R>;
  for (int64_t r = 0; r < rows; r += strip_rows) {
    for (int64_t j = 0; j < columns; j += panel_width<R>) {
      tile_beside<strip_rows, panel_vectors, Packed::b, steps_between>(
          factors_at(p, r, j), meanwhile);
    }
  }
  // What is left to the right of these tiles, and below.
  PackedProduct<R> right = p, below = p;
  right.m = rows;
  right.n -= columns;
  right.packed += columns / panel_width<R> * p.panel_stride;
  right.c += columns;
  multiply(right);
  below.m -= rows;
  below.a += rows * p.lda;
  below.c += rows * p.ldc;
  multiply(below);
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
    panel_of_c<Packed::a, R>(
        m, columns, {k, packed, b + j, ldb, c + j, ldc, accumulate});
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

#if MLX_DEFORM_HAS_SHUFFLES
// The lanes of two vectors by turns, from `first` on.
template <int width, int first>
constexpr int interleaved(int i) {
  return first + i / 2 + i % 2 * width;
}

// Rows to columns, in as many rounds as a row's halves have halves.
template <typename R>
static inline void transpose(Vector<R> (&v)[VectorOf<R>::width]) {
  constexpr int width = VectorOf<R>::width;
  constexpr int half = width / 2;
  MLX_DEFORM_UNROLL(4)
  for (int round = 1; round < width; round *= 2) {
    Vector<R> to[width];
    MLX_DEFORM_UNROLL(8)
    for (int i = 0; i < half; ++i) {
      to[2 * i] = shuffle<width, interleaved<width, 0>>(v[i], v[i + half]);
      to[2 * i + 1] =
          shuffle<width, interleaved<width, half>>(v[i], v[i + half]);
    }
    __builtin_memcpy(&v, &to, sizeof(v));
  }
}
#endif

// pack() for a whole panel of columns that are contiguous: a vector of each at
// a time, for columns some powers of two apart push each other out of the
// cache. Returns how many of their elements are done.
template <typename R>
int64_t pack_contiguous(const R* b, int64_t column_step, int64_t k, R* packed) {
  int64_t i = 0;
#if MLX_DEFORM_HAS_SHUFFLES
  constexpr int width = VectorOf<R>::width;
  for (; i + width <= k; i += width) {
    for (int j = 0; j < panel_width<R>; j += width) {
      Vector<R> v[width];
      MLX_DEFORM_UNROLL(16)
      for (int q = 0; q < width; ++q) {
        v[q] = load(b + (j + q) * column_step + i);
      }
      transpose<R>(v);
      MLX_DEFORM_UNROLL(16)
      for (int q = 0; q < width; ++q) {
        store(packed + (i + q) * panel_width<R> + j, v[q]);
      }
    }
  }
#endif
  return i;
}

template <typename R>
void pack(
    const R* b,
    int64_t row_step,
    int64_t column_step,
    int64_t k,
    int64_t n,
    R* packed) {
  constexpr int panel = panel_width<R>;
  for (int64_t j = 0; j < n; j += panel, packed += k * panel) {
    const R* from = b + j * column_step;
    const int64_t done = row_step == 1 && n - j >= panel
        ? pack_contiguous(from, column_step, k, packed)
        : 0;
    pack_pieces<panel>(
        from + done * row_step,
        row_step,
        column_step,
        k - done,
        columns_left<R>(n, j),
        packed + done * panel);
  }
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
constexpr Products<R> products_table{
    panel_width<R>,
    strip_rows,
    pack<R>,
    multiply<R>,
    pack_transposed<R>,
    multiply_transposed<R>};

} // namespace

extern const Products<float> products_float32;
extern const Products<double> products_float64;

const Products<float> products_float32 = products_table<float>;
const Products<double> products_float64 = products_table<double>;

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
