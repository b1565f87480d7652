"""The torch operators: their schemas, what they compute, and the shapes of what they return.

With f = deform_conv2d as a function of x = (input, offset, weight, bias, mask), a cotangent u
of its output and tangents t of x, there are three:

=================================  =========================================================
``deform_conv2d``                  f(x)
``deform_conv2d_backward``         u f'(x), a gradient for each of x
``deform_conv2d_double_backward``  of <u, f'(x) t>, the gradients in u, that is f'(x) t, and
                                   in each of x
=================================  =========================================================

The third is the backward of the second, and the Jacobian-vector product of the first. Each
computes and returns only what is ``wanted``.
"""

from collections.abc import Sequence

import mlx.core as mx
import torch
from torch import Tensor

import mlx_deform

from . import _bridge
from ._checks import output_shape, refuse
from ._layout import channels_first, channels_last, is_channels_last

ARGUMENTS = ("input", "offset", "weight", "bias", "mask")

library = torch.library.Library("mlx_deform", "DEF")
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


def only(wanted: Sequence[bool], values: Sequence) -> list:
    """The wanted ones of the values."""
    return [value for value, is_wanted in zip(values, wanted, strict=True) if is_wanted]


def spread(wanted: Sequence[bool], values: Sequence) -> tuple:
    """The inverse of ``only``: None where nothing was wanted."""
    rest = iter(values)
    return tuple(next(rest) if is_wanted else None for is_wanted in wanted)


# ---------------------------------------------------------------------------
# On MLX's arrays, channels last


def _partial(function, arguments, chosen):
    """``function`` as one of the chosen arguments alone, and these."""

    def partial(*values):
        replaced = spread(chosen, values)
        return [
            function(
                *(
                    argument if value is None else value
                    for argument, value in zip(arguments, replaced, strict=True)
                )
            )
        ]

    return partial, only(chosen, arguments)


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
        return mx.vjp(*_partial(convolution, arguments, wanted), [grad])[1]

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
            function, primals = _partial(convolution, arguments, chosen)
            if primals:
                out = mx.jvp(function, primals, only(given, tangents))[1][0]
                return out if t_bias is None else out + t_bias
            return mx.broadcast_to(t_bias, convolution(*arguments).shape)  # that is not evaluated

        primals = (input, offset, weight, mask)
        results = []
        if wants_grad:
            results.append(along(*primals))
        if any(wanted_primals):
            results += mx.vjp(*_partial(along, primals, wanted_primals), [grad])[1]
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


def _check_shape(name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        refuse(f"{name} must have shape {tuple(shape)}", f"shape {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        refuse(
            f"{name} must have type {like.dtype} and be on {like.device}",
            f"{tensor.dtype} on {tensor.device}",
        )


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
        _check_shape("grad", grad, input, shape)
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
            _check_shape(f"t_{name}", tangent, like, like.shape)
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


for _name, _kernel, _fake in (
    ("deform_conv2d", _forward, _forward_fake),
    ("deform_conv2d_backward", _backward, _backward_fake),
    ("deform_conv2d_double_backward", _double_backward, _double_backward_fake),
):
    for _device in _bridge.DEVICES:
        library.impl(_name, _kernel, _device.upper())
    torch.library.register_fake(f"mlx_deform::{_name}", _fake, lib=library)
