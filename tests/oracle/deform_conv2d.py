"""Deformable convolution in float64 NumPy, written from the definition.

Layouts are channels last, with sizes N, H, W, C, O, kH, kW, Ho, Wo, weight groups
G and offset groups DG:

    input   (N, H, W, C)
    offset  (N, Ho, Wo, 2 * DG * kH * kW)   last axis [DG][kH][kW][(dy, dx)]
    mask    (N, Ho, Wo, DG * kH * kW)       last axis [DG][kH][kW]
    weight  (O, kH, kW, C / G)
    bias    (O,)
    columns (N, Ho, Wo, kH * kW * C)        last axis [kH][kW][C]

The definition. Tap (i, j) of output pixel (oy, ox) samples the image at

    y = oy * stride_h - padding_h + i * dilation_h + dy
    x = ox * stride_w - padding_w + j * dilation_w + dx

by the rules of bilinear.py.

`coordinate_dtype=np.float32` rounds y and x once, as an implementation in single
precision does; everything after that is exact to float64 all the same.
`absolute=True` adds the magnitudes of the terms of every sum instead of the terms:
the scale of the rounding error that a correct implementation may have.
"""

from typing import NamedTuple

import numpy as np

from .bilinear import Samples, cell_corners


class Im2colGradients(NamedTuple):
    input: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None


class Conv2dGradients(NamedTuple):
    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    mask: np.ndarray | None


def output_size(size, kernel, stride, padding, dilation):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pair(value):
    return (value, value) if np.isscalar(value) else tuple(value)


def _array(value, absolute=False):
    if value is None:
        return None
    value = np.asarray(value, dtype=np.float64)
    return np.abs(value) if absolute else value


class _Problem:
    """The arrays of one call with their axes taken apart, and its samples.

    Samples stand as offset and mask do, by output pixel, offset group and tap:
    (N, Ho, Wo, DG, kH, kW), and their values (..., C / DG).
    """

    def __init__(
        self,
        input,
        offset,
        kernel_size,
        stride,
        padding,
        dilation,
        mask,
        coordinate_dtype,
        absolute,
    ):
        input, offset, mask = _array(input, absolute), _array(offset), _array(mask, absolute)
        N, H, W, C = input.shape
        kernel = _pair(kernel_size)
        settings = zip((H, W), kernel, _pair(stride), _pair(padding), _pair(dilation), strict=True)
        # Where the taps of every output row, and of every output column, lie without offsets.
        tap_y, tap_x = (
            (np.arange(output_size(size, k, s, p, d)) * s - p)[:, None] + np.arange(k) * d
            for size, k, s, p, d in settings
        )
        self.pixels = (N, len(tap_y), len(tap_x))
        DG = offset.shape[-1] // (2 * kernel[0] * kernel[1])
        shape = (*self.pixels, DG, *kernel)
        self.input_shape = input.shape
        self.has_mask = mask is not None
        self.modulation = (np.ones(shape) if mask is None else mask.reshape(shape))[..., None]

        real = coordinate_dtype
        offset = offset.reshape(*shape, 2).astype(real)
        y = (tap_y.astype(real)[:, None, None, :, None] + offset[..., 0]).astype(np.float64)
        x = (tap_x.astype(real)[:, None, None, :] + offset[..., 1]).astype(np.float64)

        def place(corner):
            n, _, _, group, _, _ = np.nonzero(corner.valid)
            return n, corner.y, corner.x, group

        self.samples = Samples(
            input.reshape(N, H, W, DG, C // DG),
            cell_corners(y, x, H, W, absolute),
            np.isnan(y) | np.isnan(x),
            place,
        )

    def to_columns(self, value):
        """Values by sample as columns (N, Ho, Wo, kH * kW * C)."""
        columns = np.moveaxis(value, 3, 5)  # -1 would be ambiguous in an empty batch
        return columns.reshape(*self.pixels, np.prod(columns.shape[3:]))

    def from_columns(self, columns):
        """The inverse of `to_columns`."""
        _, _, _, DG, kH, kW, _ = self.modulation.shape
        channels = self.input_shape[-1]
        return np.moveaxis(columns.reshape(*self.pixels, kH, kW, DG, channels // DG), 5, 3)

    def columns(self):
        return self.to_columns(self.modulation * self.samples.value())

    def vjp(self, cotangent):
        """The columns, and the gradients of sum(cotangent * columns)."""
        grad = self.from_columns(cotangent)
        value = self.samples.value()
        # The mask stands between the value of a sample and its column.
        by_input, by_y, by_x = self.samples.vjp(grad * self.modulation)
        of_pixel = np.prod(by_y.shape[3:])  # samples
        by_mask = self.samples.summed(grad * value).reshape(*self.pixels, of_pixel)
        by_offset = np.stack([by_y, by_x], axis=-1).reshape(*self.pixels, 2 * of_pixel)
        gradients = Im2colGradients(
            by_input.reshape(self.input_shape), by_offset, by_mask if self.has_mask else None
        )
        return self.to_columns(self.modulation * value), gradients


def deform_im2col(
    input,
    offset,
    kernel_size,
    stride=1,
    padding=0,
    dilation=1,
    mask=None,
    *,
    coordinate_dtype=np.float64,
    absolute=False,
):
    """The samples, times the mask: columns (N, Ho, Wo, kH * kW * C)."""
    with np.errstate(invalid="ignore", over="ignore"):
        problem = _Problem(
            input, offset, kernel_size, stride, padding, dilation, mask, coordinate_dtype, absolute
        )
        return problem.columns()


def deform_im2col_vjp(
    cotangent,
    input,
    offset,
    kernel_size,
    stride=1,
    padding=0,
    dilation=1,
    mask=None,
    *,
    coordinate_dtype=np.float64,
    absolute=False,
):
    """The columns, and gradients of sum(cotangent * columns) by input, offset and mask."""
    with np.errstate(invalid="ignore", over="ignore"):
        problem = _Problem(
            input, offset, kernel_size, stride, padding, dilation, mask, coordinate_dtype, absolute
        )
        return problem.vjp(_array(cotangent, absolute))


def _grouped(columns, weight):
    """Columns as (N, Ho, Wo, kH, kW, G, C/G), weight as (G, O/G, kH, kW, C/G)."""
    O, kH, kW, group_channels = weight.shape  # noqa: E741
    G = columns.shape[-1] // (kH * kW * group_channels)
    return (
        columns.reshape(*columns.shape[:3], kH, kW, G, group_channels),
        weight.reshape(G, O // G, kH, kW, group_channels),
    )


def _output(columns, weight, bias):
    with np.errstate(invalid="ignore", over="ignore"):
        output = np.einsum("nyxijgc,goijc->nyxgo", *_grouped(columns, weight), optimize=True)
        output = output.reshape(*output.shape[:3], len(weight))
        return output if bias is None else output + bias


def deform_conv2d(
    input,
    offset,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    mask=None,
    *,
    coordinate_dtype=np.float64,
    absolute=False,
):
    """output[n, y, x, o] = bias[o] + sum of weight * columns over taps and group channels."""
    weight, bias = _array(weight, absolute), _array(bias, absolute)
    settings = (weight.shape[1:3], stride, padding, dilation, mask)
    options = {"coordinate_dtype": coordinate_dtype, "absolute": absolute}
    columns = deform_im2col(input, offset, *settings, **options)
    return _output(columns, weight, bias)


def deform_conv2d_vjp(
    cotangent,
    input,
    offset,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    mask=None,
    *,
    coordinate_dtype=np.float64,
    absolute=False,
):
    """The output, and gradients of sum(cotangent * output) by every array argument."""
    cotangent = _array(cotangent, absolute)
    weight, bias = _array(weight, absolute), _array(bias, absolute)
    O, kH, kW, group_channels = weight.shape  # noqa: E741
    G = np.shape(input)[-1] // group_channels
    grad = cotangent.reshape(*cotangent.shape[:3], G, O // G)
    grouped_weight = weight.reshape(G, O // G, kH, kW, group_channels)
    with np.errstate(invalid="ignore", over="ignore"):
        grad_columns = np.einsum("nyxgo,goijc->nyxijgc", grad, grouped_weight, optimize=True)
    grad_columns = grad_columns.reshape(*grad.shape[:3], kH * kW * G * group_channels)
    settings = ((kH, kW), stride, padding, dilation, mask)
    options = {"coordinate_dtype": coordinate_dtype, "absolute": absolute}
    columns, grads = deform_im2col_vjp(grad_columns, input, offset, *settings, **options)
    with np.errstate(invalid="ignore", over="ignore"):
        grouped_columns, _ = _grouped(columns, weight)
        grad_weight = np.einsum("nyxgo,nyxijgc->goijc", grad, grouped_columns, optimize=True)
    return _output(columns, weight, bias), Conv2dGradients(
        input=grads.input,
        offset=grads.offset,
        weight=grad_weight.reshape(weight.shape),
        bias=None if bias is None else cotangent.sum(axis=(0, 1, 2)),
        mask=grads.mask,
    )
