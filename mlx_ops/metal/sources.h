// The Metal kernels of metal/, embedded when the library is built: one text
// with every include resolved, to be compiled after gpu::library_header().
// Present in every build, so that the kernels can be checked without a Mac.

#pragma once

namespace mlx_deform::metal {

extern const char* const kernel_source;

} // namespace mlx_deform::metal
