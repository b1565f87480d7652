// Compiled with -mavx512f -mavx512vl -mavx512bw -mavx512dq; runs only where
// isa() finds these.
#define MLX_DEFORM_ISA avx512
#define MLX_DEFORM_VECTOR_BYTES 64
#include "mlx_ops/multi_scale_deformable_attention/cpu_kernels_impl.h"
