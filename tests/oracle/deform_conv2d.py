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

The image is extended by zeros without end and interpolated bilinearly between the
four corners of the cell (floor(y), floor(x)); derivatives are those of that cell's
surface. Three consequences are spelled out:

- A sample with no corner in the image, an infinite one too, is 0 and constant.
- A corner outside the image is 0 by definition and never read; a corner inside takes
  part even when its weight is 0, so an infinite pixel there gives NaN.
- A NaN coordinate has no cell: the sample is NaN, so are the derivatives by its
  offset and mask, and no pixel receives a gradient from it.

`coordinate_dtype=np.float32` rounds y and x once, as an implementation in single
precision does; everything after that is exact to float64 all the same.
`absolute=True` adds the magnitudes of the terms of every sum instead of the terms:
the scale of the rounding error that a correct implementation may have.
"""

from typing import NamedTuple

import numpy as np


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


class _Corner(NamedTuple):
    """One corner of the cells of one tap and offset group, for all N * Ho * Wo samples."""

    valid: np.ndarray  # (N, Ho, Wo) the corner lies in the image
    pixel: tuple  # indices (n, y, x) of the valid corners, each (valid.sum(),)
    weight: np.ndarray  # (N, Ho, Wo) share of the corner in the value
    slope_y: np.ndarray  # (N, Ho, Wo) d weight / d y
    slope_x: np.ndarray  # (N, Ho, Wo) d weight / d x


def output_size(size, kernel, stride, padding, dilation):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pair(value):
    return (value, value) if np.isscalar(value) else tuple(value)


def _array(value, absolute=False):
    if value is None:
        return None
    value = np.asarray(value, dtype=np.float64)
    return np.abs(value) if absolute else value


def _cells(y, x, H, W, absolute):
    """The corners of the cell of every sample (y, x), both (N, Ho, Wo), and where it is NaN."""
    nan = np.isnan(y) | np.isnan(x)
    # Everywhere else all four corners are outside the image.
    near = (y >= -1) & (y < H) & (x >= -1) & (x < W)
    y = np.where(near, y, -1.0)
    x = np.where(near, x, -1.0)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    ly, lx = y - y0, x - x0

    corners = []
    for below in (0, 1):
        for right in (0, 1):
            cy, cx = y0 + below, x0 + right
            valid = near & (cy >= 0) & (cy < H) & (cx >= 0) & (cx < W)
            weight_y = ly if below else 1 - ly
            weight_x = lx if right else 1 - lx
            sign_y = 1.0 if below or absolute else -1.0
            sign_x = 1.0 if right or absolute else -1.0
            n = np.nonzero(valid)[0]
            corners.append(
                _Corner(
                    valid=valid,
                    pixel=(n, cy[valid], cx[valid]),
                    weight=weight_y * weight_x,
                    slope_y=sign_y * weight_x,
                    slope_x=sign_x * weight_y,
                )
            )
    return corners, nan


class _Problem:
    """The arrays of one call with their axes taken apart, and its samples."""

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
        self.input = _array(input, absolute)
        self.kernel = _pair(kernel_size)
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.absolute = absolute
        self.coordinate_dtype = coordinate_dtype
        N, H, W, C = self.input.shape
        kH, kW = self.kernel
        self.Ho, self.Wo = (
            output_size(size, k, s, p, d)
            for size, k, s, p, d in zip(
                (H, W), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        offset = _array(offset)
        self.DG = offset.shape[-1] // (2 * kH * kW)
        pixels = (N, self.Ho, self.Wo)
        self.pixels = pixels
        self.offset = offset.reshape(*pixels, self.DG, kH, kW, 2)
        mask = _array(mask, absolute)
        self.mask = None if mask is None else mask.reshape(*pixels, self.DG, kH, kW)
        self.group_channels = C // self.DG

    def samples(self):
        """Yield (i, j, group, slice of its channels, corners, nan) for every tap and group."""
        _, H, W, _ = self.input.shape
        kH, kW = self.kernel
        real = self.coordinate_dtype
        for i in range(kH):
            for j in range(kW):
                grid_y = np.arange(self.Ho) * self.stride[0] - self.padding[0]
                grid_x = np.arange(self.Wo) * self.stride[1] - self.padding[1]
                grid_y = (grid_y + i * self.dilation[0])[:, None].astype(real)
                grid_x = (grid_x + j * self.dilation[1])[None, :].astype(real)
                for group in range(self.DG):
                    offset = self.offset[..., group, i, j, :].astype(real)
                    y = (grid_y + offset[..., 0]).astype(np.float64)
                    x = (grid_x + offset[..., 1]).astype(np.float64)
                    channels = slice(group * self.group_channels, (group + 1) * self.group_channels)
                    yield (i, j, group, channels, *_cells(y, x, H, W, self.absolute))

    def modulation(self, i, j, group):
        """The mask of one tap and offset group, (N, Ho, Wo, 1)."""
        if self.mask is None:
            return np.ones((*self.pixels, 1))
        return self.mask[..., group, i, j, None]


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
    p = _Problem(
        input, offset, kernel_size, stride, padding, dilation, mask, coordinate_dtype, absolute
    )
    columns = np.zeros((*p.pixels, *p.kernel, p.input.shape[-1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for i, j, group, channels, corners, nan in p.samples():
            value = np.zeros((*p.pixels, p.group_channels))
            for corner in corners:
                pixel = p.input[..., channels][corner.pixel]
                value[corner.valid] += corner.weight[corner.valid][:, None] * pixel
            value[nan] = np.nan
            columns[..., i, j, channels] = p.modulation(i, j, group) * value
    # -1 would be ambiguous in an empty batch.
    return columns.reshape(*p.pixels, np.prod(columns.shape[3:]))


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
    """Gradients of sum(cotangent * columns) by input, offset and mask."""
    p = _Problem(
        input, offset, kernel_size, stride, padding, dilation, mask, coordinate_dtype, absolute
    )
    cotangent = _array(cotangent, absolute)
    cotangent = cotangent.reshape(*p.pixels, *p.kernel, p.input.shape[-1])
    grad_input = np.zeros_like(p.input)
    grad_offset = np.zeros_like(p.offset)
    grad_mask = None if p.mask is None else np.zeros_like(p.mask)
    with np.errstate(invalid="ignore", over="ignore"):
        for i, j, group, channels, corners, nan in p.samples():
            grad = cotangent[..., i, j, channels]
            value = np.zeros((*p.pixels, p.group_channels))
            slope_y, slope_x = np.zeros_like(value), np.zeros_like(value)
            # d loss / d value of the sample; the mask stands between value and column.
            grad_value = grad * p.modulation(i, j, group)
            for corner in corners:
                at = corner.valid
                pixel = p.input[..., channels][corner.pixel]
                value[at] += corner.weight[at][:, None] * pixel
                slope_y[at] += corner.slope_y[at][:, None] * pixel
                slope_x[at] += corner.slope_x[at][:, None] * pixel
                # Several samples may share a pixel: add.at adds them all.
                np.add.at(
                    grad_input[..., channels],
                    corner.pixel,
                    corner.weight[at][:, None] * grad_value[at],
                )
            outside = ~np.logical_or.reduce([corner.valid for corner in corners])
            for gradient, terms in (
                (grad_offset[..., group, i, j, 0], grad_value * slope_y),
                (grad_offset[..., group, i, j, 1], grad_value * slope_x),
                (None if grad_mask is None else grad_mask[..., group, i, j], grad * value),
            ):
                if gradient is not None:
                    gradient[...] = terms.sum(axis=-1)
                    gradient[outside] = 0.0
                    gradient[nan] = np.nan
    return Im2colGradients(
        grad_input,
        grad_offset.reshape(*p.pixels, np.prod(grad_offset.shape[3:])),
        None if grad_mask is None else grad_mask.reshape(*p.pixels, np.prod(grad_mask.shape[3:])),
    )


def _grouped(columns, weight):
    """Columns as (N, Ho, Wo, kH, kW, G, C/G), weight as (G, O/G, kH, kW, C/G)."""
    O, kH, kW, group_channels = weight.shape  # noqa: E741
    G = columns.shape[-1] // (kH * kW * group_channels)
    return (
        columns.reshape(*columns.shape[:3], kH, kW, G, group_channels),
        weight.reshape(G, O // G, kH, kW, group_channels),
    )


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
    kernel = weight.shape[1:3]
    columns = deform_im2col(
        input,
        offset,
        kernel,
        stride,
        padding,
        dilation,
        mask,
        coordinate_dtype=coordinate_dtype,
        absolute=absolute,
    )
    with np.errstate(invalid="ignore", over="ignore"):
        columns, weight = _grouped(columns, weight)
        output = np.einsum("nyxijgc,goijc->nyxgo", columns, weight, optimize=True)
        output = output.reshape(*output.shape[:3], output.shape[3] * output.shape[4])
        return output if bias is None else output + bias


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
    """Gradients of sum(cotangent * output) by every array argument."""
    cotangent, weight = _array(cotangent, absolute), _array(weight, absolute)
    kernel = weight.shape[1:3]
    settings = (kernel, stride, padding, dilation, mask)
    options = {"coordinate_dtype": coordinate_dtype, "absolute": absolute}
    with np.errstate(invalid="ignore", over="ignore"):
        columns = deform_im2col(input, offset, *settings, **options)
        columns, grouped_weight = _grouped(columns, weight)
        G, group_outputs = grouped_weight.shape[:2]
        grad = cotangent.reshape(*cotangent.shape[:3], G, group_outputs)
        grad_weight = np.einsum("nyxgo,nyxijgc->goijc", grad, columns, optimize=True)
        grad_columns = np.einsum("nyxgo,goijc->nyxijgc", grad, grouped_weight, optimize=True)
        grads = deform_im2col_vjp(
            grad_columns.reshape(*grad.shape[:3], np.prod(grad_columns.shape[3:])),
            input,
            offset,
            *settings,
            **options,
        )
    return Conv2dGradients(
        input=grads.input,
        offset=grads.offset,
        weight=grad_weight.reshape(weight.shape),
        bias=None if bias is None else cotangent.sum(axis=(0, 1, 2)),
        mask=grads.mask,
    )
