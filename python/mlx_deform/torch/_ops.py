"""The operators of deform_conv2d: schemas, what they compute, the shapes of what they return.

The function is that of x = (input, offset, weight, bias, mask); see `_functions`.
"""

from collections.abc import Sequence

import mlx.core as mx
import torch
from torch import Tensor

import mlx_deform

from . import _bridge
from ._checks import output_shape, refuse
from ._functions import check_like, library, only, partial, register
from ._layout import channels_first, channels_last, is_channels_last

NAME = "deform_conv2d"
ARGUMENTS = ("input", "offset", "weight", "bias", "mask")

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation"
library.define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
    f"{_GEOMETRY}) -> Tensor"
)
library.define(
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, "
    f"Tensor? mask, {_GEOMETRY}, bool[5] wanted) -> Tensor[]"
)
library.define(
    "deform_conv2d_double_backward(Tensor? grad, Tensor input, Tensor offset, Tensor weight, "
    "Tensor? mask, Tensor? t_input, Tensor? t_offset, Tensor? t_weight, Tensor? t_bias, "
    f"Tensor? t_mask, {_GEOMETRY}, bool[5] wanted) -> Tensor[]"
)
deform_conv2d = torch.ops.mlx_deform.deform_conv2d.default
backward = torch.ops.mlx_deform.deform_conv2d_backward.default
double_backward = torch.ops.mlx_deform.deform_conv2d_double_backward.default


# ---------------------------------------------------------------------------
# On MLX's arrays, channels last


def _convolution(stride, padding, dilation):
    def convolution(input, offset, weight, bias, mask):
        return mlx_deform.deform_conv2d(
            input, offset, weight, bias, stride, padding, dilation, mask
        )

    return convolution


def _mlx_backward(geometry, wanted):
    convolution = _convolution(*geometry)

    def gradients(grad, input, offset, weight, mask):
        # The output is linear in the bias: its values matter to no gradient.
        bias = mx.zeros(weight.shape[0], weight.dtype) if wanted[3] else None
        arguments = (input, offset, weight, bias, mask)
        return mx.vjp(*partial(convolution, arguments, wanted), [grad])[1]

    return gradients


def _mlx_double_backward(geometry, wanted):
    convolution = _convolution(*geometry)
    wants_grad, *wanted_primals = wanted

    def gradients(grad, input, offset, weight, mask, *tangents):
        *tangents, t_bias, t_mask = tangents
        tangents = (*tangents, t_mask)
        given = [tangent is not None for tangent in tangents]

        def along(input, offset, weight, mask):  # f'(x) t
            arguments = (input, offset, weight, None, mask)
            chosen = (*given[:3], False, given[3])
            function, primals = partial(convolution, arguments, chosen)
            if primals:
                out = mx.jvp(function, primals, only(given, tangents))[1][0]
                return out if t_bias is None else out + t_bias
            return mx.broadcast_to(t_bias, convolution(*arguments).shape)  # that is not evaluated

        primals = (input, offset, weight, mask)
        results = []
        if wants_grad:
            results.append(along(*primals))
        if any(wanted_primals):
            results += mx.vjp(*partial(along, primals, wanted_primals), [grad])[1]
        return results

    return gradients


# ---------------------------------------------------------------------------
# On tensors


def _rows(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return channels_last(tensor) if tensor.dim() == 4 else tensor.contiguous()


def _call(function, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    """``function`` by MLX; a result has the memory format of its ``like``."""
    _bridge.check_process()
    results = _bridge.call(function, [_rows(tensor) for tensor in tensors])
    return [
        channels_first(result, like) if result.dim() == 4 else result
        for result, like in zip(results, likes, strict=True)
    ]


def _like(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Uninitialised, of the tensor's type and memory format."""
    shape = tensor.shape if shape is None else shape
    if len(shape) == 4 and is_channels_last(tensor):
        N, C, H, W = shape
        return tensor.new_empty((N, H, W, C)).permute(0, 3, 1, 2)
    return tensor.new_empty(shape)


def _forward_fake(input, offset, weight, bias, mask, *geometry):
    return _like(input, output_shape(input, offset, weight, bias, mask, *geometry))


def _forward(input, offset, weight, bias, mask, *geometry):
    shape = output_shape(input, offset, weight, bias, mask, *geometry)
    if input.shape[0] == 0:
        return _like(input, shape)
    convolution = _convolution(*geometry)

    def function(*arguments):
        return [convolution(*arguments)]

    return _call(function, (input, offset, weight, bias, mask), [input])[0]


def _check_backward(grad, input, offset, weight, mask, geometry, wanted):
    """The shape of the output."""
    shape = output_shape(input, offset, weight, None, mask, *geometry)
    if grad is not None:
        check_like(NAME, "grad", grad, input, shape)
    if wanted[-1] and mask is None:
        refuse("mask must be given where its gradient is wanted", mask)
    return shape


def _backward_fake(grad, input, offset, weight, mask, stride, padding, dilation, wanted):
    _check_backward(grad, input, offset, weight, mask, (stride, padding, dilation), wanted)
    bias = weight[:, 0, 0, 0]
    return [_like(tensor) for tensor in only(wanted, (input, offset, weight, bias, mask))]


def _backward(grad, input, offset, weight, mask, stride, padding, dilation, wanted):
    if input.shape[0] == 0:
        fake = _backward_fake(grad, input, offset, weight, mask, stride, padding, dilation, wanted)
        return [result.zero_() for result in fake]
    _check_backward(grad, input, offset, weight, mask, (stride, padding, dilation), wanted)
    return _call(
        _mlx_backward((stride, padding, dilation), wanted),
        (grad, input, offset, weight, mask),
        only(wanted, (input, offset, weight, weight, mask)),
    )


def _check_double_backward(grad, input, offset, weight, mask, tangents, geometry, wanted):
    """The shape of the output."""
    shape = _check_backward(grad, input, offset, weight, mask, geometry, wanted)
    if grad is None and any(wanted[1:]):
        refuse("grad must be given where gradients of the arguments are wanted", grad)
    if all(tangent is None for tangent in tangents):
        refuse("one tangent must be given", None)
    bias = weight[:, 0, 0, 0]
    likes = (input, offset, weight, bias, mask)
    for name, tangent, like in zip(ARGUMENTS, tangents, likes, strict=True):
        if tangent is not None:
            if like is None:
                refuse("mask must be given where its tangent is", like)
            check_like(NAME, f"t_{name}", tangent, like, like.shape)
    return shape


def _double_backward_fake(grad, input, offset, weight, mask, *rest):
    *tangents, stride, padding, dilation, wanted = rest
    geometry = (stride, padding, dilation)
    shape = _check_double_backward(grad, input, offset, weight, mask, tangents, geometry, wanted)
    primals = only(wanted[1:], (input, offset, weight, mask))
    return [_like(input, shape)] * wanted[0] + [_like(tensor) for tensor in primals]


def _double_backward(grad, input, offset, weight, mask, *rest):
    *tangents, stride, padding, dilation, wanted = rest
    if input.shape[0] == 0:
        fake = _double_backward_fake(grad, input, offset, weight, mask, *rest)
        return [result.zero_() for result in fake]
    geometry = (stride, padding, dilation)
    _check_double_backward(grad, input, offset, weight, mask, tangents, geometry, wanted)
    return _call(
        _mlx_double_backward(geometry, wanted),
        (grad, input, offset, weight, mask, *tangents),
        only(wanted, (input, input, offset, weight, mask)),
    )


register(NAME, _forward, _forward_fake)
register(f"{NAME}_backward", _backward, _backward_fake)
register(f"{NAME}_double_backward", _double_backward, _double_backward_fake)
