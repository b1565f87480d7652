"""State dicts as the official repositories of RT-DETR, RT-DETRv2 and D-FINE save them."""

import mlx.core as mx
import pytest
import torch

from detr_twin import hub_state
from mlx_deform.models.detr import load_model, load_weights
from mlx_deform.models.detr.families import model_type_of
from mlx_deform.models.detr.weights import inferred_config
from mlx_deform.nn.checkpoints import torch_weights

UNITS = {"convolution": "conv", "normalization": "norm"}
LAYERS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {
        "self_attn_layer_norm": "norm1",
        "encoder_attn_layer_norm": "norm2",
        "final_layer_norm": "norm3",
        "encoder_attn": "cross_attn",
    },
}
HEADS = {"class_embed": "dec_score_head", "bbox_embed": "dec_bbox_head"}
# Of D-FINE's fusion: a block's sequences of two.
FUSION = {
    "conv1": ["cv1"],
    "csp_rep1": ["cv2", "0"],
    "conv2": ["cv2", "1"],
    "csp_rep2": ["cv3", "0"],
    "conv3": ["cv3", "1"],
    "conv4": ["cv4"],
}
MATRICES = ("q_proj", "k_proj", "v_proj")


def backbone_name(words):
    match words:
        case ["embedder", "embedder", number, *rest]:
            return ["conv1", f"conv1_{int(number) + 1}", *rest]
        case ["encoder", "stages", stage, "layers", layer, "layer", number, *rest]:
            return ["res_layers", stage, "blocks", layer, f"branch2{'abc'[int(number)]}", *rest]
        case ["encoder", "stages", stage, "layers", layer, "shortcut", "1", *rest]:
            return ["res_layers", stage, "blocks", layer, "short", "conv", *rest]
        case ["encoder", "stages", stage, "layers", layer, "shortcut", *rest]:
            return ["res_layers", stage, "blocks", layer, "short", *rest]
        case ["embedder", *rest]:  # HGNetV2
            return ["stem", *(word.replace("normalization", "bn") for word in rest)]
        case ["encoder", *rest]:
            return [word.replace("normalization", "bn") for word in rest]


def official_name(name, model_type):
    """The official name of one of the hub's; projections of attention stay apart."""
    named = ["0", "1"] if model_type == "rt_detr" else ["conv", "norm"]
    match name.split(".")[1:]:
        case ["backbone", "model", *words]:
            words = ["backbone", *(UNITS.get(word, word) for word in backbone_name(words))]
        case ["encoder_input_proj", level, place, last]:
            words = ["encoder", "input_proj", level, named[int(place)], last]
        case ["decoder_input_proj", level, place, last]:
            words = ["decoder", "input_proj", level, ["conv", "norm"][int(place)], last]
        case ["enc_output", place, last]:
            kind = place if model_type == "rt_detr" else ["proj", "norm"][int(place)]
            words = ["decoder", "enc_output", kind, last]
        case ["weight_embedding", last]:
            words = ["decoder", "tgt_embed", last]
        case ["decoder", "class_embed" | "bbox_embed" as head, *rest]:
            words = ["decoder", HEADS[head], *rest]
        case ["decoder", "layers" | "lqe_layers", *_] as words:
            words = ["decoder", *(LAYERS["decoder"].get(word, word) for word in words)]
        case ["encoder", "encoder", *_] as words:
            words = [LAYERS["encoder"].get(word, word) for word in words]
        case ["encoder", "fpn_blocks" | "pan_blocks" as blocks, number, unit, *rest]:
            unit = FUSION[unit] if model_type == "d_fine" else [unit]
            words = ["encoder", blocks, number, *unit, *rest]
        case ["encoder", "downsample_convs", number, unit, *rest] if model_type == "d_fine":
            words = ["encoder", "downsample_convs", number, "0", unit.replace("conv", "cv"), *rest]
        case ["encoder" | "decoder", *_] as words:
            pass
        case words:
            words = ["decoder", *words]
    return ".".join(words).replace(".fc", ".linear").replace(".n_points", ".num_points")


def official_state(theirs):
    """What the official code saves of a network with the weights of transformers' one."""
    model_type = theirs.config.model_type
    state = {}
    for name, tensor in hub_state(theirs).items():
        if not name.startswith("model."):  # a head that is there twice
            continue
        name = official_name(name, model_type)
        layer, _, projection = name.rpartition(".")[0].rpartition(".")
        if projection in MATRICES:
            name = f"{layer}.in_proj_{name.rpartition('.')[2]}"
            state.setdefault(name, {})[projection] = tensor
        else:
            state[name] = tensor
    state = {
        name: torch.cat([value[m] for m in MATRICES]) if isinstance(value, dict) else value
        for name, value in state.items()
    }
    if model_type != "rt_detr":
        state["decoder.anchors"] = torch.full((1, 8400, 4), torch.inf)
        state["decoder.valid_mask"] = torch.ones(1, 8400, 1, dtype=torch.bool)
    if model_type == "d_fine":
        for name in ("up", "reg_scale"):
            state[f"decoder.decoder.{name}"] = state[f"decoder.{name}"]
    return state


def assert_reads_official(theirs, ours, folder, known, surplus):
    """A file of the official code gives our model's weights, and what doesn't fit is named.

    known: names that the official code's models have. surplus: one for which the model has the
    hub's name, which is told to be missing without it.
    """
    state = official_state(theirs)
    assert not set(known) - set(state)
    old = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": old, "ema": {"module": state, "updates": 3}}, folder / "averaged.pth")
    torch.save({"model": state}, folder / "model.pth")
    want = torch_weights(ours)
    for file in ("averaged.pth", "model.pth"):
        got = torch_weights(load_model(folder / file, config=ours.config))
        assert got.keys() == want.keys()
        for name, array in want.items():
            assert mx.array_equal(got[name], array), name
    assert model_type_of(state) == theirs.config.model_type
    assert inferred_config(state) == inferred_config(hub_state(theirs))

    official, name = surplus
    state["surplus"] = state.pop(official)
    with pytest.raises(ValueError, match=f"missing: '{name}'; unexpected: 'surplus'"):
        load_weights(ours, state)
