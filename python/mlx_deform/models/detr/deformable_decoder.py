"""The decoder of Deformable DETR: queries with places of their own look at padded maps.

"Deformable DETR", arXiv:2010.04159, section 4.1 and appendix A.4.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ...nn import MultiScaleDeformableAttention
from .boxes import inverse_sigmoid
from .decoder import DecoderLayer
from .deformable_detr_config import DeformableDETRConfig
from .layers import box_head
from .outputs import LayerOutputs
from .pyramid import Pyramid


def head_count(config: DeformableDETRConfig) -> int:
    """Of the classes, and of the boxes: one for each layer if layers refine, and one for the
    encoder in two stages; else all layers share one."""
    if not config.with_box_refine:
        return 1
    return config.decoder_layers + config.two_stage


def class_heads(config: DeformableDETRConfig) -> list[nn.Linear]:
    return [nn.Linear(config.d_model, config.num_labels) for _ in range(head_count(config))]


def box_heads(config: DeformableDETRConfig) -> list[nn.Module]:
    return [box_head(config.d_model) for _ in range(head_count(config))]


class DeformableDecoder(nn.Module):
    """Layers, and those heads that the published files have here.

    These are the heads of the boxes where layers refine, and those of the classes in two stages.
    """

    def __init__(self, config: DeformableDETRConfig):
        super().__init__()

        def attention():
            return MultiScaleDeformableAttention(
                config.d_model,
                config.decoder_attention_heads,
                config.num_feature_levels,
                config.decoder_n_points,
            )

        self.layers = [DecoderLayer(config, attention()) for _ in range(config.decoder_layers)]
        if config.with_box_refine:
            self.bbox_embed = box_heads(config)
        if config.two_stage:
            self.class_embed = class_heads(config)
        self._refines = config.with_box_refine

    @property
    def step_count(self) -> int:
        return len(self.layers)

    def steps(
        self,
        queries: mx.array,
        positions: mx.array,
        reference: mx.array,
        memory: mx.array,
        pyramid: Pyramid,
        class_embed: Sequence[nn.Module],
        bbox_embed: Sequence[nn.Module],
    ) -> Iterator[mx.array | LayerOutputs]:
        """The queries after each layer but the last; then what all layers predict.

        queries, positions: (N, Q, d_model). reference: points (x, y) or boxes (cx, cy, w, h) to
        begin with, in units of the picture, float32 of shape (N, Q, 2 or 4). class_embed,
        bbox_embed: the heads, one for all layers or one for each.
        """
        logits, boxes = [], []
        for index, layer in enumerate(self.layers):
            if logits:
                yield queries
            points = pyramid.on_maps(reference)
            queries = layer(queries, positions, points, memory, pyramid.shapes, mask=pyramid.mask)
            logits.append(class_embed[index % len(class_embed)](queries))
            change = bbox_embed[index % len(bbox_embed)](queries).astype(mx.float32)
            boxes.append(moved(reference, change))
            if self._refines:
                # Each layer learns from its own error alone.
                reference = mx.stop_gradient(boxes[-1])
        yield LayerOutputs(mx.stack(logits, axis=1), mx.stack(boxes, axis=1))


def moved(reference: mx.array, change: mx.array) -> mx.array:
    """Boxes (..., 4): the change is added to the logits of a point (..., 2) or box (..., 4)."""
    logits = inverse_sigmoid(reference)
    if reference.shape[-1] == 2:
        logits = mx.concatenate([logits, mx.zeros_like(logits)], axis=-1)
    return mx.sigmoid(change + logits)
