"""The CUDA kernels, as MLX would compile them, checked without a GPU.

`mlx_source` writes the text that MLX's cuda_kernel makes of a launch of the library's
dispatch plan. `nvrtc` compiles it with NVIDIA's own compiler, for any GPU. `on_cpu`
compiles it as C++ and runs it, thread by thread, with the scheduler of tests/metal.

What this can't tell: how fast a kernel is, and what weakly ordered memory does.
"""

from .mlx_source import Text, text_of
from .on_cpu import CudaKernels

__all__ = ["CudaKernels", "Text", "text_of"]
