"""Configurations of D-FINE, and the published sizes."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .backbones.config import BackboneConfig
from .backbones.hgnet_v2 import HGNetV2Config
from .config import HybridConfig, labels_of


@dataclass(frozen=True)
class DFINEConfig(HybridConfig):
    """D-FINE (arXiv:2410.13842). The defaults are transformers', which no published model has."""

    model_type: ClassVar[str] = "d_fine"
    architecture: ClassVar[str] = "DFineForObjectDetection"
    default_backbone: ClassVar[str] = "hgnet_v2"

    backbone_config: BackboneConfig = field(default_factory=HGNetV2Config)
    weight_loss_fgl: float = 0.15
    weight_loss_ddf: float = 1.5
    # The decoder's layer that predicts in inference; those after it are of training alone.
    eval_idx: int = -1
    layer_scale: float = 1.0
    max_num_bins: int = 32
    reg_scale: float = 4.0
    up: float = 0.5
    depth_mult: float = 1.0
    top_prob_values: int = 4
    lqe_hidden_dim: int = 64
    lqe_layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.layer_scale != 1:
            raise ValueError(
                "[DFINEConfig] layer_scale must be 1, as in every published model; "
                f"got {self.layer_scale!r}"
            )
        if self.num_feature_levels != len(self.decoder_in_channels):
            raise ValueError(
                "[DFINEConfig] num_feature_levels must be the number of decoder_in_channels, "
                f"{len(self.decoder_in_channels)}; got {self.num_feature_levels}"
            )
        if not -self.decoder_layers <= self.eval_idx < self.decoder_layers:
            raise ValueError(
                "[DFINEConfig] eval_idx must be one of the decoder_layers, "
                f"{self.decoder_layers}; got {self.eval_idx}"
            )

    @property
    def eval_layers(self) -> int:
        """The number of the decoder's layers in inference."""
        return self.eval_idx % self.decoder_layers + 1

    def to_json(self) -> dict[str, Any]:
        # transformers takes no tuple for the points.
        settings = super().to_json()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


_B0 = HGNetV2Config(
    embedding_size=32,
    hidden_sizes=(128, 256, 512, 1024),
    stem_channels=(3, 16, 16),
    stage_in_channels=(16, 64, 256, 512),
    stage_mid_channels=(16, 32, 64, 128),
    stage_out_channels=(64, 256, 512, 1024),
    stage_num_blocks=(1, 1, 2, 1),
    stage_numb_of_layers=(3, 3, 3, 3),
    use_learnable_affine_block=True,
)
_B2 = HGNetV2Config(
    embedding_size=32,
    hidden_sizes=(192, 384, 768, 1536),
    stem_channels=(3, 24, 32),
    stage_in_channels=(32, 96, 384, 768),
    stage_mid_channels=(32, 64, 128, 256),
    stage_out_channels=(96, 384, 768, 1536),
    stage_numb_of_layers=(4, 4, 4, 4),
    use_learnable_affine_block=True,
)
_B4 = HGNetV2Config(embedding_size=32)
_B5 = HGNetV2Config(
    embedding_size=32,
    stem_channels=(3, 32, 64),
    stage_in_channels=(64, 128, 512, 1024),
    stage_mid_channels=(64, 128, 256, 512),
    stage_num_blocks=(1, 2, 5, 2),
)

# The sizes of transformers' conversion script.
SIZES = {
    "nano": DFINEConfig(
        backbone_config=replace(_B0, out_indices=(3, 4)),
        d_model=128,
        num_feature_levels=2,
        decoder_layers=3,
        decoder_ffn_dim=512,
        decoder_n_points=(6, 6),
        decoder_in_channels=(128, 128),
        encoder_hidden_dim=128,
        encoder_ffn_dim=512,
        encoder_in_channels=(512, 1024),
        encode_proj_layers=(1,),
        feat_strides=(16, 32),
        hidden_expansion=0.34,
        depth_mult=0.5,
    ),
    "small": DFINEConfig(
        backbone_config=_B0,
        decoder_layers=3,
        decoder_n_points=(3, 6, 3),
        encoder_in_channels=(256, 512, 1024),
        hidden_expansion=0.5,
        depth_mult=0.34,
    ),
    "medium": DFINEConfig(
        backbone_config=_B2,
        decoder_layers=4,
        decoder_n_points=(3, 6, 3),
        encoder_in_channels=(384, 768, 1536),
        depth_mult=0.67,
    ),
    "large": DFINEConfig(backbone_config=_B4, decoder_n_points=(3, 6, 3)),
    "xlarge": DFINEConfig(
        backbone_config=_B5,
        decoder_n_points=(3, 6, 3),
        decoder_in_channels=(384, 384, 384),
        encoder_hidden_dim=384,
        encoder_ffn_dim=2048,
    ),
}

PUBLISHED = {f"dfine-{size}-coco": config for size, config in SIZES.items()}
# Trained on Objects365 first; the sizes are the same.
PUBLISHED |= {
    f"dfine-{size}-obj2coco{epochs}": SIZES[size]
    for size, epochs in (("small", ""), ("medium", ""), ("large", "-e25"), ("xlarge", ""))
}
PUBLISHED |= {
    f"dfine-{size}-obj365": replace(SIZES[size], id2label=labels_of({"num_labels": 366}))
    for size in ("small", "medium", "large", "xlarge")
}
# By the letters of the paper.
PUBLISHED |= {f"dfine-{size[0]}": config for size, config in SIZES.items()}
