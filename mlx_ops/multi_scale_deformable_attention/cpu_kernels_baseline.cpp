// SSE2 on x86-64, NEON on arm64: what every such machine has.
#define MLX_DEFORM_ISA baseline
#define MLX_DEFORM_VECTOR_BYTES 16
#include "mlx_ops/multi_scale_deformable_attention/cpu_kernels_impl.h"
