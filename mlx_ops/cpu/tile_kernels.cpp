#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/depthwise.h"
#include "mlx_ops/cpu/isa.h"
#include "mlx_ops/cpu/products.h"

namespace mlx_deform::cpu {

#define DECLARE(isa)                                          \
  namespace isa {                                             \
  extern const TileKernels<float, float> kernels_float32;     \
  extern const TileKernels<double, double> kernels_float64;   \
  extern const TileKernels<Float16, float> kernels_float16;   \
  extern const TileKernels<BFloat16, float> kernels_bfloat16; \
  extern const DepthwiseKernels<float> depthwise_float32;     \
  extern const DepthwiseKernels<double> depthwise_float64;    \
  }

DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#endif

#define DECLARE_PRODUCTS(isa)                     \
  namespace isa {                                 \
  extern const Products<float> products_float32;  \
  extern const Products<double> products_float64; \
  }

#if defined(__x86_64__)
DECLARE_PRODUCTS(avx2)
DECLARE_PRODUCTS(avx512)
// BLAS has products for the baseline.
#define CHOOSE_PRODUCTS(table)                 \
  return isa() == Isa::avx512 ? &avx512::table \
      : isa() == Isa::avx2    ? &avx2::table   \
                              : nullptr
#else
DECLARE_PRODUCTS(baseline)
#define CHOOSE_PRODUCTS(table) return &baseline::table
#endif

template <>
const TileKernels<float, float>& tile_kernels(int channels) {
  return MLX_DEFORM_TABLE(
      isa_for_rows(channels * sizeof(float)), kernels_float32);
}
template <>
const TileKernels<double, double>& tile_kernels(int channels) {
  return MLX_DEFORM_TABLE(
      isa_for_rows(channels * sizeof(double)), kernels_float64);
}
template <>
const TileKernels<Float16, float>& tile_kernels(int channels) {
  return MLX_DEFORM_TABLE(
      isa_for_rows(channels * sizeof(float)), kernels_float16);
}
template <>
const TileKernels<BFloat16, float>& tile_kernels(int channels) {
  return MLX_DEFORM_TABLE(
      isa_for_rows(channels * sizeof(float)), kernels_bfloat16);
}

template <>
const DepthwiseKernels<float>& depthwise_kernels() {
  return MLX_DEFORM_CHOOSE(depthwise_float32);
}
template <>
const DepthwiseKernels<double>& depthwise_kernels() {
  return MLX_DEFORM_CHOOSE(depthwise_float64);
}

template <>
const Products<float>* own_products() {
  CHOOSE_PRODUCTS(products_float32);
}
template <>
const Products<double>* own_products() {
  CHOOSE_PRODUCTS(products_float64);
}

} // namespace mlx_deform::cpu
