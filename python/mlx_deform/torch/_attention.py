"""mmcv's attention layer, on MLX."""

import math

import torch
from torch import Tensor, nn

from ._checks import refuse
from ._msda import NAME, multi_scale_deformable_attention


class MMCVMultiScaleDeformableAttention(nn.Module):
    """``mmcv.ops.MultiScaleDeformableAttention``: its arguments, its parameters' names, on MLX.

    Args:
        embed_dims (int): Channels ``C`` of queries and values. Default: ``256``.
        num_heads (int): Heads, which divide ``embed_dims``. Default: ``8``.
        num_levels (int): Levels of the pyramid. Default: ``4``.
        num_points (int): Samples of each query, head and level. Default: ``4``.
        im2col_step (int): For mmcv's kernels; means nothing here.
        dropout (float): Of the result, before ``identity`` is added. Default: ``0.1``.
        batch_first (bool): ``(N, Q, C)``, else ``(Q, N, C)``. Default: ``False``.
        norm_cfg, init_cfg: For mmcv's registries; mean nothing here.
        value_proj_ratio (float): Of ``embed_dims``, the channels that are sampled.

    Raises:
        InvalidArgument: A RuntimeError and a ValueError: if a size doesn't fit.

    References:
        Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
        value_proj_ratio: float = 1.0,
    ):
        super().__init__()
        value_dims = int(embed_dims * value_proj_ratio)
        if embed_dims % num_heads or value_dims % num_heads:
            refuse("num_heads must divide embed_dims and the value's channels", num_heads, NAME)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.im2col_step = im2col_step
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, 2 * samples)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, value_dims)
        self.output_proj = nn.Linear(value_dims, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """The paper's: each head looks into a direction of its own, each point one step
        further, all with the same weight."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        bias = direction[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **ignored,
    ) -> Tensor:
        """Attends to ``value``, or ``query`` itself, around ``reference_points``.

        Args:
            query (Tensor): ``(Q, N, C)``, or ``(N, Q, C)`` with ``batch_first``.
            key: Means nothing, as in mmcv.
            value (Tensor, optional): The maps, flattened and joined, ``(S, N, C)`` or so.
            identity (Tensor, optional): Added to the result. Default: ``query``.
            query_pos (Tensor, optional): Added to ``query`` before it predicts.
            key_padding_mask (Tensor, optional): ``(N, S)``, true where ``value`` is padding.
            reference_points (Tensor): ``(N, Q, L, 2)`` or, boxes, ``(N, Q, L, 4)``.
            spatial_shapes (Tensor or list): ``(H, W)`` of each level.
            level_start_index: Follows from ``spatial_shapes``.

        Returns:
            Tensor: Of the shape of ``query``.
        """
        for name, given in (
            ("reference_points", reference_points),
            ("spatial_shapes", spatial_shapes),
        ):
            if given is None:
                refuse(f"{name} must be given", None, NAME)
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        N, Q, _ = query.shape
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        samples = (N, Q, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        weights = self.attention_weights(query).view(*samples[:3], -1).softmax(-1).view(samples)
        around = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            sizes = torch.as_tensor(spatial_shapes, device=query.device).flip(-1)
            locations = around + offsets / sizes[:, None]
        elif reference_points.shape[-1] == 4:
            locations = around[..., :2] + offsets / self.num_points * around[..., 2:] * 0.5
        else:
            refuse("reference_points must have 2 or 4 numbers", reference_points.shape[-1], NAME)
        out = multi_scale_deformable_attention(value, spatial_shapes, locations, weights)
        out = self.output_proj(out)
        return self.dropout(out if self.batch_first else out.transpose(0, 1)) + identity
