"""DeformConv2d and ModulatedDeformConv2d. Channels are last everywhere, as in `mlx.nn`."""

import math
import numbers
import operator
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .._ext import deform_conv2d

Size = int | Sequence[int]


def _integer(layer: str, name: str, value: int, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low:
        raise ValueError(f"[{layer}] {name} must be an integer of at least {low}; got {value!r}")
    return number


def _pair(layer: str, name: str, value: Size, low: int) -> tuple[int, int]:
    try:
        values = tuple(value) if isinstance(value, Sequence) else (value, value)
        height, width = (operator.index(item) for item in values)
    except (TypeError, ValueError):
        height = width = low - 1
    if min(height, width) < low:
        raise ValueError(
            f"[{layer}] {name} must be an integer of at least {low}, or a pair of them; "
            f"got {value!r}"
        )
    return height, width


class _DeformableLayer(nn.Module):
    """The kernel of a deformable convolution, its geometry, and the checks of both."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size,
        dilation: Size,
        groups: int,
        offset_groups: int,
        bias: bool,
    ):
        super().__init__()
        layer = type(self).__name__
        in_channels = _integer(layer, "in_channels", in_channels, 1)
        out_channels = _integer(layer, "out_channels", out_channels, 1)
        kernel_size = _pair(layer, "kernel_size", kernel_size, 1)
        self.stride = _pair(layer, "stride", stride, 1)
        self.padding = _pair(layer, "padding", padding, 0)
        self.dilation = _pair(layer, "dilation", dilation, 1)
        self.groups = _integer(layer, "groups", groups, 1)
        self.offset_groups = _integer(layer, "offset_groups", offset_groups, 1)
        divisions = (
            ("in_channels", in_channels, "groups", self.groups),
            ("out_channels", out_channels, "groups", self.groups),
            ("in_channels", in_channels, "offset_groups", self.offset_groups),
        )
        for name, channels, divisor, count in divisions:
            if channels % count:
                raise ValueError(
                    f"[{layer}] {name} must be divisible by {divisor}; "
                    f"got {name}={channels} and {divisor}={count}"
                )

        # torchvision's kaiming_uniform_ with a = sqrt(5) comes down to this bound.
        bound = 1 / math.sqrt(in_channels // self.groups * math.prod(kernel_size))
        shape = (out_channels, *kernel_size, in_channels // self.groups)
        self.weight = mx.random.uniform(-bound, bound, shape)
        if bias:
            self.bias = mx.random.uniform(-bound, bound, (out_channels,))

    @property
    def in_channels(self) -> int:
        return self.weight.shape[3] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, int]:
        return tuple(self.weight.shape[1:3])

    @property
    def _samples(self) -> int:
        """What one output position samples: offset_groups * kH * kW points."""
        return self.offset_groups * math.prod(self.kernel_size)

    def _extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, offset_groups={self.offset_groups}, bias={'bias' in self}"
        )

    def _check_channels(self, name: str, array: mx.array, rule: str, channels: int) -> None:
        # The op reads groups off the shapes, and would take other numbers for other groups.
        if array.ndim != 4 or array.shape[3] != channels:
            raise ValueError(
                f"[{type(self).__name__}] {name} must have 4 axes, the last of {rule} = "
                f"{channels} channels; got shape {tuple(array.shape)}"
            )

    def _convolve(self, x: mx.array, offset: mx.array, mask: mx.array | None) -> mx.array:
        return deform_conv2d(
            x,
            offset,
            self.weight,
            self.bias if "bias" in self else None,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )


class DeformConv2d(_DeformableLayer):
    """Applies a deformable convolution whose offsets, and mask, are given.

    Torchvision's layer of the same name, with the channels last. Where there is a mask the
    convolution is that of DCNv2, else of DCNv1.

    Args:
        in_channels (int): The number of input channels.
        out_channels (int): The number of output channels.
        kernel_size (int or pair): The size of the kernel, ``(kH, kW)``.
        stride (int or pair): Pixels between output positions. Default: ``1``.
        padding (int or pair): Pixels of zeros around the image. Default: ``0``.
        dilation (int or pair): Pixels between the taps of the kernel. Default: ``1``.
        groups (int): The number of groups that the channels of ``x`` and of the output are
            divided into for the weight. Default: ``1``.
        offset_groups (int): The number ``DG`` of groups of input channels that have offsets of
            their own. Default: ``1``.
        bias (bool): If ``True``, adds a learnable bias to the output. Default: ``True``.

    Parameters:
        ``weight`` of shape ``(out_channels, kH, kW, in_channels / groups)`` and ``bias`` of
        shape ``(out_channels,)``, float32. Both are drawn as torchvision draws them: uniformly
        between ``-1 / sqrt(fan_in)`` and ``1 / sqrt(fan_in)``, with
        ``fan_in = in_channels / groups * kH * kW``.

    Call:
        ``layer(x, offset, mask=None)`` with

        * ``x`` of shape ``(N, H, W, in_channels)``,
        * ``offset``, in pixels, of shape ``(N, H_out, W_out, 2 * DG * kH * kW)``, the last axis
          ordered ``[DG][kH][kW][(dy, dx)]``,
        * ``mask`` of shape ``(N, H_out, W_out, DG * kH * kW)``, the last axis ordered
          ``[DG][kH][kW]``,

        gives an array of shape ``(N, H_out, W_out, out_channels)``. The types are those of
        :func:`mlx_deform.deform_conv2d`: float16, bfloat16 or float32, and float64 on the CPU;
        ``offset`` and ``mask`` may stay float32 beside a half ``x``.

    Raises:
        ValueError: If an argument of the layer, or the shape of an argument of a call, breaks a
            rule; the message names the argument, the rule and the value.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_deform.nn import DeformConv2d
        >>> layer = DeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> to_offset = nn.Conv2d(16, 2 * 3 * 3, kernel_size=3, padding=1)
        >>> x = mx.random.normal((8, 24, 24, 16))
        >>> layer(x, to_offset(x)).shape
        (8, 24, 24, 32)

    References:
        Dai et al., "Deformable Convolutional Networks", arXiv:1703.06211;
        Zhu et al., "Deformable ConvNets v2", arXiv:1811.11168.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            offset_groups,
            bias,
        )

    def __call__(self, x: mx.array, offset: mx.array, mask: mx.array | None = None) -> mx.array:
        samples = self._samples
        self._check_channels("x", x, "in_channels", self.in_channels)
        self._check_channels("offset", offset, "2 * offset_groups * kH * kW", 2 * samples)
        if mask is not None:
            self._check_channels("mask", mask, "offset_groups * kH * kW", samples)
        return self._convolve(x, offset, mask)


class ModulatedDeformConv2d(_DeformableLayer):
    """Applies a deformable convolution that predicts its offsets and mask from its input.

    A drop-in for :class:`mlx.nn.Conv2d`. One convolution with the layer's own kernel size,
    stride, padding and dilation, ``offset_conv``, predicts offsets and mask together; the mask
    is ``mask_scale * sigmoid`` of what it predicts. It starts at zero, so that the layer starts
    as an ordinary convolution, scaled by ``mask_scale / 2`` where there is a mask.

    This is mmcv's ``ModulatedDeformConv2dPack`` and the package mps-deform-conv's
    ``ModulatedDeformConv2d`` with ``mask_scale=1``, BiRefNet's ``DeformableConv2d`` with
    ``mask_scale=2``, and mmcv's ``DeformConv2dPack`` with ``mask=False``. See
    :func:`load_torch_weights` to load theirs.

    Args:
        in_channels (int): The number of input channels.
        out_channels (int): The number of output channels.
        kernel_size (int or pair): The size of the kernel, ``(kH, kW)``.
        stride (int or pair): Pixels between output positions. Default: ``1``.
        padding (int or pair): Pixels of zeros around the image. Default: ``0``.
        dilation (int or pair): Pixels between the taps of the kernel. Default: ``1``.
        groups (int): The number of groups that the channels of ``x`` and of the output are
            divided into for the weight. Default: ``1``.
        offset_groups (int): The number ``DG`` of groups of input channels that have offsets and
            a mask of their own. Default: ``1``.
        bias (bool): If ``True``, adds a learnable bias to the output. Default: ``True``.
        mask (bool): If ``False``, only offsets are predicted (DCNv1). Default: ``True``.
        mask_scale (float): The largest value of the mask. Default: ``1``.

    Parameters:
        ``weight`` and ``bias`` as in :class:`DeformConv2d`; ``offset_conv.weight`` of shape
        ``(3 * DG * kH * kW, kH, kW, in_channels)`` and ``offset_conv.bias``, zero at first.
        The first ``2 * DG * kH * kW`` channels that ``offset_conv`` predicts are offsets in
        pixels, ordered ``[DG][kH][kW][(dy, dx)]``; the others, absent with ``mask=False``, are
        the mask's logits, ordered ``[DG][kH][kW]``.

    Call:
        ``layer(x)`` with ``x`` of shape ``(N, H, W, in_channels)`` gives an array of shape
        ``(N, H_out, W_out, out_channels)``, of the types that
        :func:`mlx_deform.deform_conv2d` takes. In a half type, ``layer.offset_conv`` may be
        kept in float32, and the offsets then have its precision.

    Raises:
        ValueError: If an argument of the layer, or the shape of ``x``, breaks a rule; the
            message names the argument, the rule and the value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_deform.nn import ModulatedDeformConv2d
        >>> layer = ModulatedDeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> layer(mx.random.normal((8, 24, 24, 16))).shape
        (8, 24, 24, 32)

    References:
        Zhu et al., "Deformable ConvNets v2", arXiv:1811.11168.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        *,
        mask: bool = True,
        mask_scale: float = 1.0,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            offset_groups,
            bias,
        )
        if not (isinstance(mask_scale, numbers.Real) and 0 < mask_scale < math.inf):
            raise ValueError(
                f"[ModulatedDeformConv2d] mask_scale must be a positive number; got {mask_scale!r}"
            )
        self.mask = bool(mask)
        self.mask_scale = float(mask_scale)
        self.offset_conv = nn.Conv2d(
            self.in_channels,
            (3 if mask else 2) * self._samples,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self.offset_conv.update(tree_map(mx.zeros_like, self.offset_conv.parameters()))

    def _extra_repr(self) -> str:
        mask = f"mask_scale={self.mask_scale:g}" if self.mask else "mask=False"
        return f"{super()._extra_repr()}, {mask}"

    def offset_and_mask(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """What the layer predicts from ``x``: where it samples, and with what weights.

        Args:
            x (array): The input of the layer, of shape ``(N, H, W, in_channels)``.

        Returns:
            tuple: Offsets in pixels, of shape ``(N, H_out, W_out, 2 * DG * kH * kW)``, and the
            mask of shape ``(N, H_out, W_out, DG * kH * kW)``, or ``None`` with ``mask=False``;
            both as :class:`DeformConv2d` takes them.

        Raises:
            ValueError: If ``x`` hasn't 4 axes, the last of ``in_channels`` channels.
        """
        self._check_channels("x", x, "in_channels", self.in_channels)
        predicted = self.offset_conv(x)
        if not self.mask:
            return predicted, None
        offset, logits = mx.split(predicted, [2 * self._samples], axis=-1)
        return offset, self.mask_scale * mx.sigmoid(logits)

    def __call__(self, x: mx.array) -> mx.array:
        return self._convolve(x, *self.offset_and_mask(x))
