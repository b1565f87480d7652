// The CUDA kernels of cuda/, embedded when the library is built: a text for
// each file with every include resolved, the header of what MLX's cuda_kernel
// compiles. Present in every build, so that they can be checked without a GPU.

#pragma once

namespace mlx_deform::cuda {

extern const char* const sources[]; // and a null

} // namespace mlx_deform::cuda
