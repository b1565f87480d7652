"""Layers with the constructors, parameters and initialisation of torchvision's and
mps-deform-conv's."""

import math

import torch
from torch import Tensor, nn

from ._checks import Pair
from ._functional import deform_conv2d

Size = int | Pair


def _pair(value: Size) -> Pair:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class DeformConv2d(nn.Module):
    """Applies a deformable convolution whose offsets, and mask, are given.

    ``torchvision.ops.DeformConv2d`` and mps-deform-conv's ``DeformConv2d``: the same
    constructor, ``state_dict`` and initialisation, so that a checkpoint of either loads, and
    the same seed gives the same weights.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int or pair): Size of the kernel, ``(kH, kW)``.
        stride (int or pair): Pixels between output positions. Default: ``1``.
        padding (int or pair): Pixels of zeros around the image. Default: ``0``.
        dilation (int or pair): Pixels between the taps of the kernel. Default: ``1``.
        groups (int): Groups of channels of the weight. Default: ``1``.
        offset_groups (int): Groups of input channels with offsets of their own. What counts is
            the shape of the offsets; mps-deform-conv has this argument in this place.
            torchvision has ``bias`` in its place, so that a bool is taken for that.
            Default: ``1``.
        bias (bool): Adds a learnable bias. Default: ``True``.

    Parameters:
        ``weight`` of shape ``(out_channels, in_channels / groups, kH, kW)`` and ``bias`` of
        shape ``(out_channels,)``.

    Call:
        ``layer(input, offset, mask=None)``, with the shapes of
        :func:`mlx_deform.torch.deform_conv2d`.

    Raises:
        ValueError: If ``groups`` does not divide the channels.

    Example:
        >>> import torch
        >>> from mlx_deform.torch import DeformConv2d
        >>> layer = DeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> x, offset = torch.randn(8, 16, 24, 24), torch.zeros(8, 2 * 3 * 3, 24, 24)
        >>> layer(x, offset).shape
        torch.Size([8, 32, 24, 24])

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
        super().__init__()
        if isinstance(offset_groups, bool):
            offset_groups, bias = 1, offset_groups
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(
                    f"[{type(self).__name__}] {name} must be divisible by groups = {groups}; "
                    f"got {channels}"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.offset_groups = offset_groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self._add_layers()
        self.reset_parameters()

    def _add_layers(self) -> None:
        """What a subclass has besides weight and bias."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        text += f", groups={self.groups}, offset_groups={self.offset_groups}"
        return text + f", bias={self.bias is not None}"

    def _convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._convolve(input, offset, mask)


class ModulatedDeformConv2d(DeformConv2d):
    """Applies a deformable convolution that predicts its offsets and mask from its input.

    mps-deform-conv's ``ModulatedDeformConv2d``: the same constructor (see
    :class:`DeformConv2d`), ``state_dict`` and initialisation. A convolution with the layer's own
    geometry, ``offset_conv``, predicts ``2 * DG * kH * kW`` channels of offsets and then
    ``DG * kH * kW`` logits, whose sigmoid is the mask. It starts at zero.

    Call:
        ``layer(input)`` with ``input`` of shape ``(N, in_channels, H, W)`` gives a tensor of
        shape ``(N, out_channels, H_out, W_out)``.

    Example:
        >>> import torch
        >>> from mlx_deform.torch import ModulatedDeformConv2d
        >>> layer = ModulatedDeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> layer(torch.randn(8, 16, 24, 24)).shape
        torch.Size([8, 32, 24, 24])

    References:
        Zhu et al., "Deformable ConvNets v2", arXiv:1811.11168.
    """

    def _add_layers(self) -> None:
        self.offset_conv = nn.Conv2d(
            self.in_channels,
            3 * self.offset_groups * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.offset_conv.weight)
        nn.init.zeros_(self.offset_conv.bias)

    def forward(self, input: Tensor) -> Tensor:
        samples = self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        offset, logits = self.offset_conv(input).split([2 * samples, samples], dim=1)
        return self._convolve(input, offset, torch.sigmoid(logits))
