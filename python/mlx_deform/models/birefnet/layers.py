"""Ordinary layers as BiRefNet needs them: exact resizing, and bounded memory.

Nothing here is particular to the model. Channels are last.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ... import deform_conv2d
from ...nn import ModulatedDeformConv2d


def on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


def piece() -> int:
    """Elements of a temporary above which work is cut into pieces.

    MLX allocates some pieces ahead of the one it computes, so the temporaries of a handful are
    in memory at a time. A GPU is kept busy by no less than 16 MiB of float16.
    """
    return 1 << (21 if on_cpu() else 23)


def in_pieces(function, x: mx.array, elements: int, *rows: mx.array) -> mx.array:
    """``function(x, *rows)``, a few rows at a time.

    x, rows: cut along their first axis, which they share and ``function`` keeps.
    elements: of the largest temporary that ``function`` makes of one row.
    """
    step = max(piece() // elements, 1)
    if len(x) <= step:
        return function(x, *rows)
    starts = range(0, len(x), step)
    return mx.concatenate(
        [function(*(array[start : start + step] for array in (x, *rows))) for start in starts]
    )


def resize(x: mx.array, size: tuple[int, int]) -> mx.array:
    """Bilinear resizing that maps corners to corners.

    PyTorch's ``interpolate(mode="bilinear", align_corners=True)`` of (N, H, W, C), with its
    float32 coordinates.
    """
    for axis, wanted in zip((1, 2), size, strict=True):
        given = x.shape[axis]
        if given == wanted:
            continue
        scale = np.float32((given - 1) / (wanted - 1) if wanted > 1 else 0)
        at = scale * np.arange(wanted, dtype=np.float32)
        low = np.minimum(at.astype(np.int32), given - 1)
        high = np.minimum(low + 1, given - 1)
        fraction = mx.array((at - low).reshape(-1, *(1,) * (3 - axis))).astype(x.dtype)
        first = mx.take(x, mx.array(low), axis)
        x = first + fraction * (mx.take(x, mx.array(high), axis) - first)
    return x


def laplacian(image: mx.array) -> mx.array:
    """kornia's ``laplacian(kernel_size=5)`` of (N, H, W, 1): the 5x5 sum less 25 times the pixel.

    Divided by 48, the sum of the kernel's magnitudes, with reflected borders.
    """
    padded = image
    for axis in (1, 2):
        indices = np.pad(np.arange(image.shape[axis]), 2, mode="reflect")
        padded = mx.take(padded, mx.array(indices), axis)
    total = mx.conv2d(padded, mx.ones((1, 5, 5, 1), image.dtype))
    return (total - 25 * image) / 48


def same_rows(
    x: mx.array, first: int, height: int, weight: mx.array, start: int, stop: int
) -> mx.array:
    """Rows ``start`` to ``stop`` of the convolution that keeps an image's size.

    x: (N, rows, W, C), the rows from ``first`` of an image of that height that are needed.
    weight: (O, k, k, C) with odd k.
    """
    pad = weight.shape[1] // 2
    low, high = max(start - pad, 0), min(stop + pad, height)
    top, bottom = pad - (start - low), pad - (high - stop)
    rows = x[:, low - first : high - first]
    return mx.conv_general(rows, weight, padding=([top, pad], [bottom, pad]))


class Conv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size of the image.

    MLX's CPU backend unfolds the whole input, kH * kW times its size; here it has a few rows
    at a time to unfold. Other backends read the input where it is.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True):
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )

    def __call__(self, x: mx.array) -> mx.array:
        count, height, width, channels = x.shape
        area = self.weight.shape[1] * self.weight.shape[2]
        rows = max(piece() // (count * width * channels * area), 1)
        if area == 1 or rows >= height or not on_cpu():
            return super().__call__(x)
        bias = self.bias if "bias" in self else None
        strips = []
        for start in range(0, height, rows):
            strip = same_rows(x, 0, height, self.weight, start, min(start + rows, height))
            strips.append(strip if bias is None else strip + bias)
        return mx.concatenate(strips, axis=1)


class DeformableConv2d(ModulatedDeformConv2d):
    """BiRefNet's layer of the same name (models/modules/deform_conv.py), on the native op."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
            mask_scale=2,
        )
        predictor = Conv2d(in_channels, len(self.offset_conv.bias), kernel_size)
        predictor.update(self.offset_conv.parameters())
        self.offset_conv = predictor

    def scaled(self, x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
        """The output times ``scale`` plus ``shift``, both (C_out,), by the op itself."""
        offset, mask = self.offset_and_mask(x)
        weight = (self.weight * scale.reshape(-1, 1, 1, 1)).astype(x.dtype)
        return deform_conv2d(
            x, offset, weight, shift.astype(x.dtype), padding=self.padding, mask=mask
        )


class DropPath(nn.Module):
    """Skips a residual branch for some pictures of a batch, in training.

    The others are scaled so that the expectation stays ("Deep Networks with Stochastic
    Depth", arXiv:1603.09382, as timm's layer does it).
    """

    def __init__(self, chance: float):
        super().__init__()
        self._keep = 1 - chance

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self._keep == 1:
            return x
        kept = mx.random.bernoulli(self._keep, (len(x), *(1,) * (x.ndim - 1)))
        return kept.astype(x.dtype) * (1 / self._keep) * x
