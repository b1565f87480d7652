"""Float64 NumPy references, independent of MLX and of the library: as plain as the definition."""

from .deform_conv2d import (
    Conv2dGradients,
    Im2colGradients,
    deform_conv2d,
    deform_conv2d_vjp,
    deform_im2col,
    deform_im2col_vjp,
    output_size,
)

__all__ = [
    "Conv2dGradients",
    "Im2colGradients",
    "deform_conv2d",
    "deform_conv2d_vjp",
    "deform_im2col",
    "deform_im2col_vjp",
    "output_size",
]
