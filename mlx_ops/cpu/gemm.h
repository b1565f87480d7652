// Single-threaded matrix products from the platform's BLAS: OpenBLAS on Linux,
// Accelerate on macOS. Our tiles run on all cores, so BLAS itself must not.

#pragma once

#include <cstdint>

namespace mlx_deform::cpu {

enum class Transpose { no, yes };

// C (m x n) = op(A) (m x k) * op(B) (k x n) + beta * C, all row-major.
template <typename R>
void gemm(
    Transpose trans_a,
    Transpose trans_b,
    int64_t m,
    int64_t n,
    int64_t k,
    const R* a,
    int64_t lda,
    const R* b,
    int64_t ldb,
    R beta,
    R* c,
    int64_t ldc);

} // namespace mlx_deform::cpu
