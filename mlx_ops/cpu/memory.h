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

inline void allocate(std::vector<mx::array>& arrays) {
  for (mx::array& x : arrays) {
    mlx_deform::allocate(x);
    want_huge_pages(x.data<char>(), x.nbytes());
  }
}

} // namespace mlx_deform::cpu
