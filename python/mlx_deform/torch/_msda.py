"""The operators of multi_scale_deformable_attention, and the functions that users call.

The operators' function is that of x = (value, locations, weights); see `_functions`. Levels and
points share one axis there, K samples in all, and the shapes of the levels lie flat.
"""

from collections.abc import Sequence

import mlx.core as mx
import torch
from torch import Tensor, nn

import mlx_deform

from . import _bridge
from ._bridge import DEVICES, DTYPES
from ._checks import refuse as _refuse
from ._functions import (
    check_like,
    fold,
    library,
    only,
    partial,
    register,
    register_derivatives,
    unfold,
)

NAME = "multi_scale_deformable_attention"
ARGUMENTS = ("value", "sampling_locations", "attention_weights")
METHODS = ("bilinear", "discrete")

_X = "Tensor value, Tensor locations, Tensor weights"
_TANGENTS = "Tensor? t_value, Tensor? t_locations, Tensor? t_weights"
_SETTINGS = "SymInt[] shapes, SymInt[] points, bool discrete"
library.define(f"{NAME}({_X}, {_SETTINGS}) -> Tensor")
library.define(f"{NAME}_backward(Tensor grad, {_X}, {_SETTINGS}, bool[3] wanted) -> Tensor[]")
library.define(
    f"{NAME}_double_backward(Tensor? grad, {_X}, {_TANGENTS}, {_SETTINGS}, bool[4] wanted)"
    " -> Tensor[]"
)
_forward_op = torch.ops.mlx_deform.multi_scale_deformable_attention.default
_backward_op = torch.ops.mlx_deform.multi_scale_deformable_attention_backward.default
_double_backward_op = torch.ops.mlx_deform.multi_scale_deformable_attention_double_backward.default


def refuse(rule: str, value: object):
    _refuse(rule, value, NAME)


# ---------------------------------------------------------------------------
# On MLX's arrays


def _attention(shapes, points, discrete):
    levels = list(zip(shapes[::2], shapes[1::2], strict=True))

    def attention(value, locations, weights):
        return mlx_deform.multi_scale_deformable_attention(
            value, levels, locations, weights, points=list(points), method=METHODS[discrete]
        )

    return attention


def _mlx_backward(settings, wanted):
    attention = _attention(*settings)

    def gradients(grad, *primals):
        return mx.vjp(*partial(attention, primals, wanted), [grad])[1]

    return gradients


def _mlx_double_backward(settings, wanted):
    attention = _attention(*settings)
    wants_grad, *wanted_primals = wanted

    def gradients(grad, *arguments):
        primals, tangents = arguments[:3], arguments[3:]
        given = [tangent is not None for tangent in tangents]

        def along(*at):  # f'(x) t
            function, varied = partial(attention, at, given)
            return mx.jvp(function, varied, only(given, tangents))[1][0]

        results = [along(*primals)] if wants_grad else []
        if any(wanted_primals):
            results += mx.vjp(*partial(along, primals, wanted_primals), [grad])[1]
        return results

    return gradients


# ---------------------------------------------------------------------------
# On tensors


def _check(value, locations, weights, shapes, points, discrete) -> tuple[int, int, int]:
    """The shape of the output, (N, Q, M * D)."""
    if value.dtype not in DTYPES:
        refuse("value must be float16, bfloat16, float32 or float64", value.dtype)
    for name, tensor in zip(ARGUMENTS[1:], (locations, weights), strict=True):
        if tensor.device != value.device:
            refuse(f"{name} must be on the device of value, {value.device}", tensor.device)
        if tensor.dtype not in (value.dtype, torch.float32):
            refuse(
                f"{name} must have the type of value, {value.dtype}, or torch.float32",
                tensor.dtype,
            )
    if value.dim() != 4:
        refuse("value must have 4 axes, (N, S, M, D)", f"shape {tuple(value.shape)}")
    N, S, M, D = value.shape
    if len(shapes) == 0 or len(shapes) != 2 * len(points):
        refuse("spatial_shapes must have a pair (H, W) for each level", list(shapes))
    if any(size < 1 for size in shapes) or any(count < 1 for count in points):
        refuse("levels must have pixels and points", (list(shapes), list(points)))
    pixels = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
    if pixels != S:
        refuse(f"value must have a row for each of the {pixels} pixels of all levels", S)
    K = sum(points)
    if locations.dim() != 5 or tuple(locations.shape) != (N, locations.shape[1], M, K, 2):
        refuse(
            f"sampling_locations must have shape ({N}, Q, {M}, {K}, 2), levels and points joined",
            f"shape {tuple(locations.shape)}",
        )
    if tuple(weights.shape) != tuple(locations.shape[:4]):
        refuse(
            f"attention_weights must have shape {tuple(locations.shape[:4])}, levels and points "
            "joined",
            f"shape {tuple(weights.shape)}",
        )
    return N, locations.shape[1], M * D


def _call(function, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    _bridge.check_process()
    return _bridge.call(
        function, [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    )


def _empty(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.numel() == 0 for tensor in tensors)


def _forward_fake(value, *rest):
    return value.new_empty(_check(value, *rest))


def _forward(value, locations, weights, *settings):
    shape = _check(value, locations, weights, *settings)
    if _empty((value, locations)):
        return value.new_zeros(shape)
    attention = _attention(*settings)
    return _call(lambda *x: [attention(*x)], (value, locations, weights))[0]


def _check_grad(grad, primals, settings) -> tuple[int, int, int]:
    shape = _check(*primals, *settings)
    if grad is not None:
        check_like(NAME, "grad", grad, primals[0], shape)
    return shape


def _backward_fake(grad, value, locations, weights, *rest):
    *settings, wanted = rest
    primals = (value, locations, weights)
    _check_grad(grad, primals, settings)
    return [primal.new_empty(primal.shape) for primal in only(wanted, primals)]


def _backward(grad, value, locations, weights, *rest):
    *settings, wanted = rest
    primals = (value, locations, weights)
    _check_grad(grad, primals, settings)
    if _empty(primals):
        return [primal.new_zeros(primal.shape) for primal in only(wanted, primals)]
    return _call(_mlx_backward(settings, wanted), (grad, *primals))


def _split(rest):
    *tangents, shapes, points, discrete, wanted = rest
    return tangents, (shapes, points, discrete), wanted


def _check_tangents(grad, primals, rest) -> list[tuple[int, ...]]:
    """The shapes of what is wanted."""
    tangents, settings, wanted = _split(rest)
    shape = _check_grad(grad, primals, settings)
    if grad is None and any(wanted[1:]):
        refuse("grad must be given where gradients of the arguments are wanted", grad)
    if all(tangent is None for tangent in tangents):
        refuse("one tangent must be given", None)
    for name, tangent, primal in zip(ARGUMENTS, tangents, primals, strict=True):
        if tangent is not None:
            check_like(NAME, f"t_{name}", tangent, primal, primal.shape)
    return only(wanted, (shape, *(primal.shape for primal in primals)))


def _double_backward_fake(grad, value, locations, weights, *rest):
    shapes = _check_tangents(grad, (value, locations, weights), rest)
    likes = only(rest[-1], (value, value, locations, weights))
    return [like.new_empty(shape) for like, shape in zip(likes, shapes, strict=True)]


def _double_backward(grad, value, locations, weights, *rest):
    primals = (value, locations, weights)
    _check_tangents(grad, primals, rest)
    if _empty(primals):
        fakes = _double_backward_fake(grad, *primals, *rest)
        return [fake.zero_() for fake in fakes]
    tangents, settings, wanted = _split(rest)
    return _call(_mlx_double_backward(settings, wanted), (grad, *primals, *tangents))


register(NAME, _forward, _forward_fake)
register(f"{NAME}_backward", _backward, _backward_fake)
register(f"{NAME}_double_backward", _double_backward, _double_backward_fake)
register_derivatives(NAME, (True, True, True))


def _vmap(operator):
    """Everything has the batch first and no sums over it: vmap's axis joins it."""

    def rule(info, dims, *arguments):
        size = info.batch_size
        folded = [
            fold(argument, dim, size) if isinstance(argument, Tensor) else argument
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        results = operator(*folded)
        if isinstance(results, Tensor):
            return unfold(results, size), 0
        return [unfold(result, size) for result in results], [0] * len(results)

    return rule


for _operator in (_forward_op, _backward_op, _double_backward_op):
    torch.library.register_vmap(_operator, _vmap(_operator), lib=library)


def _autocast(device: str):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def rule(value, locations, weights, *settings):
        """The result has the type of value; sums and coordinates are float32 anyway."""

        def plan(tensor):
            kept = tensor.dtype in (value.dtype, torch.float32)
            return tensor if kept else tensor.to(torch.float32)

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _forward_op(value, plan(locations), plan(weights), *settings)

    return rule


for _device in DEVICES:
    library.impl(NAME, _autocast(_device), f"Autocast{_device.upper()}")


# ---------------------------------------------------------------------------
# What users call


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points: Sequence[int] | None = None,
    method: str = "bilinear",
) -> Tensor:
    """Multi-scale deformable attention of PyTorch tensors by MLX.

    Each query and head sums samples of every level of a pyramid of maps. Tensors are on the CPU
    or on MPS, whose memory MLX shares. All are differentiable, twice, in reverse and in forward
    mode.

    Args:
        value (Tensor): The maps, flattened and joined, of shape ``(N, S, M, D)``: ``S`` pixels
            of all levels, ``M`` heads of ``D`` channels.
        spatial_shapes (Tensor or list): ``(H, W)`` of each level. A tensor is read by the host;
            a list keeps ``torch.compile`` in one graph.
        sampling_locations (Tensor): ``(x, y)`` of each sample in units of its map, of shape
            ``(N, Q, M, L, P, 2)``; with ``points`` of shape ``(N, Q, M, sum(points), 2)``.
        attention_weights (Tensor): The samples' weights, of the same shape without the 2.
        points (list, optional): Samples of each level, where these differ.
        method (str): ``"bilinear"``, or ``"discrete"`` as RT-DETRv2 and D-FINE define it.

    Returns:
        Tensor: Of shape ``(N, Q, M * D)``, in the type of ``value``.

    Raises:
        InvalidArgument: A RuntimeError and a ValueError: if a shape, a size, a device or a type
            doesn't fit. Locations and weights have the type of ``value`` or float32.
        TypeError: If an argument is not a tensor.

    Example:
        >>> import torch
        >>> from mlx_deform.torch import multi_scale_deformable_attention
        >>> value, weights = torch.randn(1, 20, 8, 32), torch.rand(1, 5, 8, 2, 4)
        >>> locations = torch.rand(1, 5, 8, 2, 4, 2)
        >>> multi_scale_deformable_attention(value, [(4, 4), (2, 2)], locations, weights).shape
        torch.Size([1, 5, 256])

    References:
        Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    for name, tensor in zip(ARGUMENTS, (value, sampling_locations, attention_weights), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"[{NAME}] {name} must be a tensor; got {type(tensor).__name__}")
    if method not in METHODS:
        refuse('method must be "bilinear" or "discrete"', repr(method))
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    shapes = []
    for shape in spatial_shapes:
        if len(shape) != 2:
            refuse("spatial_shapes must have a pair (H, W) for each level", tuple(shape))
        shapes += map(_integer, shape)
    if points is None:
        if sampling_locations.dim() != 6 or sampling_locations.shape[3] != len(spatial_shapes):
            refuse(
                "sampling_locations must have 6 axes, (N, Q, M, L, P, 2), or with points 5, with "
                f"L = {len(spatial_shapes)}",
                f"shape {tuple(sampling_locations.shape)}",
            )
        if attention_weights.dim() != 5:
            refuse(
                "attention_weights must have 5 axes, (N, Q, M, L, P), or with points 4",
                f"shape {tuple(attention_weights.shape)}",
            )
        points = [sampling_locations.shape[4]] * len(spatial_shapes)
        sampling_locations = sampling_locations.flatten(3, 4)
        attention_weights = attention_weights.flatten(3, 4)
    return _forward_op(
        value, sampling_locations, attention_weights, shapes, list(points), method == "discrete"
    )


def _integer(size):
    return size.item() if isinstance(size, Tensor) else size


class MultiScaleDeformableAttention(nn.Module):
    """The attention's core with the arguments of transformers' layer of this name, and of the
    CUDA kernels that it stands for. It has no parameters."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[Sequence[int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """As :func:`multi_scale_deformable_attention`; the start of a level follows from the
        shapes, and the step is for kernels that keep columns."""
        return multi_scale_deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )


class MultiScaleDeformableAttnFunction:
    """``mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction``, whose ``apply`` is
    what code calls."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """As :func:`multi_scale_deformable_attention`."""
        return multi_scale_deformable_attention(
            value, value_spatial_shapes, sampling_locations, attention_weights
        )
