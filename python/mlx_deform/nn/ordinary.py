"""Ordinary convolutions and linear layers as cases of the native op, for training on CPUs.

On Linux MLX multiplies matrices with reference BLAS; the op has OpenBLAS. Offsets of zero make
it an ordinary convolution, one of 1x1 a linear layer: ten to eighty times faster there.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .._ext import deform_conv2d


def pays() -> bool:
    """Whether the op is faster than MLX's own products: on Linux, on the CPU."""
    return sys.platform == "linux" and mx.default_device().type == mx.cpu


class Conv2d(nn.Conv2d):
    """MLX's layer with other arithmetic, where that pays."""

    def __call__(self, x: mx.array) -> mx.array:
        if not pays():
            return super().__call__(x)
        kernel = self.weight.shape[1:3]
        sizes = (
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, padding, taps, stride, dilation in zip(
                x.shape[1:3], self.padding, kernel, self.stride, _pair(self.dilation), strict=True
            )
        )
        offset = mx.zeros((x.shape[0], *sizes, 2 * kernel[0] * kernel[1]), x.dtype)
        return deform_conv2d(
            x, offset, self.weight, self.get("bias"), self.stride, self.padding, self.dilation
        )


class Linear(nn.Linear):
    """MLX's layer with other arithmetic, where that pays."""

    def __call__(self, x: mx.array) -> mx.array:
        if not pays():
            return super().__call__(x)
        rows = x.reshape(1, -1, 1, x.shape[-1])
        offset = mx.zeros((*rows.shape[:3], 2), x.dtype)
        output = deform_conv2d(rows, offset, self.weight[:, None, None], self.get("bias"))
        return output.reshape(*x.shape[:-1], -1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _fast(module: nn.Module) -> nn.Module:
    """The layer of this file with the module's parameters; another module as it is."""
    if type(module) is nn.Conv2d:
        out_channels, *kernel, in_channels = module.weight.shape
        fast = Conv2d(
            in_channels * module.groups,
            out_channels,
            tuple(kernel),
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            bias="bias" in module,
        )
    elif type(module) is nn.Linear:
        fast = Linear(*module.weight.shape[::-1], bias="bias" in module)
    else:
        return module
    fast.update(module.parameters())
    if not module.trainable_parameters():
        fast.freeze()
    return fast


def use_fast_products(model: nn.Module) -> nn.Module:
    """Puts the layers of this file in the place of MLX's own, in the whole model.

    Parameters and their names stay.

    Args:
        model (Module): Any model; it is changed.

    Returns:
        Module: The model.
    """
    model.update_modules(tree_map(_fast, model.leaf_modules(), is_leaf=nn.Module.is_module))
    return model
