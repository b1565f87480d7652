#include "mlx_ops/cpu/transpose.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "mlx_ops/cpu/memory.h"
#include "mlx_ops/cpu/thread_pool.h"

namespace mlx_deform::cpu {

namespace {

constexpr int64_t task_rows = 512;
constexpr int64_t task_columns = 64;
constexpr int64_t block = 32;

// Through a copy in the first-level cache, so that each cache line of either
// matrix is touched once: columns of large powers of two elements would throw
// each other's lines out.
template <typename T>
void transpose_block(
    const T* from,
    T* to,
    int64_t rows,
    int64_t columns,
    int64_t row_end,
    int64_t column_end) {
  T copy[block][block];
  for (int64_t i = 0; i < row_end; ++i) {
    for (int64_t j = 0; j < column_end; ++j) {
      copy[j][i] = from[i * columns + j];
    }
  }
  for (int64_t j = 0; j < column_end; ++j) {
    std::copy_n(copy[j], row_end, to + j * rows);
  }
}

template <typename T>
void transpose_as(
    const T* from,
    T* to,
    int64_t count,
    int64_t rows,
    int64_t columns) {
  const int64_t down = (rows + task_rows - 1) / task_rows;
  const int64_t across = (columns + task_columns - 1) / task_columns;
  ThreadPool::Session session(ThreadPool::instance());
  session.run(count * down * across, [&](int64_t task, Worker&) {
    // Neighbouring tasks write neighbouring memory.
    const int64_t n = task / (down * across) * rows * columns;
    const int64_t j0 = task / down % across * task_columns;
    const int64_t i0 = task % down * task_rows;
    const int64_t j1 = std::min(j0 + task_columns, columns);
    const int64_t i1 = std::min(i0 + task_rows, rows);
    for (int64_t i = i0; i < i1; i += block) {
      for (int64_t j = j0; j < j1; j += block) {
        transpose_block(
            from + n + i * columns + j,
            to + n + j * rows + i,
            rows,
            columns,
            std::min(block, i1 - i),
            std::min(block, j1 - j));
      }
    }
  });
}

} // namespace

void transpose(
    const void* from,
    void* to,
    int64_t count,
    int64_t rows,
    int64_t columns,
    size_t element_bytes) {
  want_huge_pages(to, count * rows * columns * element_bytes);
  const auto as = [&]<typename T>(T) {
    transpose_as(
        static_cast<const T*>(from), static_cast<T*>(to), count, rows, columns);
  };
  switch (element_bytes) {
    case 2:
      return as(uint16_t());
    case 4:
      return as(uint32_t());
    case 8:
      return as(uint64_t());
    default:
      throw std::invalid_argument(
          "[transpose] elements must have 2, 4 or 8 bytes; got " +
          std::to_string(element_bytes));
  }
}

} // namespace mlx_deform::cpu
