"""MultiScaleDeformableAttention: the sampling of the DETR family with the projections around it."""

import math
import numbers
import operator
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .._ext import multi_scale_deformable_attention
from .layers import _integer

METHODS = ("bilinear", "discrete")


def _points(layer: str, num_points: int | Sequence[int], num_levels: int) -> tuple[int, ...]:
    """The number of samples of each level."""
    try:
        if not isinstance(num_points, Sequence):
            num_points = (num_points,) * num_levels
        points = tuple(operator.index(count) for count in num_points)
    except TypeError:
        points = ()
    if len(points) != num_levels or min(points) < 1:
        raise ValueError(
            f"[{layer}] num_points must be an integer of at least 1, or one for each of the "
            f"num_levels = {num_levels} levels; got {num_points!r}"
        )
    return points


class MultiScaleDeformableAttention(nn.Module):
    """Attends to a few points around a reference, on every level of a pyramid of maps.

    Each query predicts, for every head and level, where to sample, as offsets from its
    reference point or box, and the weights of the samples, by a softmax over all levels. This
    is the attention of Deformable DETR, DINO, Grounding DINO, Mask2Former and RT-DETR; with
    as many points per level as wanted, ``offset_scale`` and ``method`` it is that of RT-DETRv2,
    and without the projections of value and output that of D-FINE. The layer adds no position
    embedding to the query and no residual to the output. See :func:`load_torch_weights` to load
    PyTorch's weights.

    Args:
        dims (int): The number of channels of the query, of the value and of the output.
            Default: ``256``.
        num_heads (int): The number ``M`` of heads. Default: ``8``.
        num_levels (int): The number ``L`` of maps. Default: ``4``.
        num_points (int or sequence): The number of samples of each head on each level, or one
            number for every level; ``K`` is their sum over the levels. Default: ``4``.
        value_dims (int, optional): The number of channels that the heads share, after the
            projection of the value: ``value_proj_ratio * dims`` in mmcv. Default: ``dims``.
        bias (bool): If ``True``, adds a learnable bias to the projections of value and output.
            The layers that predict offsets and weights always have one. Default: ``True``.
        value_proj (bool): If ``False``, the value is sampled as it is given, with
            ``value_dims`` channels. Default: ``True``.
        output_proj (bool): If ``False``, the output is what was sampled, with ``value_dims``
            channels. Default: ``True``.
        method (str): ``"bilinear"`` or ``"discrete"``, see
            :func:`mlx_deform.multi_scale_deformable_attention`. Default: ``"bilinear"``.
        offset_scale (float): In a reference box, ``offset / P * (width, height) *
            offset_scale`` is added to the centre, with ``P`` points on the level. A setting of
            RT-DETRv2 and D-FINE; the other models have ``0.5``. Default: ``0.5``.

    Parameters:
        ``sampling_offsets`` (``dims`` to ``2 * M * K``, ordered ``[M][K][(dx, dy)]``, and
        ``K`` by level), ``attention_weights`` (``dims`` to ``M * K``), ``value_proj`` (``dims``
        to ``value_dims``) and ``output_proj`` (``value_dims`` to ``dims``), all of them
        :class:`mlx.nn.Linear`. They start as in Deformable DETR: every weight of a sample is
        ``1 / K``; head ``m`` looks in the direction of the angle ``2 * pi * m / M``, where its
        point ``p`` has the offset ``p + 1`` along the longer axis; projections are Xavier
        uniform, with biases of zero.

    Call:
        ``layer(query, reference_points, value, spatial_shapes, mask=None)`` with

        * ``query`` of shape ``(N, Q, dims)``,
        * ``reference_points`` of shape ``(N, Q, L, 2)``, points ``(x, y)``, from which offsets
          count in pixels of the level; or ``(N, Q, L, 4)``, boxes ``(x, y, width, height)``
          with ``(x, y)`` their centre, from which offsets count by ``offset_scale``. Both in
          units of the map, whose upper left corner is (0, 0) and lower right one (1, 1). ``N``
          and ``L`` may be 1 there, for all batches or levels,
        * ``value`` of shape ``(N, S, dims)``: the maps of all levels, flattened row by row and
          joined,
        * ``spatial_shapes``, a sequence of ``L`` pairs ``(H, W)`` of ints; ``S`` is the sum of
          ``H * W``,
        * ``mask``, boolean, of shape ``(N, S)``: ``True`` where the value is padding, which
          counts as zero after its projection, as in the official code and in mmcv. It is the
          inverse of transformers' ``attention_mask``,

        gives an array of shape ``(N, Q, dims)``. In a half type, locations are computed in
        float32 and ``reference_points`` may stay in it.

    Raises:
        ValueError: If an argument of the layer or of a call breaks a rule; the message names
            the argument, the rule and the value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_deform.nn import MultiScaleDeformableAttention
        >>> layer = MultiScaleDeformableAttention(256, num_heads=8, num_levels=2)
        >>> shapes = [(20, 30), (10, 15)]
        >>> value = mx.random.normal((1, 20 * 30 + 10 * 15, 256))
        >>> query = mx.random.normal((1, 100, 256))
        >>> reference_points = mx.random.uniform(shape=(1, 100, 1, 2))
        >>> layer(query, reference_points, value, shapes).shape
        (1, 100, 256)

    References:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
        arXiv:2010.04159; Lv et al., "RT-DETRv2", arXiv:2407.17140; Peng et al., "D-FINE",
        arXiv:2410.13842.
    """

    def __init__(
        self,
        dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        value_dims: int | None = None,
        bias: bool = True,
        value_proj: bool = True,
        output_proj: bool = True,
        method: str = "bilinear",
        offset_scale: float = 0.5,
    ):
        super().__init__()
        layer = type(self).__name__
        self.dims = _integer(layer, "dims", dims, 1)
        self.num_heads = _integer(layer, "num_heads", num_heads, 1)
        num_levels = _integer(layer, "num_levels", num_levels, 1)
        self.num_points = _points(layer, num_points, num_levels)
        name = "dims" if value_dims is None else "value_dims"
        self.value_dims = _integer(layer, name, dims if value_dims is None else value_dims, 1)
        if self.value_dims % self.num_heads:
            raise ValueError(
                f"[{layer}] {name} must be divisible by num_heads; "
                f"got {name}={self.value_dims} and num_heads={self.num_heads}"
            )
        if method not in METHODS:
            raise ValueError(
                f"[{layer}] method must be {' or '.join(map(repr, METHODS))}; got {method!r}"
            )
        self.method = method
        if not (isinstance(offset_scale, numbers.Real) and 0 < offset_scale < math.inf):
            raise ValueError(
                f"[{layer}] offset_scale must be a positive number; got {offset_scale!r}"
            )
        self.offset_scale = float(offset_scale)

        samples = self.num_heads * sum(self.num_points)
        self.sampling_offsets = nn.Linear(self.dims, 2 * samples)
        self.attention_weights = nn.Linear(self.dims, samples)
        if value_proj:
            self.value_proj = nn.Linear(self.dims, self.value_dims, bias)
        if output_proj:
            self.output_proj = nn.Linear(self.value_dims, self.dims, bias)
        self._initialise()

    def _initialise(self) -> None:
        for predictor in (self.sampling_offsets, self.attention_weights):
            predictor.weight = mx.zeros_like(predictor.weight)
            predictor.bias = mx.zeros_like(predictor.bias)
        angles = [2 * math.pi * head / self.num_heads for head in range(self.num_heads)]
        directions = mx.array([[math.cos(angle), math.sin(angle)] for angle in angles])
        directions = directions / mx.abs(directions).max(axis=-1, keepdims=True)
        lengths = mx.array([float(p + 1) for count in self.num_points for p in range(count)])
        self.sampling_offsets.bias = (directions[:, None] * lengths[:, None]).flatten()

        xavier_uniform = nn.init.glorot_uniform()
        for name in ("value_proj", "output_proj"):
            if name in self:
                self[name].weight = xavier_uniform(self[name].weight)
                if "bias" in self[name]:
                    self[name].bias = mx.zeros_like(self[name].bias)

    @property
    def num_levels(self) -> int:
        return len(self.num_points)

    def _extra_repr(self) -> str:
        # One number where all levels have it, as it is given.
        points = self.num_points if len(set(self.num_points)) > 1 else self.num_points[0]
        return (
            f"{self.dims}, num_heads={self.num_heads}, num_levels={self.num_levels}, "
            f"num_points={points}, value_dims={self.value_dims}, method={self.method!r}, "
            f"offset_scale={self.offset_scale:g}"
        )

    def locations_and_weights(
        self,
        query: mx.array,
        reference_points: mx.array,
        spatial_shapes: Sequence[Sequence[int]],
    ) -> tuple[mx.array, mx.array]:
        """What the layer predicts from the query: where it samples, and with what weights.

        Args:
            query (array): As in a call of the layer.
            reference_points (array): As in a call of the layer.
            spatial_shapes (sequence of pairs): As in a call of the layer.

        Returns:
            tuple: Locations ``(x, y)`` in units of the map, of shape ``(N, Q, M, K, 2)``, and
            the weights of the samples, of shape ``(N, Q, M, K)``; both as
            :func:`mlx_deform.multi_scale_deformable_attention` takes them with ``points``.

        Raises:
            ValueError: If an argument breaks a rule.
        """
        shapes = self._shapes(spatial_shapes)
        self._check_features("query", query, "(N, Q, dims)", self.dims)
        self._check_reference_points(reference_points, query)
        samples = (*query.shape[:2], self.num_heads, sum(self.num_points))
        logits = self.attention_weights(query).reshape(samples)
        weights = mx.softmax(logits, axis=-1, precise=True)

        # The divisors are float32, so that the quotients of half offsets are too: half types
        # can't tell the pixels of a large map apart.
        offsets = self.sampling_offsets(query).reshape(*samples, 2)
        if reference_points.shape[-1] == 2:
            sizes = mx.array([[float(w), float(h)] for h, w in shapes])
            offsets = offsets / self._of_samples(sizes, 0)
            return self._of_samples(reference_points, 2)[:, :, None] + offsets, weights
        points = mx.array([[float(count)] for count in self.num_points])
        offsets = offsets / self._of_samples(points, 0) * self.offset_scale
        boxes = self._of_samples(reference_points, 2)[:, :, None]
        return boxes[..., :2] + offsets * boxes[..., 2:], weights

    def _of_samples(self, levels: mx.array, axis: int) -> mx.array:
        """An axis of levels as one of samples: the entry of a level for each of its points."""
        if levels.shape[axis] == 1:
            return levels
        level = [level for level, count in enumerate(self.num_points) for _ in range(count)]
        return mx.take(levels, mx.array(level), axis=axis)

    def __call__(
        self,
        query: mx.array,
        reference_points: mx.array,
        value: mx.array,
        spatial_shapes: Sequence[Sequence[int]],
        mask: mx.array | None = None,
    ) -> mx.array:
        shapes = self._shapes(spatial_shapes)
        locations, weights = self.locations_and_weights(query, reference_points, shapes)
        self._check_value(value, query, shapes)
        if "value_proj" in self:
            value = self.value_proj(value)
        if mask is not None:
            self._check_mask(mask, value)
            value = mx.where(mask[..., None], 0, value)
        head_dims = self.value_dims // self.num_heads
        value = value.reshape(*value.shape[:2], self.num_heads, head_dims)
        output = multi_scale_deformable_attention(
            value, shapes, locations, weights, points=self.num_points, method=self.method
        )
        return self.output_proj(output) if "output_proj" in self else output

    def _require(self, fits: bool, name: str, rule: str, got: object) -> None:
        if not fits:
            raise ValueError(f"[{type(self).__name__}] {name} must {rule}; got {got}")

    def _shapes(self, spatial_shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        try:
            shapes = [(operator.index(h), operator.index(w)) for h, w in spatial_shapes]
        except (TypeError, ValueError):
            shapes = []
        self._require(
            len(shapes) == self.num_levels and min(map(min, shapes)) >= 1,
            "spatial_shapes",
            f"be num_levels = {self.num_levels} pairs (H, W) of integers of at least 1",
            repr(spatial_shapes),
        )
        return shapes

    def _check_features(self, name: str, array: mx.array, axes: str, channels: int) -> None:
        self._require(
            array.ndim == 3 and array.shape[-1] == channels,
            name,
            f"have 3 axes, {axes}, with {channels} channels",
            f"shape {array.shape}",
        )

    def _check_reference_points(self, points: mx.array, query: mx.array) -> None:
        N, Q, L = *query.shape[:2], self.num_levels
        self._require(
            points.ndim == 4
            and points.shape[0] in (N, 1)
            and points.shape[1] == Q
            and points.shape[2] in (L, 1)
            and points.shape[3] in (2, 4),
            "reference_points",
            f"have shape ({N} or 1, {Q}, {L} or 1, 2 or 4)",
            f"shape {points.shape}",
        )

    def _check_value(self, value: mx.array, query: mx.array, shapes: list[tuple[int, int]]) -> None:
        name = "dims" if "value_proj" in self else "value_dims"
        self._check_features("value", value, f"(N, S, {name})", getattr(self, name))
        N, S = query.shape[0], sum(h * w for h, w in shapes)
        self._require(
            value.shape[:2] == (N, S),
            "value",
            f"have the query's batch {N} and the sum of H * W, {S} pixels",
            f"shape {value.shape}",
        )

    def _check_mask(self, mask: mx.array, value: mx.array) -> None:
        self._require(mask.dtype == mx.bool_, "mask", "be boolean", mask.dtype)
        shape = value.shape[:2]
        self._require(mask.shape == shape, "mask", f"have shape {shape}", f"shape {mask.shape}")
