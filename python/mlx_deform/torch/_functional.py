"""The function that users call."""

import mlx.core as mx
import torch
from torch import Tensor

from . import _ops
from ._checks import Pair, pair


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = (1, 1),
    padding: int | Pair = (0, 0),
    dilation: int | Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution of PyTorch tensors by MLX: ``torchvision.ops.deform_conv2d``.

    Tensors are on the CPU or on MPS, whose memory MLX shares. Without ``mask`` this is DCNv1,
    with ``mask`` DCNv2. All tensors are differentiable, twice, in reverse and in forward mode.

    Args:
        input (Tensor): Image of shape ``(N, C_in, H, W)``. In ``channels_last`` memory format,
            which the output then has too, it is not copied on MPS.
        offset (Tensor): Offsets in pixels, of shape ``(N, 2 * DG * kH * kW, H_out, W_out)``,
            the channels ordered ``[DG][kH][kW][(dy, dx)]``. ``DG`` offset groups split the
            input channels; the number is read off the shape.
        weight (Tensor): Kernel of shape ``(C_out, C_in / G, kH, kW)``. ``G`` groups split the
            channels; the number is read off the shape.
        bias (Tensor, optional): Bias of shape ``(C_out,)``.
        stride (int or pair): Step between output positions. Default: ``1``.
        padding (int or pair): Zeros around the image. Default: ``0``.
        dilation (int or pair): Step between the taps. Default: ``1``.
        mask (Tensor, optional): Modulation of each sample, of shape
            ``(N, DG * kH * kW, H_out, W_out)``, the channels ordered ``[DG][kH][kW]``.

    Returns:
        Tensor: The output of shape ``(N, C_out, H_out, W_out)``, in the type and the memory
        format of ``input``.

    Raises:
        InvalidArgument: A RuntimeError, as torchvision's, and a ValueError: if a shape, a size,
            a device or a type doesn't fit. ``input``, ``weight`` and ``bias`` have one type of
            float16, bfloat16, float32 and, on the CPU, float64; ``offset`` and ``mask`` may be
            float32 beside a half.
        TypeError: If an argument is not a tensor.

    ``torch.compile``, ``torch.export`` and ``torch.jit.script`` take functions that call it.
    Under autocast the result has the type of ``input``, as torchvision's. Third derivatives
    raise a NotImplementedError. MLX work of your own on the GPU, besides this bridge, must wait
    for torch's: call ``torch.mps.synchronize()`` before it.

    Example:
        >>> import torch
        >>> from mlx_deform.torch import deform_conv2d
        >>> image, weight = torch.randn(1, 16, 32, 32), torch.randn(8, 16, 3, 3)
        >>> offset = torch.zeros(1, 2 * 3 * 3, 32, 32)
        >>> deform_conv2d(image, offset, weight, padding=1).shape
        torch.Size([1, 8, 32, 32])

    References:
        Dai et al., "Deformable Convolutional Networks", arXiv:1703.06211;
        Zhu et al., "Deformable ConvNets v2", arXiv:1811.11168.
    """
    if not torch.jit.is_scripting():  # which checks types itself
        _check_tensors(input, offset, weight, bias, mask)
    return torch.ops.mlx_deform.deform_conv2d(
        input,
        offset,
        weight,
        bias,
        mask,
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
    )


def _check_tensors(*arguments: object) -> None:
    for name, tensor in zip(_ops.ARGUMENTS, arguments, strict=True):
        optional = name in ("bias", "mask")
        if not (isinstance(tensor, Tensor) or (optional and tensor is None)):
            raise TypeError(
                f"[deform_conv2d] {name} must be a tensor{' or None' if optional else ''}; "
                f"got {type(tensor).__name__}"
            )


def is_available() -> bool:
    """Whether tensors on MPS can be computed with: torch and MLX both have a Metal device.

    Tensors on the CPU can always.
    """
    return torch.backends.mps.is_available() and mx.metal.is_available()
