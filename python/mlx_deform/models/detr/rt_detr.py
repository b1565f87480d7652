"""RT-DETR and RT-DETRv2: backbone, hybrid encoder, selection of queries, decoder.

"DETRs Beat YOLOs on Real-time Object Detection", arXiv:2304.08069; "RT-DETRv2",
arXiv:2407.17140. Names follow the files on the hub.
"""

import math
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ..layers import BatchNorm
from .backbones import BACKBONES
from .config import HybridConfig
from .decoder import Decoder
from .detector import Detector, check_pixels
from .hybrid_encoder import HybridEncoder
from .layers import FrozenBatchNorm, box_head, chain, flatten
from .outputs import DenoisingQueries, DetectorOutputs, LayerOutputs, split
from .pyramid import Pyramid
from .rt_detr_config import RTDETRConfig
from .selection import anchors, best, take

# The chance that a new model's heads give to every class, unless the configuration says.
PRIOR = 0.01


class ConvEncoder(nn.Module):
    """The backbone, under its name in the hub's files."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        norm = FrozenBatchNorm if config.freeze_backbone_batch_norms else BatchNorm
        backbone = BACKBONES[config.backbone_config.model_type].model
        self.model = backbone(config.backbone_config, norm)


def projection(in_channels: int, out_channels: int, eps: float, kernel_size: int = 1) -> list:
    """A convolution with batch normalisation; one of 3x3 halves the map."""
    stride, padding = (1, 0) if kernel_size == 1 else (2, 1)
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        BatchNorm(out_channels, eps),
    ]


class RTDETRModel(nn.Module):
    """The network without its name: from pictures to what the layers of the decoder predict.

    Subclasses build other parts in the same places.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        C, D = config.encoder_hidden_dim, config.d_model
        self.backbone = ConvEncoder(config)
        self.encoder_input_proj = [
            projection(channels, C, 1e-5) for channels in config.backbone_config.channels
        ]
        self.encoder = self.make_encoder(config)
        if config.num_denoising > 0:
            self.denoising_class_embed = nn.Embedding(config.num_labels + 1, D)
        if config.learn_initial_query:
            self.weight_embedding = nn.Embedding(config.num_queries, D)
        self.enc_output = [nn.Linear(D, D), nn.LayerNorm(D, config.layer_norm_eps)]
        self.enc_score_head = nn.Linear(D, config.num_labels)
        self.enc_bbox_head = box_head(D)
        self.decoder_input_proj = self.make_decoder_projections(config)
        self.decoder = self.make_decoder(config)
        self._config = config
        self.initialise()

    def make_encoder(self, config: HybridConfig) -> nn.Module:
        return HybridEncoder(config)

    def make_decoder(self, config: HybridConfig) -> nn.Module:
        return Decoder(config)

    def make_decoder_projections(self, config: HybridConfig) -> list[list]:
        D, eps = config.d_model, config.batch_norm_eps
        projections = [projection(channels, D, eps) for channels in config.decoder_in_channels]
        for level in range(len(projections), config.num_feature_levels):
            last = config.decoder_in_channels[-1] if level == len(projections) else D
            projections.append(projection(last, D, eps, kernel_size=3))
        return projections

    def initialise(self) -> None:
        """A new model finds every class unlikely, and leaves boxes where they are."""
        prior = self._config.initializer_bias_prior_prob or PRIOR
        bias = -math.log((1 - prior) / prior)
        xavier_uniform = nn.init.glorot_uniform()
        for head in (self.enc_score_head, *self.decoder.class_embed):
            head.bias = mx.full(head.bias.shape, bias)
        for head in (self.enc_bbox_head, *self.decoder.bbox_embed):
            final = head.layers[-1]
            final.weight, final.bias = mx.zeros_like(final.weight), mx.zeros_like(final.bias)
        for linear in (self.enc_output[0], *self.decoder.query_pos_head.layers):
            linear.weight = xavier_uniform(linear.weight)

    @property
    def step_count(self) -> int:
        parts = (self.backbone.model, self.encoder, self.decoder)
        return sum(part.step_count for part in parts) + len(self.encoder_input_proj) + 1

    def steps(
        self, pixels: mx.array, denoising: DenoisingQueries | None
    ) -> Iterator[mx.array | DetectorOutputs]:
        maps: list[mx.array] = []
        yield from self.backbone.model.steps(pixels, maps)
        for level, project in enumerate(self.encoder_input_proj):
            maps[level] = chain(project, maps[level])
            yield maps[level]
        yield from self.encoder.steps(maps)
        memory, shapes = flatten(self.project(maps))
        del maps
        yield memory

        queries, references, proposals = self.select(memory, shapes)
        blocked = None
        if denoising is not None:
            queries = mx.concatenate([self.embed(denoising.labels, memory.dtype), queries], axis=1)
            references = mx.concatenate([denoising.boxes, references], axis=1)
            blocked = denoising.blocked
        for output in self.decoder.steps(queries, references, memory, shapes, blocked):
            if isinstance(output, mx.array):
                yield output
        yield self.outputs(output, proposals, denoising)

    def project(self, maps: list[mx.array]) -> list[mx.array]:
        """The maps as the decoder sees them; those beyond the encoder's are made from the last."""
        sources = []
        for level, project in enumerate(self.decoder_input_proj):
            if level < len(maps):
                source = maps[level]
            else:
                source = maps[-1] if level == len(maps) else sources[-1]
            sources.append(chain(project, source))
        return sources

    def embed(self, labels: mx.array, dtype: mx.Dtype) -> mx.array:
        """Denoising queries of the labels; that of padding learns nothing."""
        queries = self.denoising_class_embed(labels)
        padding = (labels == self._config.num_labels)[..., None]
        return mx.where(padding, mx.stop_gradient(queries), queries).astype(dtype)

    def select(
        self, memory: mx.array, shapes: list[tuple[int, int]]
    ) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array]]:
        """The queries to begin with, their boxes' logits, and what the encoder proposes there."""
        boxes, valid = anchors(Pyramid(shapes))
        features = chain(self.enc_output, mx.where(valid, memory, 0))
        logits = self.enc_score_head(features)
        places = best(logits.max(axis=-1), self._config.num_queries)
        chosen = take(features, places)
        anchor = take(mx.broadcast_to(boxes, (len(memory), *boxes.shape[1:])), places)
        references = self.enc_bbox_head(chosen).astype(mx.float32) + anchor
        proposals = take(logits, places), mx.sigmoid(references)
        if self._config.learn_initial_query:
            chosen = mx.broadcast_to(self.weight_embedding.weight, chosen.shape)
        else:
            chosen = mx.stop_gradient(chosen)
        return chosen, mx.stop_gradient(references), proposals

    def outputs(
        self,
        predictions: LayerOutputs,
        proposals: tuple[mx.array, mx.array],
        denoising: DenoisingQueries | None,
    ) -> DetectorOutputs:
        copies, layers = split(predictions, denoising)
        return DetectorOutputs(
            layers.logits[:, -1], layers.boxes[:, -1], layers, proposals, denoising=copies
        )


class RTDETR(Detector):
    """Real-time detection transformer: finds and names the objects in pictures.

    Args:
        config (RTDETRConfig): The sizes, by default those of ``rtdetr_r50vd``; one of
            :class:`RTDETRv2Config` makes an RT-DETRv2. See :func:`config_of`.

    Parameters:
        Named as in the hub's files; see :func:`load_weights`.

    Call:
        ``model(pixels, mask=None, denoising=None)`` with ``pixels`` of shape ``(N, H, W, 3)``,
        ``H`` and ``W`` multiples of 32, colours in [0, 1], gives :class:`DetectorOutputs`.
        ``denoising`` are :class:`DenoisingQueries`, in training. ``mask`` must be None: pictures
        are resized, not padded.

    Raises:
        ValueError: If an argument breaks a rule.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_deform.models.detr import RTDETR, config_of
        >>> model = RTDETR(config_of("rtdetr_r18vd"))
        >>> model.eval()  # doctest: +ELLIPSIS
        RTDETR(...
        >>> outputs = model(mx.zeros((1, 320, 480, 3)))
        >>> outputs.logits.shape, outputs.boxes.shape
        ((1, 300, 80), (1, 300, 4))

    References:
        Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", arXiv:2304.08069; Lv et
        al., "RT-DETRv2", arXiv:2407.17140; github.com/lyuwenyu/RT-DETR.
    """

    def __init__(self, config: RTDETRConfig | None = None):
        super().__init__(config or RTDETRConfig())
        self.model = self.make_model(self.config)

    def make_model(self, config: HybridConfig) -> RTDETRModel:
        return RTDETRModel(config)

    @property
    def step_count(self) -> int:
        return self.model.step_count

    def steps(
        self,
        pixels: mx.array,
        mask: mx.array | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> Iterator[mx.array | DetectorOutputs]:
        check_pixels(pixels, self.config.feat_strides[-1])
        if mask is not None:
            raise ValueError(
                f"[{type(self).__name__}] mask must be None: pictures are resized, not padded"
            )
        yield from self.model.steps(pixels.astype(self.dtype), denoising)
