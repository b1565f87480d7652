// The CUDA kernels of cuda/, embedded when the library is built: a text for
// each file with every include resolved, the header of what MLX's cuda_kernel
// compiles. Present in every build, so that they can be checked without a GPU.

#pragma once

namespace mlx_deform::cuda {

extern const char* const im2col_source;
extern const char* const col2im_source;
extern const char* const offset_grad_source;

} // namespace mlx_deform::cuda
