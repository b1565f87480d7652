// Memory for results.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "mlx_ops/arrays.h"

namespace mlx_deform::cpu {

// Large memory that nobody has touched yet is fetched in huge pages, where the
// kernel gives them on request: the faults of small ones cost as much time as
// writing the memory. From 4 MB on, as in NumPy.
inline void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr size_t large = 4 << 20;
  constexpr uintptr_t page = 4096;
  if (bytes >= large) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + page - 1) / page * page;
    const uintptr_t last = (begin + bytes) / page * page;
    // A refusal changes nothing but the speed.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

// Results begin with a cache line: adding to a gradient takes a third longer
// where its vectors lie across two of them.
inline void allocate(std::vector<mx::array>& arrays) {
  constexpr size_t line = 64;
  for (mx::array& x : arrays) {
    x.set_data(mx::allocator::malloc(x.nbytes() + line));
    const auto over = reinterpret_cast<uintptr_t>(x.data<char>()) % line;
    const size_t skip = over ? (line - over) / x.itemsize() : 0;
    const mx::Strides strides = x.strides();
    x.copy_shared_buffer(x, strides, x.flags(), x.data_size(), skip);
    want_huge_pages(x.data<char>(), x.nbytes());
  }
}

} // namespace mlx_deform::cpu
