"""Configurations of RT-DETR and RT-DETRv2, and the published sizes."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from .backbones.config import BackboneConfig
from .backbones.resnet import ResNetConfig
from .config import HybridConfig


@dataclass(frozen=True)
class RTDETRConfig(HybridConfig):
    """RT-DETR ("DETRs Beat YOLOs on Real-time Object Detection", arXiv:2304.08069).

    The defaults are those of ``rtdetr_r50vd``.
    """

    model_type: ClassVar[str] = "rt_detr"
    architecture: ClassVar[str] = "RTDetrForObjectDetection"

    backbone_config: BackboneConfig = field(default_factory=ResNetConfig)


@dataclass(frozen=True)
class RTDETRv2Config(RTDETRConfig):
    """RT-DETRv2 (arXiv:2407.17140): points per level, their scale and discrete sampling."""

    model_type: ClassVar[str] = "rt_detr_v2"
    architecture: ClassVar[str] = "RTDetrV2ForObjectDetection"


_SMALL = {
    "encoder_in_channels": (128, 256, 512),
    "hidden_expansion": 0.5,
}
_R18 = ResNetConfig(hidden_sizes=(64, 128, 256, 512), depths=(2, 2, 2, 2), layer_type="basic")
_R34 = replace(_R18, depths=(3, 4, 6, 3))
_LARGE = {
    "backbone_config": ResNetConfig(depths=(3, 4, 23, 3)),
    "encoder_ffn_dim": 2048,
    "encoder_hidden_dim": 384,
    "decoder_in_channels": (384, 384, 384),
}


def _sizes(cls: type, prefix: str) -> dict[str, RTDETRConfig]:
    """The sizes of transformers' conversion scripts, by their names on the hub."""
    return {
        f"{prefix}_r18vd": cls(backbone_config=_R18, decoder_layers=3, **_SMALL),
        f"{prefix}_r34vd": cls(backbone_config=_R34, decoder_layers=4, **_SMALL),
        f"{prefix}_r50vd_m": cls(hidden_expansion=0.5),
        f"{prefix}_r50vd": cls(),
        f"{prefix}_r101vd": cls(**_LARGE),
    }


PUBLISHED = _sizes(RTDETRConfig, "rtdetr") | _sizes(RTDETRv2Config, "rtdetr_v2")
# Trained on Objects365 first; the sizes are the same.
PUBLISHED |= {
    f"rtdetr_{r}_coco_o365": PUBLISHED[f"rtdetr_{r}"] for r in ("r18vd", "r50vd", "r101vd")
}
