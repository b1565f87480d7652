"""The encoder of Deformable DETR: every pixel of every level looks around itself, on all levels.

"Deformable DETR", arXiv:2010.04159, section 4.1.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ...nn import MultiScaleDeformableAttention
from .deformable_detr_config import DeformableDETRConfig
from .pyramid import Pyramid
from .transformer import PostNormLayer


class DeformableEncoderLayer(PostNormLayer):
    """Deformable attention of pixels to pixels and a feed-forward network."""

    def __init__(self, config: DeformableDETRConfig):
        super().__init__(
            config.d_model,
            config.encoder_ffn_dim,
            config.activation_function,
            config.dropout,
            config.activation_dropout,
        )
        self.self_attn = MultiScaleDeformableAttention(
            config.d_model,
            config.encoder_attention_heads,
            config.num_feature_levels,
            config.encoder_n_points,
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)

    def __call__(
        self, x: mx.array, positions: mx.array, references: mx.array, pyramid: Pyramid
    ) -> mx.array:
        """x: (N, S, d_model). positions: (N or 1, S, d_model). references: (N or 1, S, L or 1, 2),
        where each pixel is, float32."""
        shapes, mask = pyramid.shapes, pyramid.mask
        sampled = self.self_attn(x + positions, references, x, shapes, mask)
        return self.feed_forward(self.self_attn_layer_norm(x + self.dropout(sampled)))


class DeformableEncoder(nn.Module):
    """Layers, one after another."""

    def __init__(self, config: DeformableDETRConfig):
        super().__init__()
        self.layers = [DeformableEncoderLayer(config) for _ in range(config.encoder_layers)]
        self.dropout = nn.Dropout(config.dropout)

    @property
    def step_count(self) -> int:
        return len(self.layers)

    def steps(self, x: mx.array, positions: mx.array, pyramid: Pyramid) -> Iterator[mx.array]:
        """The pixels (N, S, d_model) after each layer."""
        references = pyramid.on_maps(pyramid.centres)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, positions, references, pyramid)
            yield x
