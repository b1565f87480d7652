"""Configurations: the hub's ``config.json`` as dataclasses, by transformers' names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .backbones import BACKBONES
from .backbones.config import BackboneConfig, from_known
from .labels import COCO


def labels_of(json: Mapping[str, Any]) -> dict[int, str]:
    """The names of the classes in a ``config.json``, COCO's if it doesn't tell."""
    if "id2label" in json:
        return {int(label): name for label, name in json["id2label"].items()}
    if "num_labels" in json:
        return {label: f"LABEL_{label}" for label in range(json["num_labels"])}
    return dict(enumerate(COCO))


@dataclass(frozen=True)
class DetectorConfig:
    """What every family has. Names, meanings and defaults are transformers'."""

    model_type: ClassVar[str] = ""
    architecture: ClassVar[str] = ""
    default_backbone: ClassVar[str] = "rt_detr_resnet"

    backbone_config: BackboneConfig = field(default_factory=BackboneConfig)
    id2label: dict[int, str] = field(default_factory=lambda: dict(enumerate(COCO)))
    num_queries: int = 300
    d_model: int = 256
    num_feature_levels: int = 3
    decoder_layers: int = 6
    decoder_ffn_dim: int = 1024
    decoder_attention_heads: int = 8
    decoder_activation_function: str = "relu"
    encoder_layers: int = 1
    encoder_ffn_dim: int = 1024
    encoder_attention_heads: int = 8
    dropout: float = 0.0
    activation_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    auxiliary_loss: bool = True

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "DetectorConfig":
        """The configuration that a ``config.json`` holds; what else it holds is left out."""
        settings = {**json, "id2label": labels_of(json)}
        backbone = settings.pop("backbone_config", None) or {}
        kind = backbone.get("model_type", cls.default_backbone)
        if kind not in BACKBONES:
            raise ValueError(
                f"[detr] backbone_config.model_type must be one of {', '.join(BACKBONES)}; "
                f"got {kind!r}"
            )
        settings["backbone_config"] = BACKBONES[kind].config.from_json(backbone)
        return from_known(cls, settings)

    def to_json(self) -> dict[str, Any]:
        """What transformers reads, and :meth:`from_json`."""
        settings = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            **settings,
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "backbone_config": self.backbone_config.to_json(),
            "id2label": {str(label): name for label, name in self.id2label.items()},
            "label2id": {name: label for label, name in self.id2label.items()},
        }


@dataclass(frozen=True)
class HybridConfig(DetectorConfig):
    """What the families with a hybrid encoder share: RT-DETR, RT-DETRv2 and D-FINE."""

    freeze_backbone_batch_norms: bool = True
    batch_norm_eps: float = 1e-5
    initializer_bias_prior_prob: float | None = None
    encoder_hidden_dim: int = 256
    encoder_in_channels: tuple[int, ...] = (512, 1024, 2048)
    feat_strides: tuple[int, ...] = (8, 16, 32)
    encode_proj_layers: tuple[int, ...] = (2,)
    positional_encoding_temperature: float = 10000
    encoder_activation_function: str = "gelu"
    activation_function: str = "silu"
    normalize_before: bool = False
    hidden_expansion: float = 1.0
    decoder_in_channels: tuple[int, ...] = (256, 256, 256)
    decoder_n_points: int | tuple[int, ...] = 4
    decoder_offset_scale: float = 0.5
    decoder_method: str = "default"
    learn_initial_query: bool = False
    # Denoising queries, of training.
    num_denoising: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 1.0
    # The matching of predictions to objects, and the losses.
    matcher_alpha: float = 0.25
    matcher_gamma: float = 2.0
    matcher_class_cost: float = 2.0
    matcher_bbox_cost: float = 5.0
    matcher_giou_cost: float = 2.0
    use_focal_loss: bool = True
    focal_loss_alpha: float = 0.75
    focal_loss_gamma: float = 2.0
    weight_loss_vfl: float = 1.0
    weight_loss_bbox: float = 5.0
    weight_loss_giou: float = 2.0
    eos_coefficient: float = 1e-4

    def __post_init__(self):
        if self.normalize_before:
            raise ValueError(
                f"[{type(self).__name__}] normalize_before must be False, as in every published "
                "model; got True"
            )
        if self.decoder_method not in ("default", "discrete"):
            raise ValueError(
                f"[{type(self).__name__}] decoder_method must be 'default' or 'discrete'; "
                f"got {self.decoder_method!r}"
            )

    @property
    def method(self) -> str:
        """As :class:`mlx_deform.nn.MultiScaleDeformableAttention` calls decoder_method."""
        return "discrete" if self.decoder_method == "discrete" else "bilinear"
