/* Stand-in for Apple's Accelerate: the two BLAS calls that mlx_deform makes.
   As in the real header, ACCELERATE_NEW_LAPACK picks other symbol names. */
#pragma once

#ifdef ACCELERATE_NEW_LAPACK
#define MLX_DEFORM_STUB_BLAS(name) __asm("_" #name "$NEWLAPACK")
#else
#define MLX_DEFORM_STUB_BLAS(name)
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE {
  CblasNoTrans = 111,
  CblasTrans = 112,
  CblasConjTrans = 113
};

void cblas_sgemm(
    const enum CBLAS_ORDER order,
    const enum CBLAS_TRANSPOSE trans_a,
    const enum CBLAS_TRANSPOSE trans_b,
    const int m,
    const int n,
    const int k,
    const float alpha,
    const float* a,
    const int lda,
    const float* b,
    const int ldb,
    const float beta,
    float* c,
    const int ldc) MLX_DEFORM_STUB_BLAS(cblas_sgemm);

void cblas_dgemm(
    const enum CBLAS_ORDER order,
    const enum CBLAS_TRANSPOSE trans_a,
    const enum CBLAS_TRANSPOSE trans_b,
    const int m,
    const int n,
    const int k,
    const double alpha,
    const double* a,
    const int lda,
    const double* b,
    const int ldb,
    const double beta,
    double* c,
    const int ldc) MLX_DEFORM_STUB_BLAS(cblas_dgemm);

#ifdef __cplusplus
}
#endif
