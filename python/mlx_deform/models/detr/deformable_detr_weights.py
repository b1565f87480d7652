"""Names of Deformable DETR's weights in checkpoints, and the sizes that the weights tell."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...nn.checkpoints import to_mlx
from .backbones.plain_resnet import PlainResNetConfig
from .deformable_detr_config import DeformableDETRConfig, coco91
from .rt_detr_weights import LAYER, RENAMED, count, inferred_resnet, renamed, split_attention

State = Mapping[str, Any]

BACKBONE = "model.backbone.conv_encoder.model"

# Of the official repository's files, by models/deformable_detr.py and deformable_transformer.py.
OFFICIAL = (
    (r"^backbone\.0\.body\.", f"{BACKBONE}."),
    (r"^backbone\.1\.(row|col)_embed\.", r"model.position_embedding.\1_embeddings."),
    (r"position_embedding\.col_", "position_embedding.column_"),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^input_proj\.", "model.input_proj."),
    (r"^transformer\.", "model."),
    *LAYER,
    (r"\.encoder\.layers\.(\d+)\.norm1\.", r".encoder.layers.\1.self_attn_layer_norm."),
    (r"\.encoder\.layers\.(\d+)\.norm2\.", r".encoder.layers.\1.final_layer_norm."),
    (r"\.decoder\.layers\.(\d+)\.norm1\.", r".decoder.layers.\1.encoder_attn_layer_norm."),
    (r"\.decoder\.layers\.(\d+)\.norm2\.", r".decoder.layers.\1.self_attn_layer_norm."),
    (r"\.decoder\.layers\.(\d+)\.norm3\.", r".decoder.layers.\1.final_layer_norm."),
)

# transformers 5's modules, then timm's and torchvision's ResNets, which the hub's files have.
HUB = (
    (r"^model\.backbone\.model\.", f"{BACKBONE}."),
    *RENAMED,
    (rf"^{BACKBONE}\.conv1\.", f"{BACKBONE}.embedder.embedder.convolution."),
    (rf"^{BACKBONE}\.bn1\.", f"{BACKBONE}.embedder.embedder.normalization."),
    (
        rf"^{BACKBONE}\.layer(\d)\.(\d+)\.",
        lambda match: f"{BACKBONE}.encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.",
    ),
    (
        r"(\.layers\.\d+)\.conv(\d)\.",
        lambda match: f"{match[1]}.layer.{int(match[2]) - 1}.convolution.",
    ),
    (
        r"(\.layers\.\d+)\.bn(\d)\.",
        lambda match: f"{match[1]}.layer.{int(match[2]) - 1}.normalization.",
    ),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)


def hub_names(state: State) -> dict[str, Any]:
    """The state dict of a file of the hub, of transformers' modules or of the official
    repository, with the model's names."""
    if any(name.startswith("transformer.") for name in state):
        state = renamed(split_attention(state), OFFICIAL)
    return placed_heads(renamed(state, HUB))


def placed_heads(state: State) -> dict[str, Any]:
    """The state dict with each head once, where the model has it.

    Files may have the heads in the decoder, at the root or in both places; where layers share
    one, once or once for each.
    """
    state = dict(state)
    two_stage = "model.enc_output.weight" in state
    refines = two_stage or any(name.startswith("model.decoder.bbox_embed.") for name in state)
    refines = refines or not equal_heads(state, "bbox_embed")
    for heads, in_decoder in (("class_embed", two_stage), ("bbox_embed", refines)):
        places = ("model.decoder.", "") if in_decoder else ("", "model.decoder.")
        for name in [name for name in state if name.startswith(f"{places[1]}{heads}.")]:
            array = state.pop(name)
            state.setdefault(places[0] + name.removeprefix(places[1]), array)
        if not refines:
            for name in repeated(state, heads):
                del state[name]
    if refines:
        # transformers 5 writes the classes' head once where layers refine boxes alone.
        layers = count(state, "model.decoder.bbox_embed")
        if count(state, "class_embed") == 1:
            for name in [name for name in state if name.startswith("class_embed.0.")]:
                for layer in range(1, layers):
                    state[name.replace(".0.", f".{layer}.", 1)] = state[name]
    return state


def repeated(state: State, heads: str) -> list[str]:
    """Names of the heads of layers beyond the first, at the root."""
    return [name for name in state if re.match(rf"{heads}\.[1-9]", name)]


def equal_heads(state: State, heads: str) -> bool:
    """Whether the heads of all layers are one and the same."""

    def first(name):
        return state.get(re.sub(r"\.\d+", ".0", name, count=1))

    return all(
        first(name) is not None
        and mx.array_equal(to_mlx(name, state[name]), to_mlx(name, first(name))).item()
        for name in repeated(state, heads)
    )


def inferred(state: State) -> DeformableDETRConfig:
    """The configuration that the shapes tell; what they don't is that of the published models."""
    two_stage = "model.enc_output.weight" in state
    levels, d_model = state["model.level_embed"].shape
    projections = [state[f"model.input_proj.{level}.0.weight"].shape for level in range(levels)]
    maps = sum(shape[-1] == 1 for shape in projections)
    heads = "model.decoder.class_embed" if two_stage else "class_embed"
    labels = len(state[f"{heads}.0.weight"])
    queries = state.get("model.query_position_embeddings.weight")
    samples = DeformableDETRConfig.decoder_attention_heads * levels
    points = [
        len(state[f"model.{name}.attention_weights.weight"]) // samples
        for name in ("encoder.layers.0.self_attn", "decoder.layers.0.encoder_attn")
    ]
    names = coco91() if labels == 91 else {i: f"LABEL_{i}" for i in range(labels)}
    learned = "model.position_embedding.row_embeddings.weight" in state
    return DeformableDETRConfig(
        backbone_config=inferred_backbone(state, maps),
        id2label=names,
        num_queries=DeformableDETRConfig.num_queries if queries is None else len(queries),
        d_model=d_model,
        num_feature_levels=levels,
        encoder_layers=count(state, "model.encoder.layers"),
        encoder_ffn_dim=len(state["model.encoder.layers.0.fc1.weight"]),
        encoder_n_points=points[0],
        decoder_layers=count(state, "model.decoder.layers"),
        decoder_ffn_dim=len(state["model.decoder.layers.0.fc1.weight"]),
        decoder_n_points=points[1],
        position_embedding_type="learned" if learned else "sine",
        with_box_refine="model.decoder.bbox_embed.0.layers.0.weight" in state,
        two_stage=two_stage,
    )


def inferred_backbone(state: State, maps: int) -> PlainResNetConfig:
    """Of the ResNet whose last maps, so many, are used."""
    sizes = inferred_resnet(state, BACKBONE)
    return PlainResNetConfig(**{**vars(sizes), "out_indices": tuple(range(5 - maps, 5))})
