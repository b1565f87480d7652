"""What the op accepts. Runs on real tensors and on fake ones, with sizes known or not."""

from typing import NoReturn

import torch
from torch import Tensor

from ._bridge import DTYPES

Pair = tuple[int, int]

# Of a stride, a padding and a dilation: MLX's sizes are 32-bit integers.
LARGEST = 2**31 - 1


class InvalidArgument(RuntimeError, ValueError):
    """An argument breaks a rule; the message names the argument, the rule and the value.

    torchvision raises RuntimeErrors here, mps-deform-conv and :mod:`mlx_deform` ValueErrors:
    this is both.
    """


def refuse(rule: str, value: object, operator: str = "deform_conv2d") -> NoReturn:
    raise InvalidArgument(f"[{operator}] {rule}; got {value}")


def pair(name: str, value: int | Pair, least: int) -> Pair:
    """(rows, columns), from one number for both or from two. TorchScript compiles it."""
    if not torch.jit.is_scripting():  # where the type says so, and the operator checks the rest
        _check_int_or_pair(name, value, least)
    if isinstance(value, int):
        return value, value
    return value[0], value[1]


def _check_int_or_pair(name: str, value: object, least: int) -> None:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not (isinstance(values[0], int) and isinstance(values[1], int)):
        refuse(f"{name} must be an int or a pair of ints", repr(value))
    _check_pair(name, values, least)


def _check_pair(name: str, values: Pair, least: int) -> None:
    if values[0] < least or values[1] < least:
        refuse(f"{name} must be at least {least} on both axes", tuple(values))
    if values[0] > LARGEST or values[1] > LARGEST:
        refuse(f"{name} must be at most {LARGEST} on both axes", tuple(values))


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _check_tensor(name: str, tensor: Tensor, input: Tensor, may_be_float32: bool) -> None:
    if tensor.device != input.device:
        refuse(f"{name} must be on the device of input, {input.device}", tensor.device)
    if tensor.dtype != input.dtype and not (may_be_float32 and tensor.dtype == torch.float32):
        also = " or torch.float32" if may_be_float32 else ""
        refuse(f"{name} must have the type of input, {input.dtype}{also}", tensor.dtype)


def _output_size(axis: str, size: int, kernel: int, stride: int, padding: int, dilation: int):
    padded, extent = size + 2 * padding, dilation * (kernel - 1) + 1
    if padded < extent:
        refuse(
            f"the padded input must be at least as long as the dilated kernel ({extent}) "
            f"along {axis}",
            padded,
        )
    return (padded - extent) // stride + 1


def output_shape(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[int, int, int, int]:
    """(N, C_out, H_out, W_out), after the checks."""
    if input.dtype not in DTYPES:
        refuse("input must be float16, bfloat16, float32 or float64", input.dtype)
    _check_pair("stride", stride, 1)
    _check_pair("padding", padding, 0)
    _check_pair("dilation", dilation, 1)

    if input.dim() != 4:
        refuse("input must have 4 axes, (N, C_in, H, W)", _shape(input))
    if offset.dim() != 4:
        refuse("offset must have 4 axes, (N, 2 * DG * kH * kW, H_out, W_out)", _shape(offset))
    if weight.dim() != 4:
        refuse("weight must have 4 axes, (C_out, C_in / G, kH, kW)", _shape(weight))
    N, C, H, W = input.shape
    O, C_group, kH, kW = weight.shape  # noqa: E741
    if C == 0 or H == 0 or W == 0:
        refuse("input must have no empty axis but the batch", _shape(input))
    if O == 0 or C_group == 0 or kH == 0 or kW == 0:
        refuse("weight must have no empty axis", _shape(weight))
    if C % C_group != 0 or O % (C // C_group) != 0:
        refuse(
            "weight must have shape (C_out, C_in / G, kH, kW) with a number of groups G that "
            f"divides C_out and C_in = {C}",
            _shape(weight),
        )
    Ho = _output_size("H", H, kH, stride[0], padding[0], dilation[0])
    Wo = _output_size("W", W, kW, stride[1], padding[1], dilation[1])

    channels, taps = offset.shape[1], kH * kW
    if channels == 0 or channels % (2 * taps) != 0:
        refuse(f"offset must have a multiple of 2 * kH * kW = {2 * taps} channels", _shape(offset))
    DG = channels // (2 * taps)
    if C % DG != 0:
        refuse(f"offset must have a number of groups DG that divides C_in = {C}", DG)
    if offset.shape[0] != N or offset.shape[2] != Ho or offset.shape[3] != Wo:
        refuse(f"offset must have shape ({N}, {channels}, {Ho}, {Wo})", _shape(offset))
    if mask is not None and tuple(mask.shape) != (N, DG * taps, Ho, Wo):
        refuse(f"mask must have shape ({N}, {DG * taps}, {Ho}, {Wo})", _shape(mask))
    if bias is not None and tuple(bias.shape) != (O,):
        refuse(f"bias must have shape ({O},)", _shape(bias))

    # After the shapes, as in torchvision. Half types cannot hold coordinates, so offset and mask
    # may stay float32.
    _check_tensor("offset", offset, input, True)
    _check_tensor("weight", weight, input, False)
    if bias is not None:
        _check_tensor("bias", bias, input, False)
    if mask is not None:
        _check_tensor("mask", mask, input, True)
    return N, O, Ho, Wo
