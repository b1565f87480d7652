"""multi_scale_deformable_attention: its operators, and the ways that others call it.

The function is that of x = (value, locations, weights); see `_functions`. The sizes of the levels
travel as one list, H and W in turn, which torch.compile may keep symbolic.
"""

from collections.abc import Sequence

import mlx.core as mx
import torch
from torch import Tensor

import mlx_deform

from . import _bridge, _checks
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

_PRIMALS = "Tensor value, Tensor sampling_locations, Tensor attention_weights"
_TANGENTS = "Tensor? t_value, Tensor? t_sampling_locations, Tensor? t_attention_weights"
_SETTINGS = "SymInt[] sizes, int[]? points, str method"
library.define(f"{NAME}({_PRIMALS}, {_SETTINGS}) -> Tensor")
library.define(f"{NAME}_backward(Tensor grad, {_PRIMALS}, {_SETTINGS}, bool[3] wanted) -> Tensor[]")
library.define(
    f"{NAME}_double_backward(Tensor? grad, {_PRIMALS}, {_TANGENTS}, {_SETTINGS}, bool[4] wanted)"
    " -> Tensor[]"
)
attention, backward, double_backward = (
    getattr(torch.ops.mlx_deform, name).default
    for name in (NAME, f"{NAME}_backward", f"{NAME}_double_backward")
)


def _refuse(rule: str, value: object):
    _checks.refuse(rule, value, NAME)


# ---------------------------------------------------------------------------
# What the operators accept


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _check_levels(sizes: Sequence[int], value: Tensor) -> int:
    """The number of levels."""
    if len(sizes) == 0 or len(sizes) % 2 != 0:
        _refuse("spatial_shapes must hold a pair (H, W) for at least one level", tuple(sizes))
    pixels = 0
    for H, W in zip(sizes[::2], sizes[1::2], strict=True):
        if H < 1 or W < 1:
            _refuse("spatial_shapes must hold pairs (H, W) of at least 1", (H, W))
        pixels += H * W
    if value.shape[1] != pixels:
        _refuse(
            f"the second axis of value must hold the pixels of all levels, {pixels} by "
            "spatial_shapes",
            _shape(value),
        )
    return len(sizes) // 2


def output_shape(value, locations, weights, sizes, points, method) -> tuple[int, int, int]:
    """(N, Q, M * D), after the checks."""
    for name, tensor in zip(ARGUMENTS, (value, locations, weights), strict=True):
        if tensor.dtype not in _bridge.DTYPES:
            _refuse(f"{name} must be float16, bfloat16, float32 or float64", tensor.dtype)
        if tensor.device != value.device:
            _refuse(f"{name} must be on the device of value, {value.device}", tensor.device)
    if method not in METHODS:
        _refuse('method must be "bilinear" or "discrete"', repr(method))
    if value.dim() != 4:
        _refuse("value must have 4 axes, (N, S, M, D)", _shape(value))
    N, S, M, D = value.shape
    if S == 0 or M == 0 or D == 0:
        _refuse("value must have no empty axis but the batch", _shape(value))
    L = _check_levels(sizes, value)

    if points is None:
        if locations.dim() != 6:
            _refuse(
                "sampling_locations must have 6 axes, (N, Q, M, L, P, 2), or with points 5",
                _shape(locations),
            )
        Q, P = locations.shape[1], locations.shape[4]
        if P == 0 or tuple(locations.shape) != (N, Q, M, L, P, 2):
            _refuse(
                "sampling_locations must have shape (N, Q, M, L, P, 2), "
                f"({N}, Q, {M}, {L}, P, 2) with P at least 1",
                _shape(locations),
            )
    else:
        if len(points) != L:
            _refuse(f"points must have an entry for each of the {L} levels", tuple(points))
        if any(count < 1 for count in points):
            _refuse("points must be at least 1", tuple(points))
        Q, K = locations.shape[1] if locations.dim() > 1 else 0, sum(points)
        if tuple(locations.shape) != (N, Q, M, K, 2):
            _refuse(
                "sampling_locations must have shape (N, Q, M, sum of points, 2), "
                f"({N}, Q, {M}, {K}, 2)",
                _shape(locations),
            )
    if weights.shape != locations.shape[:-1]:
        _refuse(
            f"attention_weights must have shape {tuple(locations.shape[:-1])}, that of "
            "sampling_locations without the last axis",
            _shape(weights),
        )
    return N, Q, M * D


# ---------------------------------------------------------------------------
# On MLX's arrays


def _mlx_attention(sizes, points, method):
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))

    def function(value, locations, weights):
        return mlx_deform.multi_scale_deformable_attention(
            value, shapes, locations, weights, points=points, method=method
        )

    return function


def _mlx_backward(settings, wanted):
    function = _mlx_attention(*settings)

    def gradients(grad, *primals):
        return mx.vjp(*partial(function, primals, wanted), [grad])[1]

    return gradients


def _mlx_double_backward(settings, wanted):
    function = _mlx_attention(*settings)
    wants_grad, *wanted_primals = wanted

    def gradients(grad, value, locations, weights, *tangents):
        given = [tangent is not None for tangent in tangents]

        def along(*primals):  # f'(x) t
            return mx.jvp(*partial(function, primals, given), only(given, tangents))[1][0]

        primals = (value, locations, weights)
        results = [along(*primals)] if wants_grad else []
        if any(wanted_primals):
            results += mx.vjp(*partial(along, primals, wanted_primals), [grad])[1]
        return results

    return gradients


# ---------------------------------------------------------------------------
# On tensors


def _call(function, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    _bridge.check_process()
    return _bridge.call(function, [None if x is None else x.contiguous() for x in tensors])


def _forward_fake(value, locations, weights, *settings):
    return value.new_empty(output_shape(value, locations, weights, *settings))


def _forward(value, locations, weights, *settings):
    output = output_shape(value, locations, weights, *settings)
    if 0 in output:
        return value.new_empty(output)
    function = _mlx_attention(*settings)
    return _call(lambda *primals: [function(*primals)], (value, locations, weights))[0]


def _check_backward(grad, primals, settings):
    """The shape of the output."""
    output = output_shape(*primals, *settings)
    if grad is not None:
        check_like(NAME, "grad", grad, primals[0], output)
    return output


def _backward_fake(grad, value, locations, weights, *rest):
    *settings, wanted = rest
    primals = (value, locations, weights)
    _check_backward(grad, primals, settings)
    return [x.new_empty(x.shape) for x in only(wanted, primals)]


def _backward(grad, value, locations, weights, *rest):
    *settings, wanted = rest
    primals = (value, locations, weights)
    if 0 in _check_backward(grad, primals, settings):
        return [x.new_zeros(x.shape) for x in only(wanted, primals)]
    return _call(_mlx_backward(settings, wanted), (grad, *primals))


def _check_double_backward(grad, primals, tangents, settings, wanted):
    """The shape of the output."""
    output = _check_backward(grad, primals, settings)
    if grad is None and any(wanted[1:]):
        _refuse("grad must be given where gradients of the arguments are wanted", grad)
    if all(tangent is None for tangent in tangents):
        _refuse("one tangent must be given", None)
    for name, tangent, primal in zip(ARGUMENTS, tangents, primals, strict=True):
        if tangent is not None:
            check_like(NAME, f"t_{name}", tangent, primal, primal.shape)
    return output


def _double_backward_fake(grad, *rest):
    primals, tangents, (*settings, wanted) = rest[:3], rest[3:6], rest[6:]
    output = _check_double_backward(grad, primals, tangents, settings, wanted)
    results = [primals[0].new_empty(output)] * wanted[0]
    return results + [x.new_empty(x.shape) for x in only(wanted[1:], primals)]


def _double_backward(grad, *rest):
    primals, tangents, (*settings, wanted) = rest[:3], rest[3:6], rest[6:]
    if 0 in _check_double_backward(grad, primals, tangents, settings, wanted):
        return [each.zero_() for each in _double_backward_fake(grad, *rest)]
    return _call(_mlx_double_backward(settings, wanted), (grad, *primals, *tangents))


register(NAME, _forward, _forward_fake)
register(f"{NAME}_backward", _backward, _backward_fake)
register(f"{NAME}_double_backward", _double_backward, _double_backward_fake)
register_derivatives(NAME, is_saved=[True, True, True])


# vmap: every tensor starts with the batch, and no result is summed over it.
def _vmap(operator):
    def rule(info, dims, *arguments):
        size = info.batch_size
        folded = [
            fold(argument, dim, size) if isinstance(argument, Tensor) else argument
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        results = operator(*folded)
        if isinstance(results, Tensor):
            return unfold(results, size), 0
        return [unfold(each, size) for each in results], [0] * len(results)

    return rule


for _operator in (attention, backward, double_backward):
    torch.library.register_vmap(_operator, _vmap(_operator), lib=library)


# ---------------------------------------------------------------------------
# What users call

SpatialShapes = Tensor | Sequence[Sequence[int]]


def _sizes(spatial_shapes: SpatialShapes) -> list[int]:
    """Of the levels, H and W in turn."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.is_floating_point():
            _refuse(
                "spatial_shapes must hold integers and have 2 axes, (L, 2)",
                f"{spatial_shapes.dtype} of {_shape(spatial_shapes)}",
            )
        spatial_shapes = spatial_shapes.tolist()
    for pair in spatial_shapes:
        if len(pair) != 2:
            _refuse("spatial_shapes must hold pairs (H, W) of at least 1", tuple(pair))
    return [size for pair in spatial_shapes for size in pair]


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points: Sequence[int] | None = None,
    method: str = "bilinear",
) -> Tensor:
    """Multi-scale deformable attention of PyTorch tensors by MLX: the sampling core of
    Deformable DETR and the models after it.

    Every query sums, head by head, weighted samples of all the maps. Tensors are on the CPU or
    on MPS, whose memory MLX shares. All of them are differentiable, twice, in reverse and in
    forward mode.

    Args:
        value (Tensor): The maps, flattened and concatenated, of shape ``(N, S, M, D)``: ``M``
            heads of ``D`` channels, ``S`` the sum of ``H * W`` over the levels.
        spatial_shapes (list of pairs, or Tensor): ``(H, W)`` of each of the ``L`` levels. A
            tensor ``(L, 2)`` is read, which on MPS waits for the GPU, and which
            ``torch.compile`` cannot trace; a list costs nothing.
        sampling_locations (Tensor): Where to sample, ``(x, y)`` in units of the map: (0, 0) is
            the upper left corner of the first pixel, (1, 1) the lower right one of the last.
            Of shape ``(N, Q, M, L, P, 2)``, or with ``points`` ``(N, Q, M, sum of points, 2)``.
        attention_weights (Tensor): The weight of each sample, of the same shape without the
            last axis. The softmax is yours.
        points (list of int, optional): The number of samples on each level, where it differs
            (RT-DETRv2, D-FINE).
        method (str): ``"bilinear"``, with zeros outside the map, or ``"discrete"``, the pixel
            of index ``trunc(location * size + 0.5)`` clamped to the map, without a gradient to
            the location. Default: ``"bilinear"``.

    Returns:
        Tensor: The output of shape ``(N, Q, M * D)``, in the type of ``value``. The other two
        may be of another floating type: coordinates and sums are float32 at least.

    Raises:
        InvalidArgument: A RuntimeError and a ValueError: if a shape, a size, a device or a type
            doesn't fit.
        TypeError: If an argument is not a tensor.

    Third derivatives raise a NotImplementedError. MLX work of your own on the GPU, besides this
    bridge, must wait for torch's: call ``torch.mps.synchronize()`` before it. ``torch.compile``
    and ``torch.export`` know it; TorchScript, which lacks keyword-only arguments, does not.

    Example:
        >>> import torch
        >>> from mlx_deform.torch import multi_scale_deformable_attention
        >>> shapes = [(8, 12), (4, 6)]
        >>> value = torch.randn(2, 8 * 12 + 4 * 6, 4, 16)
        >>> locations = torch.rand(2, 10, 4, 2, 3, 2)
        >>> weights = torch.rand(2, 10, 4, 2, 3)
        >>> multi_scale_deformable_attention(value, shapes, locations, weights).shape
        torch.Size([2, 10, 64])

    References:
        Zhu et al., "Deformable DETR", arXiv:2010.04159; Lv et al., "RT-DETRv2",
        arXiv:2407.17140.
    """
    tensors = (value, sampling_locations, attention_weights)
    for name, tensor in zip(ARGUMENTS, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"[{NAME}] {name} must be a tensor; got {type(tensor).__name__}")
    points = None if points is None else list(points)
    return attention(*tensors, _sizes(spatial_shapes), points, method)


class MultiScaleDeformableAttention(torch.nn.Module):
    """The layer of that name in transformers, and of its kernels: without parameters, called as
    ``layer(value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
    sampling_locations, attention_weights, im2col_step)``.

    The sizes are those of the list, or of the tensor where the list is ``None``. The levels lie
    one after the other, so ``level_start_index`` is not read, and neither is ``im2col_step``.
    """

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | None,
        value_spatial_shapes_list: Sequence[Sequence[int]] | None,
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None = None,
    ) -> Tensor:
        shapes = value_spatial_shapes_list
        return multi_scale_deformable_attention(
            value,
            value_spatial_shapes if shapes is None else shapes,
            sampling_locations,
            attention_weights,
        )


class MultiScaleDeformableAttnFunction:
    """mmcv's, and Deformable DETR's ``MSDeformAttnFunction``: what is called by its ``apply``.

    Example:
        >>> import torch
        >>> from mlx_deform.torch import MultiScaleDeformableAttnFunction
        >>> value, shapes = torch.randn(1, 6, 2, 4), torch.tensor([[2, 3]])
        >>> locations, weights = torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3)
        >>> start = torch.tensor([0])
        >>> MultiScaleDeformableAttnFunction.apply(
        ...     value, shapes, start, locations, weights, 64
        ... ).shape
        torch.Size([1, 5, 8])
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Tensor | Sequence[int] | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None = None,
    ) -> Tensor:
        """The output of shape ``(N, Q, M * D)``; ``im2col_step`` is not read.

        Raises:
            InvalidArgument: Also if ``value_level_start_index`` doesn't say that the levels lie
                one after the other.
        """
        sizes = _sizes(value_spatial_shapes)
        if value_level_start_index is not None:
            got = value_level_start_index
            got = got.tolist() if isinstance(got, Tensor) else list(got)
            starts = [0]
            for H, W in zip(sizes[::2], sizes[1::2], strict=True):
                starts.append(starts[-1] + H * W)
            if got != starts[:-1]:
                _refuse(f"value_level_start_index must be {tuple(starts[:-1])}", tuple(got))
        shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
        return multi_scale_deformable_attention(
            value, shapes, sampling_locations, attention_weights
        )
