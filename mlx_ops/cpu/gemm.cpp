#include "mlx_ops/cpu/gemm.h"

#include <type_traits>

#if defined(__APPLE__)
#include <Accelerate/Accelerate.h>
#define BLAS(name) cblas_##name
#else
#include <cblas.h>
#define BLAS(name) scipy_cblas_##name
#endif

namespace mlx_deform::cpu {

namespace {

void use_one_thread() {
#if !defined(__APPLE__)
  static const bool done = [] {
    scipy_openblas_set_num_threads(1);
    return true;
  }();
  (void)done;
#endif
}

template <typename R>
auto product() {
  if constexpr (std::is_same_v<R, float>) {
    return BLAS(sgemm);
  } else {
    return BLAS(dgemm);
  }
}

// Tiles are small, so every size fits in BLAS's 32-bit integers.
int narrow(int64_t size) {
  return static_cast<int>(size);
}

} // namespace

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
    int64_t ldc) {
  use_one_thread();
  product<R>()(
      CblasRowMajor,
      trans_a == Transpose::yes ? CblasTrans : CblasNoTrans,
      trans_b == Transpose::yes ? CblasTrans : CblasNoTrans,
      narrow(m),
      narrow(n),
      narrow(k),
      R(1),
      a,
      narrow(lda),
      b,
      narrow(ldb),
      beta,
      c,
      narrow(ldc));
}

#define INSTANTIATE(R)   \
  template void gemm<R>( \
      Transpose,         \
      Transpose,         \
      int64_t,           \
      int64_t,           \
      int64_t,           \
      const R*,          \
      int64_t,           \
      const R*,          \
      int64_t,           \
      R,                 \
      R*,                \
      int64_t)

INSTANTIATE(float);
INSTANTIATE(double);

} // namespace mlx_deform::cpu
