// SSE2 on x86-64, NEON on arm64: what every such machine has.
#define MLX_DEFORM_ISA baseline
#define MLX_DEFORM_VECTOR_BYTES 16
#include "mlx_ops/cpu/depthwise_impl.h"
#if defined(__aarch64__)
#include "mlx_ops/cpu/products_impl.h"
#endif
#include "mlx_ops/cpu/tile_kernels_impl.h"
