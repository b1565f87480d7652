#include "mlx_ops/cpu/tile_kernels.h"

namespace mlx_deform::cpu {

#define DECLARE(isa)                                      \
  namespace isa {                                         \
  extern const TileKernels<float, float> kernels_float32; \
  extern const TileKernels<double, double> kernels_float64; \
  extern const TileKernels<Float16, float> kernels_float16; \
  extern const TileKernels<BFloat16, float> kernels_bfloat16; \
  }

DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  static const bool found = __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return found;
}
#define CHOOSE(table) return has_avx2() ? avx2::table : baseline::table
#else
#define CHOOSE(table) return baseline::table
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

} // namespace mlx_deform::cpu
