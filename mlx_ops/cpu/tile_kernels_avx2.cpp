// Compiled with -mavx2 -mfma -mf16c; runs only where isa() finds these.
#define MLX_DEFORM_ISA avx2
#define MLX_DEFORM_VECTOR_BYTES 32
#include "mlx_ops/cpu/depthwise_impl.h"
#include "mlx_ops/cpu/products_impl.h"
#include "mlx_ops/cpu/tile_kernels_impl.h"
