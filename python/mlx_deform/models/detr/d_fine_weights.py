"""Names of D-FINE's weights in checkpoints, and the sizes that the weights tell."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...nn.checkpoints import to_mlx
from .backbones.hgnet_v2 import HGNetV2Config
from .d_fine_config import DFINEConfig
from .rt_detr_weights import (
    OFFICIAL,
    RENAMED,
    count,
    is_official,
    labels_told,
    renamed,
    single_heads,
    split_attention,
)

# transformers 5 calls the linear layers of a feed-forward network so.
FEED_FORWARD = (
    (r"(layers\.\d+)\.mlp\.layers\.0\.", r"\1.fc1."),
    (r"(layers\.\d+)\.mlp\.layers\.1\.", r"\1.fc2."),
)

# What the official repository's files have alone, by src/nn/backbone/hgnetv2.py and
# src/zoo/dfine/hybrid_encoder.py.
HGNET = (
    (r"^model\.backbone\.stem\.", "model.backbone.model.embedder."),
    (r"^model\.backbone\.stages\.", "model.backbone.model.encoder.stages."),
    (r"(_blocks\.\d)\.cv([23])\.0\.", lambda match: f"{match[1]}.csp_rep{int(match[2]) - 1}."),
    (r"(_blocks\.\d)\.cv([1-4])\.(1\.)?", r"\1.conv\2."),
    (r"(downsample_convs\.\d)\.0\.cv", r"\1.conv"),
)


def hub_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a file of the hub, of transformers' modules or of the official
    repository, with the model's names."""
    if is_official(state):
        state = renamed(split_attention(state), OFFICIAL + HGNET)
        # Its settings make some of them integers.
        for name in ("model.decoder.up", "model.decoder.reg_scale"):
            if name in state:
                state[name] = to_mlx(name, state[name]).astype(mx.float32)
    return single_heads(renamed(state, RENAMED + FEED_FORWARD))


def inferred_hgnet(state: Mapping[str, Any], prefix: str, maps: int) -> HGNetV2Config:
    """The sizes of an HGNetV2 whose last maps are used."""
    stem, stages = f"{prefix}.embedder", f"{prefix}.encoder.stages"
    sizes = []
    for stage in range(count(state, stages)):
        at = f"{stages}.{stage}"
        block = f"{at}.blocks.0"
        light = f"{block}.layers.0.conv1.convolution.weight" in state
        first = f"{block}.layers.0.{'conv1.' if light else ''}convolution.weight"
        kernel = f"{block}.layers.0.{'conv2.' if light else ''}convolution.weight"
        sizes.append(
            {
                "stage_in_channels": state[first].shape[1],
                "stage_mid_channels": len(state[first]),
                "stage_out_channels": len(state[f"{block}.aggregation.1.convolution.weight"]),
                "stage_num_blocks": count(state, f"{at}.blocks"),
                "stage_downsample": f"{at}.downsample.convolution.weight" in state,
                "stage_light_block": light,
                "stage_kernel_size": state[kernel].shape[2],
                "stage_numb_of_layers": count(state, f"{block}.layers"),
            }
        )
    embedded, colours = state[f"{stem}.stem1.convolution.weight"].shape[:2]
    return HGNetV2Config(
        embedding_size=32,
        hidden_sizes=tuple(stage["stage_out_channels"] for stage in sizes),
        out_indices=tuple(range(len(sizes) + 1 - maps, len(sizes) + 1)),
        stem_channels=(colours, embedded, len(state[f"{stem}.stem4.convolution.weight"])),
        use_learnable_affine_block=f"{stem}.stem1.lab.scale" in state,
        **{name: tuple(stage[name] for stage in sizes) for name in sizes[0]},
    )


def points_of(scales: Any) -> tuple[int, ...]:
    """The points of each level: a level of n has n scales of 1 / n."""
    points, place = [], 0
    while place < len(scales):
        points.append(round(1 / scales[place].item()))
        place += points[-1]
    return tuple(points)


def inferred(state: Mapping[str, Any]) -> DFINEConfig:
    """The configuration that the shapes tell; what they don't is that of the published models."""
    decoder, encoder = "model.decoder", "model.encoder"
    attention = f"{decoder}.layers.0.encoder_attn"
    labels, d_model = state["model.enc_score_head.weight"].shape
    maps, attended = count(state, "model.encoder_input_proj"), count(state, f"{encoder}.encoder")
    backbone = inferred_hgnet(state, "model.backbone.model", maps)
    scales = state.get(f"{attention}.num_points_scale")
    points = points_of(scales) if scales is not None else (6, 6) if maps == 2 else (3, 6, 3)
    encoder_dim = state[f"{encoder}.lateral_convs.0.conv.weight"].shape[0]
    fusion, quality = f"{encoder}.fpn_blocks.0", f"{decoder}.lqe_layers.0.reg_conf.layers"
    hidden = len(state[f"{fusion}.conv2.conv.weight"])
    projected = state.get("model.decoder_input_proj.0.0.weight")
    decoder_in = d_model if projected is None else projected.shape[1]
    return DFINEConfig(
        backbone_config=backbone,
        d_model=d_model,
        num_feature_levels=maps,
        decoder_layers=count(state, f"{decoder}.layers"),
        decoder_ffn_dim=len(state[f"{decoder}.layers.0.fc1.weight"]),
        decoder_attention_heads=len(state[f"{attention}.attention_weights.weight"]) // sum(points),
        decoder_n_points=points,
        decoder_in_channels=(decoder_in,) * maps,
        encoder_in_channels=backbone.channels,
        encoder_hidden_dim=encoder_dim,
        encode_proj_layers=tuple(range(maps - attended, maps)),
        encoder_layers=count(state, f"{encoder}.encoder.0.layers"),
        encoder_ffn_dim=len(state[f"{encoder}.encoder.0.layers.0.fc1.weight"]),
        feat_strides=(8, 16, 32)[-maps:],
        hidden_expansion=2 * hidden / encoder_dim,
        depth_mult=count(state, f"{fusion}.csp_rep1.bottlenecks") / 3,
        max_num_bins=len(state[f"{decoder}.bbox_embed.0.layers.2.bias"]) // 4 - 1,
        reg_scale=state[f"{decoder}.reg_scale"].item(),
        up=state[f"{decoder}.up"].item(),
        top_prob_values=state[f"{quality}.0.weight"].shape[1] // 4 - 1,
        lqe_hidden_dim=len(state[f"{quality}.0.weight"]),
        lqe_layers=count(state, quality),
        num_denoising=100 if "model.denoising_class_embed.weight" in state else 0,
        **labels_told(labels),
    )
