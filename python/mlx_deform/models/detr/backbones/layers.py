"""A convolution with batch normalisation, by the backbones' names."""

import functools

import mlx.core as mx
import mlx.nn as nn

from ..layers import activation


class ConvLayer(nn.Module):
    """A convolution without a bias, batch normalisation, an activation.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: Of the convolution, which keeps
            the size of a map but for its stride.
        act (str): The activation; None for none.
        norm (type): Of batch normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: str | None = "relu",
        *,
        norm: type,
    ):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        self.normalization = norm(out_channels)
        self._activation = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        return self._activation(self.normalization(self.convolution(x)))


class Stages(nn.Module):
    """The stages of a backbone, under their name in the hub's files."""

    def __init__(self, stages: list[nn.Module]):
        super().__init__()
        self.stages = stages


def max_pool(x: mx.array) -> mx.array:
    """The largest of 3x3 pixels, at every second one: (N, H, W, C) to (N, H / 2, W / 2, C).

    Rows first, then columns: five times faster in training on CPUs than MLX's own layer.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        around = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = mx.pad(x, around, constant_values=-mx.inf)
        parts = (
            padded[(slice(None),) * axis + (slice(start, start + size, 2),)] for start in range(3)
        )
        x = functools.reduce(mx.maximum, parts)
    return x
