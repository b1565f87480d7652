// Matrices transposed on all cores, for the layouts of other frameworks.

#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_deform::cpu {

// to[n][j][i] = from[n][i][j] for `count` matrices of (rows x columns) elements
// of 2, 4 or 8 bytes, both row-contiguous and apart from each other.
void transpose(
    const void* from,
    void* to,
    int64_t count,
    int64_t rows,
    int64_t columns,
    size_t element_bytes);

} // namespace mlx_deform::cpu
