#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/depthwise.h"
#include "mlx_ops/cpu/products.h"

#include <cstdlib>
#include <string>

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
namespace avx2 {
extern const Products<float> products_float32;
extern const Products<double> products_float64;
} // namespace avx2
#endif

namespace {

#if defined(__x86_64__)
// MLX_DEFORM_ISA=baseline keeps to what every machine has, for tests.
bool use_avx2() {
  static const bool use = [] {
    const char* wish = std::getenv("MLX_DEFORM_ISA");
    return !(wish && std::string(wish) == "baseline") &&
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c");
  }();
  return use;
}
// OpenBLAS has kernels for AVX-512, twice as wide as our products.
bool use_own_products() {
  static const bool use = use_avx2() && !__builtin_cpu_supports("avx512f");
  return use;
}
#define CHOOSE(table) return use_avx2() ? avx2::table : baseline::table
#define CHOOSE_PRODUCTS(table) \
  return use_own_products() ? &avx2::table : nullptr
#else
#define CHOOSE(table) return baseline::table
#define CHOOSE_PRODUCTS(table) return nullptr
#endif

} // namespace

template <>
const TileKernels<float, float>& tile_kernels() {
  CHOOSE(kernels_float32);
}
template <>
const TileKernels<double, double>& tile_kernels() {
  CHOOSE(kernels_float64);
}
template <>
const TileKernels<Float16, float>& tile_kernels() {
  CHOOSE(kernels_float16);
}
template <>
const TileKernels<BFloat16, float>& tile_kernels() {
  CHOOSE(kernels_bfloat16);
}

template <>
const DepthwiseKernels<float>& depthwise_kernels() {
  CHOOSE(depthwise_float32);
}
template <>
const DepthwiseKernels<double>& depthwise_kernels() {
  CHOOSE(depthwise_float64);
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
