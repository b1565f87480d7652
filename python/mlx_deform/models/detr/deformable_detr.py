"""Deformable DETR: backbone, pyramid of maps, deformable encoder, decoder.

"Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159.
Names follow the files on the hub.
"""

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from .deformable_decoder import DeformableDecoder, box_heads, class_heads
from .deformable_detr_config import DeformableDETRConfig
from .deformable_encoder import DeformableEncoder
from .detector import Detector, check_pixels
from .layers import chain, flatten
from .outputs import DenoisingQueries, DetectorOutputs
from .positions import LearnedPositions, SinePositions, box_positions
from .pyramid import Pyramid
from .rt_detr import PRIOR, ConvEncoder
from .selection import anchors, best, take

# Groups of channels that are normalised together.
GROUPS = 32

# What a new model's heads start the logits of width and height with: small boxes.
SIZE_LOGIT = -2.0


class Backbone(nn.Module):
    """The backbone, under its name in the hub's files."""

    def __init__(self, config: DeformableDETRConfig):
        super().__init__()
        self.conv_encoder = ConvEncoder(config)


def projection(in_channels: int, out_channels: int, kernel_size: int = 1) -> list:
    """A convolution with group normalisation; one of 3x3 halves the map."""
    stride, padding = (1, 0) if kernel_size == 1 else (2, 1)
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding),
        nn.GroupNorm(GROUPS, out_channels, pytorch_compatible=True),
    ]


class DeformableDETRModel(nn.Module):
    """The network without its name: all but the heads that files have beside it."""

    def __init__(self, config: DeformableDETRConfig):
        super().__init__()
        D, levels = config.d_model, config.num_feature_levels
        self.backbone = Backbone(config)
        # A single level is the last map's.
        channels = config.backbone_config.channels[-levels:]
        smaller = [channels[-1], *[D] * levels][: levels - len(channels)]
        self.input_proj = [projection(count, D) for count in channels]
        self.input_proj += [projection(count, D, kernel_size=3) for count in smaller]
        learned = config.position_embedding_type == "learned"
        self.position_embedding = LearnedPositions(D) if learned else SinePositions(D)
        self.level_embed = mx.random.normal((levels, D))
        self.encoder = DeformableEncoder(config)
        self.decoder = DeformableDecoder(config)
        if config.two_stage:
            self.enc_output = nn.Linear(D, D)
            self.enc_output_norm = nn.LayerNorm(D)
            self.pos_trans = nn.Linear(2 * D, 2 * D)
            self.pos_trans_norm = nn.LayerNorm(2 * D)
        else:
            self.query_position_embeddings = nn.Embedding(config.num_queries, 2 * D)
            self.reference_points = nn.Linear(D, 2)
        self._config = config
        self.initialise()

    def initialise(self) -> None:
        """As the published models were before training; what was frozen then is frozen."""
        projections = [convolution for convolution, _ in self.input_proj]
        linears = [layer[name] for layer in self.layers for name in ("fc1", "fc2")]
        for layer in self.decoder.layers:
            linears += layer.self_attn.children().values()
        if self._config.two_stage:
            linears += [self.enc_output, self.pos_trans]
        else:
            projections.append(self.reference_points)
            self.query_position_embeddings.weight = mx.random.normal(
                self.query_position_embeddings.weight.shape
            )
        xavier_uniform = nn.init.glorot_uniform()
        for module in (*projections, *linears):
            module.weight = xavier_uniform(module.weight)
        for module in projections:
            module.bias = mx.zeros_like(module.bias)
        backbone = self.backbone.conv_encoder.model
        backbone.embedder.freeze()
        backbone.encoder.stages[0].freeze()

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.encoder.layers, *self.decoder.layers]

    @property
    def step_count(self) -> int:
        backbone = self.backbone.conv_encoder.model
        return backbone.step_count + len(self.input_proj) + len(self.layers) + 2

    def steps(
        self,
        pixels: mx.array,
        mask: mx.array | None,
        class_embed: Sequence[nn.Module],
        bbox_embed: Sequence[nn.Module],
    ) -> Iterator[mx.array | DetectorOutputs]:
        """class_embed, bbox_embed: the heads, of all layers or of each, the encoder's last."""
        maps: list[mx.array] = []
        yield from self.backbone.conv_encoder.model.steps(pixels, maps)
        yield from self.project(maps)
        pixels, shapes = flatten(maps)
        del maps
        pyramid = Pyramid(shapes, mask)
        positions = self.positions(pyramid).astype(pixels.dtype)
        yield positions
        for memory in self.encoder.steps(pixels, positions, pyramid):
            yield memory
        del pixels, positions

        proposals = None
        if self._config.two_stage:
            proposals = self.propose(memory, pyramid, class_embed[-1], bbox_embed[-1])
            queries, places, reference = self.selected(*proposals)
            proposals = proposals[0], mx.sigmoid(proposals[1])
        else:
            queries, places, reference = self.learned(len(memory))
        yield reference
        for layers in self.decoder.steps(
            queries, places, reference, memory, pyramid, class_embed, bbox_embed
        ):
            if isinstance(layers, mx.array):
                yield layers
        yield DetectorOutputs(layers.logits[:, -1], layers.boxes[:, -1], layers, proposals)

    def project(self, maps: list[mx.array]) -> Iterator[mx.array]:
        """Gives the list of maps the encoder's channels, and adds the smaller ones."""
        last, count = maps[-1], min(len(maps), len(self.input_proj))
        del maps[:-count]
        for level, project in enumerate(self.input_proj):
            if level < count:
                maps[level] = chain(project, maps[level])
            else:
                maps.append(chain(project, last if level == count else maps[-1]))
            yield maps[level]

    def positions(self, pyramid: Pyramid) -> mx.array:
        """Where every pixel is, and on which level: (N or 1, S, d_model)."""
        levels = zip(pyramid.inside, self.level_embed, strict=True)
        maps = [self.position_embedding(inside) + level for inside, level in levels]
        return flatten(maps)[0]

    def learned(self, count: int) -> tuple[mx.array, mx.array, mx.array]:
        """The queries of so many pictures, their positions, and their reference points."""
        places, queries = mx.split(self.query_position_embeddings.weight[None], 2, axis=-1)
        reference = mx.sigmoid(self.reference_points(places).astype(mx.float32))
        shape = (count, *places.shape[1:])
        points = mx.broadcast_to(reference, (*shape[:2], 2))
        return mx.broadcast_to(queries, shape), mx.broadcast_to(places, shape), points

    def propose(
        self, memory: mx.array, pyramid: Pyramid, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[mx.array, mx.array]:
        """Of every pixel the logits of the classes, (N, S, classes), and of a box, (N, S, 4)."""
        boxes, valid = anchors(pyramid)
        features = self.enc_output_norm(self.enc_output(mx.where(valid, memory, 0)))
        return class_head(features), box_head(features).astype(mx.float32) + boxes

    def selected(self, logits: mx.array, boxes: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The queries of the best proposals, their positions, and their boxes."""
        # The first output tells an object from none: all objects are of class 0 to the encoder.
        chosen = best(logits[..., 0], self._config.two_stage_num_proposals)
        reference = mx.sigmoid(mx.stop_gradient(take(boxes, chosen)))
        waves = box_positions(reference, self._config.d_model // 2).astype(logits.dtype)
        places, queries = mx.split(self.pos_trans_norm(self.pos_trans(waves)), 2, axis=-1)
        return queries, places, reference


class DeformableDETR(Detector):
    """Deformable DETR: finds and names the objects in pictures of any size.

    Args:
        config (DeformableDETRConfig): The sizes, by default those of ``deformable-detr``; with
            ``with_box_refine`` and ``two_stage`` it is one of the other variants. See
            :func:`config_of`.

    Parameters:
        Named as in the hub's files; see :func:`load_weights`. The backbone's stem and first
        stage are frozen, as in the published recipe; ``model.unfreeze()`` trains them too.

    Call:
        ``model(pixels, mask=None)`` with ``pixels`` of shape ``(N, H, W, 3)``, colours
        normalised with ImageNet's mean and deviation, and ``mask``, boolean, of shape
        ``(N, H, W)``: True where a picture is padded, at the bottom and on the right, to the
        batch's size. Gives :class:`DetectorOutputs`, with boxes in units of the picture without
        its padding; in two stages ``encoder`` is what was proposed at every pixel.

    Raises:
        ValueError: If an argument breaks a rule.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_deform.models.detr import DeformableDETR, config_of
        >>> model = DeformableDETR(config_of("deformable-detr"))
        >>> model.eval()  # doctest: +ELLIPSIS
        DeformableDETR(...
        >>> outputs = model(mx.zeros((1, 200, 300, 3)))
        >>> outputs.logits.shape, outputs.boxes.shape
        ((1, 300, 91), (1, 300, 4))

    References:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
        arXiv:2010.04159; github.com/fundamentalvision/Deformable-DETR.
    """

    def __init__(self, config: DeformableDETRConfig | None = None):
        super().__init__(config or DeformableDETRConfig())
        config = self.config
        self.model = DeformableDETRModel(config)
        if not config.two_stage:
            self.class_embed = class_heads(config)
        if not config.with_box_refine:
            self.bbox_embed = box_heads(config)
        self.initialise_heads()

    @property
    def heads(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Of the classes and of the boxes: one for all layers or for each, the encoder's last."""
        decoder, two_stage = self.model.decoder, self.config.two_stage
        return (
            decoder.class_embed if two_stage else self.class_embed,
            decoder.bbox_embed if self.config.with_box_refine else self.bbox_embed,
        )

    def initialise_heads(self) -> None:
        """A new model finds every class unlikely, and small boxes where its points are."""
        class_embed, bbox_embed = self.heads
        for head in class_embed:
            head.bias = mx.full(head.bias.shape, -math.log((1 - PRIOR) / PRIOR))
        for head in bbox_embed:
            final = head.layers[-1]
            final.weight, final.bias = mx.zeros_like(final.weight), mx.zeros_like(final.bias)
        if not self.config.two_stage:
            bbox_embed[0].layers[-1].bias[2:] = SIZE_LOGIT

    @property
    def step_count(self) -> int:
        return self.model.step_count

    def steps(
        self,
        pixels: mx.array,
        mask: mx.array | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> Iterator[mx.array | DetectorOutputs]:
        check_pixels(pixels, 1)
        shape = pixels.shape[:3]
        if mask is not None and (mask.dtype != mx.bool_ or mask.shape != shape):
            raise ValueError(
                f"[DeformableDETR] mask must be boolean, of shape {tuple(shape)}; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if denoising is not None:
            raise ValueError("[DeformableDETR] denoising must be None: it has no such queries")
        yield from self.model.steps(pixels.astype(self.dtype), mask, *self.heads)
