"""Configurations of Deformable DETR, and the published models."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .backbones.plain_resnet import RESNETS, PlainResNetConfig
from .config import DetectorConfig
from .labels import COCO

# Numbers among COCO's 91 that none of the 80 classes has.
UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def coco91() -> dict[int, str]:
    """COCO's classes by COCO's own numbers, of which the published models have an output each."""
    names = iter(COCO)
    return {label: "N/A" if label in UNUSED else next(names) for label in range(91)}


@dataclass(frozen=True)
class DeformableDETRConfig(DetectorConfig):
    """Deformable DETR (arXiv:2010.04159). The defaults are those of ``deformable-detr``.

    with_box_refine: each layer of the decoder refines the boxes of the one before. two_stage:
    the encoder proposes the boxes to begin with, ``two_stage_num_proposals`` of them.
    """

    model_type: ClassVar[str] = "deformable_detr"
    architecture: ClassVar[str] = "DeformableDetrForObjectDetection"
    freeze_backbone_batch_norms: ClassVar[bool] = True

    backbone_config: PlainResNetConfig = field(default_factory=PlainResNetConfig)
    id2label: dict[int, str] = field(default_factory=coco91)
    num_feature_levels: int = 4
    encoder_layers: int = 6
    encoder_n_points: int = 4
    decoder_n_points: int = 4
    activation_function: str = "relu"
    position_embedding_type: str = "sine"
    dropout: float = 0.1
    with_box_refine: bool = False
    two_stage: bool = False
    two_stage_num_proposals: int = 300
    auxiliary_loss: bool = False
    # The matching of predictions to objects, and the losses.
    class_cost: float = 1
    bbox_cost: float = 5
    giou_cost: float = 2
    bbox_loss_coefficient: float = 5
    giou_loss_coefficient: float = 2
    focal_alpha: float = 0.25

    def __post_init__(self):
        # One activation serves encoder and decoder here.
        object.__setattr__(self, "decoder_activation_function", self.activation_function)
        if self.two_stage and not self.with_box_refine:
            raise ValueError(
                "[DeformableDETRConfig] with_box_refine must be True where two_stage is; got False"
            )
        if self.position_embedding_type not in ("sine", "learned"):
            raise ValueError(
                "[DeformableDETRConfig] position_embedding_type must be 'sine' or 'learned'; "
                f"got {self.position_embedding_type!r}"
            )

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "DeformableDETRConfig":
        if "id2label" not in json and "num_labels" not in json:
            json = {**json, "id2label": coco91()}
        return super().from_json({**json, "backbone_config": backbone_of(json)})

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "dilation": self.backbone_config.dilation}


def backbone_of(json: Mapping[str, Any]) -> dict[str, Any]:
    """The ``backbone_config`` of a ``config.json``, also where it names one of timm's instead."""
    backbone = json.get("backbone_config") or {"model_type": "timm_backbone"}
    if backbone["model_type"] != "timm_backbone":
        return backbone
    name = backbone.get("backbone") or json.get("backbone") or "resnet50"
    if name not in RESNETS:
        raise ValueError(
            f"[DeformableDETRConfig] backbone must be one of {', '.join(RESNETS)}; got {name!r}"
        )
    sizes = RESNETS[name]
    dilation = bool(json.get("dilation")) or backbone.get("output_stride") == 16
    single = json.get("num_feature_levels", 4) == 1
    return replace(sizes, dilation=dilation, out_indices=(4,) if single else (2, 3, 4)).to_json()


_SINGLE = DeformableDETRConfig(
    backbone_config=PlainResNetConfig(out_indices=(4,)), num_feature_levels=1
)
_DC5 = PlainResNetConfig(out_indices=(4,), dilation=True)

PUBLISHED = {
    "deformable-detr": DeformableDETRConfig(),
    "deformable-detr-with-box-refine": DeformableDETRConfig(with_box_refine=True),
    "deformable-detr-with-box-refine-two-stage": DeformableDETRConfig(
        with_box_refine=True, two_stage=True
    ),
    "deformable-detr-single-scale": _SINGLE,
    "deformable-detr-single-scale-dc5": replace(_SINGLE, backbone_config=_DC5),
}
