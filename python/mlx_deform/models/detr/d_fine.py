"""D-FINE: RT-DETR's network whose boxes are refined edge by edge, as distributions.

Peng et al., "D-FINE", arXiv:2410.13842. Names follow the files on the hub.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ...nn import MultiScaleDeformableAttention
from .boxes import inverse_sigmoid
from .config import HybridConfig
from .d_fine_config import DFINEConfig
from .d_fine_layers import DFineEncoder, Gate, LocationQuality, bin_distances, move_edges
from .decoder import DecoderLayer, Shapes
from .layers import MLP, box_head
from .outputs import DenoisingQueries, DetectorOutputs, LayerOutputs, split
from .rt_detr import RTDETR, RTDETRModel, projection

# The range of half types, which sums are clipped to, and a bound of the positions.
LARGEST_HALF = 65504
LARGEST_POSITION = 10


class DFineDecoderLayer(DecoderLayer):
    """A decoder's layer with a gate behind its deformable attention, which has no projections."""

    def __init__(self, config: DFINEConfig):
        attention = MultiScaleDeformableAttention(
            config.d_model,
            config.decoder_attention_heads,
            config.num_feature_levels,
            config.decoder_n_points,
            value_proj=False,
            output_proj=False,
            method=config.method,
            offset_scale=config.decoder_offset_scale,
        )
        super().__init__(config, attention)
        del self.encoder_attn_layer_norm  # the gate has its own
        self.gateway = Gate(config.d_model)

    def after_sampling(self, queries: mx.array, sampled: mx.array) -> mx.array:
        return self.gateway(queries, sampled)

    def feed_forward(self, x: mx.array) -> mx.array:
        x = x + self.fc2(self._activation(self.fc1(x)))
        return self.final_layer_norm(mx.clip(x, -LARGEST_HALF, LARGEST_HALF))


class DFineDecoder(nn.Module):
    """Layers that refine, one after another, the distributions of the edges of each box.

    Parameters ``up`` and ``reg_scale`` say where the bins of a distribution are; they are a
    checkpoint's and don't learn.
    """

    def __init__(self, config: DFINEConfig):
        super().__init__()
        D, layers = config.d_model, range(config.decoder_layers)
        self.layers = [DFineDecoderLayer(config) for _ in layers]
        self.query_pos_head = MLP([4, 2 * D, D])
        self.class_embed = [nn.Linear(D, config.num_labels) for _ in layers]
        self.bbox_embed = [MLP([D, D, D, 4 * (config.max_num_bins + 1)]) for _ in layers]
        self.pre_bbox_head = box_head(D)
        self.lqe_layers = [LocationQuality(config) for _ in layers]
        self.up = mx.array([config.up])
        self.reg_scale = mx.array([config.reg_scale])
        self._bins = config.max_num_bins
        self._eval_layers = config.eval_layers
        self.freeze_bins()

    def freeze_bins(self) -> None:
        self.freeze(recurse=False, keys=["up", "reg_scale"])

    @property
    def step_count(self) -> int:
        return len(self.layers) if self.training else self._eval_layers

    def steps(
        self,
        queries: mx.array,
        references: mx.array,
        memory: mx.array,
        shapes: Shapes,
        blocked: mx.array | None = None,
    ) -> Iterator[mx.array | tuple[LayerOutputs, LayerOutputs]]:
        """The queries after each layer but the last; then all layers' predictions, and before
        them the first boxes, of the first layer, with its logits.

        references: float32 logits (N, Q, 4) of the boxes (cx, cy, w, h) to begin with.
        """
        distances = bin_distances(self._bins, self.up, self.reg_scale)
        logits, boxes, corners = [], [], []
        reference = mx.sigmoid(references)
        before = initial = None
        for index in range(self.step_count):
            if index:
                yield queries
            positions = self.query_pos_head(reference.astype(queries.dtype))
            positions = mx.clip(positions, -LARGEST_POSITION, LARGEST_POSITION)
            queries = self.layers[index](
                queries, positions, reference[:, :, None], memory, shapes, blocked
            )
            scores = self.class_embed[index](queries)
            if index == 0:
                change = self.pre_bbox_head(queries).astype(mx.float32)
                first = mx.sigmoid(change + inverse_sigmoid(reference))
                initial = LayerOutputs(scores[:, None], first[:, None])
                first = mx.stop_gradient(first)

            refined = queries if before is None else queries + before
            change = self.bbox_embed[index](refined).astype(mx.float32)
            corners.append(corners[-1] + change if corners else change)
            distributions = mx.softmax(mx.unflatten(corners[-1], -1, (4, -1)), axis=-1)
            boxes.append(move_edges(first, distributions @ distances, self.reg_scale))
            logits.append(scores + self.lqe_layers[index](distributions, queries.dtype))
            # Each layer learns from its own error, but for the distributions, which add up.
            reference = mx.stop_gradient(boxes[-1])
            before = mx.stop_gradient(queries)
        layers = (mx.stack(arrays, axis=1) for arrays in (logits, boxes, corners))
        firsts = mx.stack([first] * len(boxes), axis=1)
        yield initial, LayerOutputs(*layers, references=firsts)


class DFineModel(RTDETRModel):
    """The network of RT-DETR with D-FINE's encoder and decoder."""

    def make_encoder(self, config: HybridConfig) -> nn.Module:
        return DFineEncoder(config)

    def make_decoder(self, config: HybridConfig) -> nn.Module:
        return DFineDecoder(config)

    def make_decoder_projections(self, config: HybridConfig) -> list[list]:
        D, last = config.d_model, config.decoder_in_channels[-1]
        return [
            [] if last == D else projection(last, D, config.batch_norm_eps)
            for _ in config.decoder_in_channels
        ]

    def initialise(self) -> None:
        super().initialise()
        final = self.decoder.pre_bbox_head.layers[-1]
        final.weight, final.bias = mx.zeros_like(final.weight), mx.zeros_like(final.bias)

    def outputs(
        self,
        predictions: tuple[LayerOutputs, LayerOutputs],
        proposals: tuple[mx.array, mx.array],
        denoising: DenoisingQueries | None,
    ) -> DetectorOutputs:
        initial, layers = predictions
        outputs = super().outputs(layers, proposals, denoising)
        outputs.initial_denoising, outputs.initial = split(initial, denoising)
        return outputs


class DFINE(RTDETR):
    """D-FINE: finds and names the objects in pictures.

    Args:
        config (DFINEConfig): The sizes, by default those of D-FINE-L. See :func:`config_of`.

    Parameters:
        Named as in the hub's files; see :func:`load_weights`.

    Call:
        As of :class:`RTDETR`. The outputs have ``layers.corners`` of shape
        ``(N, layers, Q, 4 * (max_num_bins + 1))``, ``layers.references`` and ``initial`` besides.

    Raises:
        ValueError: If an argument breaks a rule.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_deform.models.detr import DFINE, config_of
        >>> model = DFINE(config_of("dfine-nano-coco"))
        >>> model.eval()  # doctest: +ELLIPSIS
        DFINE(...
        >>> outputs = model(mx.zeros((1, 320, 480, 3)))
        >>> outputs.logits.shape, outputs.boxes.shape
        ((1, 300, 80), (1, 300, 4))

    References:
        Peng et al., "D-FINE: Redefine Regression Task of DETRs as Fine-grained Distribution
        Refinement", arXiv:2410.13842; github.com/Peterande/D-FINE.
    """

    def __init__(self, config: DFINEConfig | None = None):
        super().__init__(config or DFINEConfig(decoder_n_points=(3, 6, 3)))

    def make_model(self, config: DFINEConfig) -> DFineModel:
        return DFineModel(config)

    def unfreeze(self, *args, **kwargs) -> "DFINE":
        super().unfreeze(*args, **kwargs)
        self.model.decoder.freeze_bins()
        return self
