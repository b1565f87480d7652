"""The decoder: queries look at the maps around their boxes, and refine the boxes layer by layer.

"Deformable DETR", arXiv:2010.04159, section 4 and appendix A.4.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ...nn import MultiScaleDeformableAttention
from .boxes import inverse_sigmoid
from .config import DetectorConfig, HybridConfig
from .layers import MLP, box_head
from .outputs import LayerOutputs
from .transformer import PostNormLayer, SelfAttention

Shapes = Sequence[tuple[int, int]]


class DecoderLayer(PostNormLayer):
    """Attention among the queries, deformable attention to the maps, a feed-forward network.

    Args:
        config (DetectorConfig): The sizes.
        attention (MultiScaleDeformableAttention): The layer that looks at the maps.
    """

    def __init__(self, config: DetectorConfig, attention: MultiScaleDeformableAttention):
        super().__init__(
            config.d_model,
            config.decoder_ffn_dim,
            config.decoder_activation_function,
            config.dropout,
            config.activation_dropout,
            config.layer_norm_eps,
        )
        self.self_attn = SelfAttention(config.d_model, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.encoder_attn = attention
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps)

    def __call__(
        self,
        queries: mx.array,
        positions: mx.array,
        references: mx.array,
        memory: mx.array,
        shapes: Shapes,
        blocked: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        """queries, positions: (N, Q, d_model). references: (N, Q, L or 1, 2 or 4), float32.
        memory: (N, S, d_model), the maps of sizes ``shapes``. blocked: boolean (Q, Q), True where
        a query may not see another. mask: boolean (N, S), True where memory is padding."""
        attended = self.self_attn(queries, positions, blocked)
        queries = self.self_attn_layer_norm(queries + self.dropout(attended))
        sampled = self.encoder_attn(queries + positions, references, memory, shapes, mask)
        return self.feed_forward(self.after_sampling(queries, self.dropout(sampled)))

    def after_sampling(self, queries: mx.array, sampled: mx.array) -> mx.array:
        return self.encoder_attn_layer_norm(queries + sampled)


def deformable_attention(config: HybridConfig) -> MultiScaleDeformableAttention:
    """The attention of a decoder's layer to the maps."""
    return MultiScaleDeformableAttention(
        config.d_model,
        config.decoder_attention_heads,
        config.num_feature_levels,
        config.decoder_n_points,
        method=config.method,
        offset_scale=config.decoder_offset_scale,
    )


class Decoder(nn.Module):
    """Layers, each with its heads: of the classes' logits and of the change of the box."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        layers = range(config.decoder_layers)
        self.layers = [DecoderLayer(config, deformable_attention(config)) for _ in layers]
        self.query_pos_head = MLP([4, 2 * config.d_model, config.d_model])
        self.class_embed = [nn.Linear(config.d_model, config.num_labels) for _ in layers]
        self.bbox_embed = [box_head(config.d_model) for _ in layers]

    @property
    def step_count(self) -> int:
        return len(self.layers)

    def steps(
        self,
        queries: mx.array,
        references: mx.array,
        memory: mx.array,
        shapes: Shapes,
        blocked: mx.array | None = None,
    ) -> Iterator[mx.array | LayerOutputs]:
        """The queries after each layer but the last; then what all layers predict.

        references: float32 logits (N, Q, 4) of the boxes (cx, cy, w, h) to begin with.
        """
        logits, boxes = [], []
        reference = mx.sigmoid(references)
        heads = zip(self.layers, self.class_embed, self.bbox_embed, strict=True)
        for layer, class_head, refinement in heads:
            if logits:
                yield queries
            positions = self.query_pos_head(reference.astype(queries.dtype))
            queries = layer(queries, positions, reference[:, :, None], memory, shapes, blocked)
            change = refinement(queries).astype(mx.float32)
            boxes.append(mx.sigmoid(change + inverse_sigmoid(reference)))
            logits.append(class_head(queries))
            # Each layer learns from its own error alone.
            reference = mx.stop_gradient(boxes[-1])
        yield LayerOutputs(mx.stack(logits, axis=1), mx.stack(boxes, axis=1))
