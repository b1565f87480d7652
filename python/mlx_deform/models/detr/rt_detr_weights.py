"""Names of RT-DETR's weights in checkpoints, and the sizes that the weights tell."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...nn.checkpoints import to_mlx
from .backbones.resnet import ResNetConfig
from .config import labels_of
from .labels import COCO
from .rt_detr_config import RTDETRConfig, RTDETRv2Config

# What transformers 5 calls its modules, and the names in the hub's files and in ours.
RENAMED = (
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"\.encoder\.aifi\.", ".encoder.encoder."),
)
# What every family's official repository calls parts of a transformer layer.
LAYER = (
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.linear([12])\.", r".fc\1."),
)
# Of the official repositories' files, of RT-DETR, RT-DETRv2 and D-FINE alike.
OFFICIAL = (
    (r"^decoder\.(enc_|denoising_)", r"model.\1"),
    (r"^(en|de)coder\.input_proj\.", r"model.\1coder_input_proj."),
    (r"^decoder\.tgt_embed\.", "model.weight_embedding."),
    (r"^decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"^decoder\.(decoder\.)?", "model.decoder."),
    (r"^(backbone|encoder)\.", r"model.\1."),
    (r"^model\.(enc_output|\w+_input_proj\.\d)\.(conv|proj)\.", r"model.\1.0."),
    (r"^model\.(enc_output|\w+_input_proj\.\d)\.norm\.", r"model.\1.1."),
    (r"^(model\.backbone\..+)\.conv\.(\w+)$", r"\1.convolution.\2"),
    (r"^(model\.backbone\..+)\.(?:bn|norm)\.(\w+)$", r"\1.normalization.\2"),
    *LAYER,
    (r"(layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(layers\.\d+)\.norm[23]\.", r"\1.final_layer_norm."),
)
# What RT-DETR and RT-DETRv2 have alone: the ResNet, by src/nn/backbone/presnet.py.
RESNET = (
    (
        r"^model\.backbone\.conv1\.conv1_(\d)\.",
        lambda match: f"model.backbone.model.embedder.embedder.{int(match[1]) - 1}.",
    ),
    (
        r"^model\.backbone\.res_layers\.(\d)\.blocks\.",
        r"model.backbone.model.encoder.stages.\1.layers.",
    ),
    (r"\.branch2([abc])\.", lambda match: f".layer.{'abc'.index(match[1])}."),
    (r"\.short\.conv\.", ".shortcut.1."),
    (r"\.short\.", ".shortcut."),
    (r"\.num_points_scale$", ".n_points_scale"),
)
# Heads that files hold twice, at the model's root and in its decoder.
HEADS = ("class_embed.", "bbox_embed.")


def renamed(state: Mapping[str, Any], rules: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The state dict with regular expressions replaced in its names, one after another."""

    def new(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return {new(name): array for name, array in state.items()}


def single_heads(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with heads in the decoder alone, where a file may have them twice."""
    single = {name: array for name, array in state.items() if not name.startswith(HEADS)}
    for name, array in state.items():
        if name.startswith(HEADS):
            single.setdefault(f"model.decoder.{name}", array)
    return single


def split_attention(state: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's attention has queries, keys and values in one matrix."""
    split = {}
    for name, array in state.items():
        layer, joined, kind = name.partition(".in_proj_")
        if not joined:
            split[name] = array
            continue
        parts = mx.split(to_mlx(name, array), 3)
        for part, projection in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
            split[f"{layer}.{projection}.{kind}"] = part
    return split


def is_official(state: Mapping[str, Any]) -> bool:
    """Whether it is the state dict of an official repository with a hybrid encoder."""
    return any(name.startswith("decoder.decoder.") for name in state)


def hub_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a file of the hub, of transformers' modules or of the official
    repository, with the model's names."""
    if is_official(state):
        state = renamed(split_attention(state), OFFICIAL + RESNET)
    return single_heads(renamed(state, RENAMED))


def count(state: Mapping[str, Any], prefix: str) -> int:
    """The number of entries of a list of modules."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for name in state if (match := pattern.match(name))), default=-1)


def inferred_resnet(state: Mapping[str, Any], prefix: str) -> ResNetConfig:
    """The sizes of a ResNet-D, or of a plain ResNet: its stem is one convolution."""
    stem = f"{prefix}.embedder.embedder"
    stem = f"{stem}.2" if f"{stem}.2.convolution.weight" in state else stem
    stages = f"{prefix}.encoder.stages"
    depths = [count(state, f"{stages}.{i}.layers") for i in range(count(state, stages))]
    convolutions = count(state, f"{stages}.0.layers.0.layer")
    last = f"layers.0.layer.{convolutions - 1}.convolution.weight"
    return ResNetConfig(
        embedding_size=len(state[f"{stem}.convolution.weight"]),
        hidden_sizes=tuple(len(state[f"{stages}.{i}.{last}"]) for i in range(len(depths))),
        depths=tuple(depths),
        layer_type="bottleneck" if convolutions == 3 else "basic",
    )


def labels_told(count: int) -> dict[str, Any]:
    """The setting of so many classes: COCO's, or without names."""
    return {} if count == len(COCO) else {"id2label": labels_of({"num_labels": count})}


def inferred(state: Mapping[str, Any]) -> RTDETRConfig:
    """The configuration that the shapes tell; what they don't is that of the published models."""
    backbone = inferred_resnet(state, "model.backbone.model")
    scales = "model.decoder.layers.0.encoder_attn.n_points_scale"
    attention = state["model.decoder.layers.0.encoder_attn.attention_weights.weight"]
    levels = count(state, "model.decoder_input_proj")
    labels, d_model = state["model.enc_score_head.weight"].shape
    heads, samples = 8, len(attention)
    if scales in state:
        heads = samples // len(state[scales])
    hidden = state["model.encoder.fpn_blocks.0.conv1.conv.weight"].shape
    encoder_dim = hidden[1] // 2
    maps = count(state, "model.encoder_input_proj")
    attended = count(state, "model.encoder.encoder")
    queries = state.get("model.weight_embedding.weight")
    return (RTDETRv2Config if scales in state else RTDETRConfig)(
        backbone_config=backbone,
        num_queries=RTDETRConfig.num_queries if queries is None else len(queries),
        d_model=d_model,
        num_feature_levels=levels,
        decoder_layers=count(state, "model.decoder.layers"),
        decoder_ffn_dim=len(state["model.decoder.layers.0.fc1.weight"]),
        decoder_attention_heads=heads,
        decoder_n_points=samples // heads // levels,
        decoder_in_channels=tuple(
            state[f"model.decoder_input_proj.{i}.0.weight"].shape[1] for i in range(maps)
        ),
        encoder_in_channels=backbone.channels,
        encoder_hidden_dim=encoder_dim,
        encode_proj_layers=tuple(range(maps - attended, maps)),
        encoder_layers=count(state, "model.encoder.encoder.0.layers"),
        encoder_ffn_dim=len(state["model.encoder.encoder.0.layers.0.fc1.weight"]),
        hidden_expansion=hidden[0] / encoder_dim,
        learn_initial_query=queries is not None,
        num_denoising=100 if "model.denoising_class_embed.weight" in state else 0,
        **labels_told(labels),
    )
