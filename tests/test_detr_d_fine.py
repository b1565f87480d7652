"""D-FINE beside transformers': predictions, gradients, weights, half types."""

import dataclasses
import functools
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from transformers.models.d_fine import modeling_d_fine

from detr_official import assert_reads_official, official_state
from detr_twin import (
    TOLERANCE,
    Recorder,
    assert_same_state,
    channels_first,
    hub_state,
    largest_difference,
    pictures,
    port,
    random_sum,
    randomise,
    twin,
)
from mlx_deform.models.detr import (
    DFINE,
    DFINEConfig,
    config_of,
    load_model,
    load_weights,
    model_of,
    read_config,
    save_model,
)
from mlx_deform.models.detr.backbones import BACKBONES
from mlx_deform.models.detr.d_fine_config import PUBLISHED
from mlx_deform.models.detr.d_fine_layers import bin_distances, move_edges
from mlx_deform.models.detr.d_fine_weights import hub_names
from mlx_deform.models.layers import BatchNorm, last
from mlx_deform.nn import load_torch_weights
from mlx_deform.nn.checkpoints import torch_weights

BACKBONE = {
    "model_type": "hgnet_v2",
    "embedding_size": 32,
    "hidden_sizes": [16, 24, 40, 56],
    "stem_channels": [3, 8, 12],
    "stage_in_channels": [12, 16, 24, 40],
    "stage_mid_channels": [6, 10, 14, 18],
    "stage_out_channels": [16, 24, 40, 56],
    "stage_num_blocks": [1, 2, 2, 1],
    "stage_numb_of_layers": [2, 3, 2, 2],
    "out_indices": [2, 3, 4],
}
AFFINE = {**BACKBONE, "use_learnable_affine_block": True}
SMALL = {
    "backbone_config": BACKBONE,
    "encoder_in_channels": [24, 40, 56],
    "encoder_hidden_dim": 48,
    "encoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_in_channels": [48, 48, 48],
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 56,
    "decoder_layers": 3,
    "decoder_n_points": [3, 6, 2],
    "hidden_expansion": 0.75,
    "depth_mult": 0.67,
    "max_num_bins": 12,
    "lqe_hidden_dim": 20,
    "num_queries": 23,
    "num_labels": 5,
    "num_denoising": 10,
}
NANO = {
    "backbone_config": {**AFFINE, "out_indices": [3, 4]},
    "encoder_in_channels": [40, 56],
    "decoder_in_channels": [32, 32],
    "encoder_hidden_dim": 32,
    "encode_proj_layers": [1],
    "num_feature_levels": 2,
    "decoder_n_points": [6, 5],
    "feat_strides": [16, 32],
}
CASES = {
    "projected": {},
    "nano": NANO,
    "discrete": {"decoder_method": "discrete", "decoder_n_points": 4},
    "settings": {
        "decoder_offset_scale": 0.7,
        "lqe_layers": 3,
        "top_prob_values": 3,
        "activation_function": "relu",
    },
}
SIZE = (96, 160)


@functools.cache
def twins(case):
    return twin(transformers.DFineConfig(**{**SMALL, **CASES[case]}))


def theirs_of(model, pixels):
    """All layers' predictions, which transformers' decoder gives in training alone."""
    model.model.decoder.training = True
    with torch.no_grad():
        outputs = model(channels_first(pixels))
    model.eval()
    return outputs


@pytest.mark.parametrize("settings", [BACKBONE, AFFINE], ids=["plain", "affine"])
def test_backbone(settings):
    config = transformers.HGNetV2Config(**settings)
    theirs = randomise(transformers.HGNetV2Backbone(config)).eval()
    family = BACKBONES["hgnet_v2"]
    ours = family.model(family.config.from_json(config.to_dict()), BatchNorm)
    load_torch_weights(ours, theirs.state_dict()).eval()
    pixels, maps = pictures(*SIZE, count=2), []
    steps = list(ours.steps(mx.array(pixels), maps))
    assert len(steps) == ours.step_count
    with torch.no_grad():
        want = theirs(channels_first(pixels)).feature_maps
    for got, expected in zip(maps, want, strict=True):
        assert largest_difference(got.transpose(0, 3, 1, 2), expected) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_predictions(case):
    theirs, ours = twins(case)
    pixels = pictures(*SIZE, count=2)
    want, got = theirs_of(theirs, pixels), ours(mx.array(pixels))
    pairs = (
        (got.layers.logits, want.intermediate_logits[:, 1:]),
        (got.layers.boxes, want.intermediate_reference_points[:, 1:]),
        (got.layers.corners, want.intermediate_predicted_corners),
        (got.layers.references, want.initial_reference_points),
        (got.initial.logits, want.intermediate_logits[:, :1]),
        (got.initial.boxes, want.intermediate_reference_points[:, :1]),
        (got.logits, want.logits),
        (got.boxes, want.pred_boxes),
        (got.encoder[1], want.enc_topk_bboxes),
    )
    for ours_, theirs_ in pairs:
        assert largest_difference(ours_, theirs_) <= TOLERANCE
    assert largest_difference(got.encoder[0], want.enc_topk_logits) <= 10 * TOLERANCE


def test_layers_of_inference():
    """transformers' decoder fails with an eval_idx of its own; its layers are the first ones."""
    theirs, whole = twins("projected")
    pixels = pictures(*SIZE)
    want = whole(mx.array(pixels)).layers
    config = dataclasses.replace(whole.config, eval_idx=1)
    ours = load_weights(model_of(config), theirs.state_dict()).eval()
    steps = list(ours.steps(mx.array(pixels)))
    assert len(steps) == ours.step_count == whole.step_count - 1
    assert mx.array_equal(steps[-1].logits, want.logits[:, 1])
    assert mx.array_equal(steps[-1].boxes, want.boxes[:, 1])
    assert ours.train()(mx.array(pixels)).layers.logits.shape[1] == 3


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes(case):
    theirs, ours = twins(case)
    assert_same_state(ours, theirs)


def test_bins_and_edges():
    up, scale = np.array([0.4]), np.array([-3.7])
    want = modeling_d_fine.weighting_function(12, torch.tensor(up), torch.tensor(scale))
    got = bin_distances(12, mx.array(up), mx.array(scale))
    assert np.allclose(got, want, atol=1e-6)
    rng = np.random.default_rng(0)
    boxes, distances = rng.random((3, 5, 4)), rng.standard_normal((3, 5, 4))
    want = modeling_d_fine.distance2bbox(
        torch.tensor(boxes), torch.tensor(distances), torch.tensor(scale)
    )
    got = move_edges(mx.array(boxes), mx.array(distances), mx.array(scale))
    assert np.allclose(got, want, atol=1e-6)


# ---------------------------------------------------------------------------
# Training

TARGETS = [
    {
        "class_labels": torch.tensor([1, 3, 2]),
        "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.5], [0.6, 0.5, 0.1, 0.2], [0.7, 0.2, 0.5, 0.3]]),
    },
    {"class_labels": torch.tensor([4]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2]])},
]


def theirs_in_training(got):
    return (
        got.intermediate_logits[:, 1:],
        got.intermediate_reference_points[:, 1:],
        got.intermediate_predicted_corners,
        got.intermediate_logits[:, :1],
        got.intermediate_reference_points[:, :1],
        got.enc_topk_logits,
        got.enc_topk_bboxes,
    )


def ours_in_training(got):
    def joined(copies, others, name):
        return mx.concatenate([getattr(copies, name), getattr(others, name)], axis=2)

    layers = (joined(got.denoising, got.layers, n) for n in ("logits", "boxes", "corners"))
    first = (joined(got.initial_denoising, got.initial, n) for n in ("logits", "boxes"))
    return (*layers, *first, *got.encoder)


def gradients_of_theirs(theirs, pixels):
    """Of a random sum of all that is predicted in training, by the hub's names."""
    theirs.train().zero_grad()
    random_sum(theirs_in_training(theirs.model(pixels, labels=TARGETS))).backward()
    parameters = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    return hub_names({n: gradient.clone().numpy() for n, gradient in parameters.items()})


def gradients_of_ours(ours, pixels, denoising):
    def loss(model):
        return random_sum(ours_in_training(model(pixels, denoising=denoising)))

    _, gradients = nn.value_and_grad(ours.train(), loss)(ours)
    names = {name for name, _ in tree_flatten(gradients)}
    return {n: np.array(a) for n, a in torch_weights(ours.update(gradients)).items() if n in names}


def test_gradients(monkeypatch):
    """With denoising queries: no farther from float64 than transformers' float32 is."""
    theirs, ours = twin(transformers.DFineConfig(**SMALL))
    torch.manual_seed(0)
    recorder = Recorder(modeling_d_fine, monkeypatch)
    pixels = pictures(*SIZE, count=2)
    single = gradients_of_theirs(theirs, channels_first(pixels))
    want = gradients_of_theirs(theirs.double(), channels_first(pixels).double())
    got = gradients_of_ours(ours, mx.array(pixels), recorder.queries)
    assert got.keys() == want.keys()
    # Some are zero but for rounding, as of a key's bias.
    floor = 1e-6 * max(np.linalg.norm(gradient) for gradient in want.values())

    def errors(gradients):
        return {
            name: np.linalg.norm(gradients[name] - gradient) / (np.linalg.norm(gradient) + floor)
            for name, gradient in want.items()
        }

    # Where the sign of an activation is a matter of rounding, float32 is far from the truth.
    ours_, theirs_ = errors(got), errors(single)
    worst = max(ours_, key=ours_.get)
    assert ours_[worst] <= 0.1, worst
    assert np.median(list(ours_.values())) <= 2 * np.median(list(theirs_.values()))
    heads = [error for name, error in ours_.items() if "decoder.layers.2." in name]
    assert np.median(heads) <= 3e-4


def test_what_does_not_learn():
    _, ours = twin(transformers.DFineConfig(**SMALL))
    for model in (ours, DFINE(ours.config)):
        model.unfreeze()
        names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        assert any(name.endswith("gateway.gate.weight") for name in names)
        for name in names:
            assert not name.endswith((".up", ".reg_scale", ".running_mean", ".running_var"))
            assert "normalization" not in name


def test_a_new_model_leaves_boxes():
    model = DFINE(DFINEConfig.from_json(SMALL)).eval()
    outputs = model(mx.array(pictures(*SIZE)))
    first = outputs.encoder[1][:, None]
    assert mx.allclose(outputs.initial.boxes, first, atol=1e-5)
    assert mx.allclose(
        outputs.layers.boxes, mx.broadcast_to(first, outputs.layers.boxes.shape), atol=1e-5
    )


# ---------------------------------------------------------------------------
# Types, compilation, steps


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types(dtype):
    theirs, _ = twins("nano")
    ours = port(theirs)
    pixels = mx.array(pictures(*SIZE))
    want = ours(pixels)
    got = ours.set_dtype(dtype)(pixels)
    assert ours.dtype == got.logits.dtype == got.layers.logits.dtype == dtype
    assert got.boxes.dtype == got.layers.boxes.dtype == got.layers.corners.dtype == mx.float32
    # Most queries are those of float32, if in another order.
    found = mx.abs(got.boxes[0, :, None] - want.boxes[0]).max(axis=-1).min(axis=-1)
    assert mx.sort(found)[len(found) // 2].item() < (0.01 if dtype == mx.float16 else 0.05)


def test_compiled_and_by_steps():
    _, ours = twins("nano")
    pixels = mx.array(pictures(*SIZE))

    def predict(pixels):
        outputs = ours(pixels)
        return outputs.logits, outputs.boxes

    want = predict(pixels)
    for got, expected in zip(mx.compile(predict)(pixels), want, strict=True):
        assert mx.allclose(got, expected, atol=1e-5)
    steps = list(ours.steps(pixels))
    assert len(steps) == ours.step_count
    assert all(isinstance(step, mx.array) for step in steps[:-1])
    assert mx.array_equal(last(steps).boxes, want[1])


# ---------------------------------------------------------------------------
# Configurations and weights


def test_configurations():
    theirs = transformers.DFineConfig(num_labels=80, id2label=config_of("dfine-l").id2label)
    assert DFINEConfig.from_json(theirs.to_dict()) == DFINEConfig()
    assert DFINEConfig.from_json({}) == DFINEConfig()
    for name, config in PUBLISHED.items():
        assert config_of(f"ustc-community/{name}") is config
        assert DFINEConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
        back = transformers.DFineConfig.from_dict(config.to_json()).to_dict()
        assert DFINEConfig.from_json(back) == config
    assert config_of("dfine-n") is config_of("dfine-nano-coco")
    assert config_of("dfine-small-obj365").num_labels == 366


@pytest.mark.parametrize("case", ["projected", "nano"])
def test_files(tmp_path, case):
    """save_pretrained's folder and ours; transformers reads ours."""
    theirs, ours = twins(case)
    pixels = pictures(*SIZE)
    want = ours(mx.array(pixels)).layers.logits
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_model(tmp_path / "theirs" / "model.safetensors")
    assert mx.array_equal(read(mx.array(pixels)).layers.logits, want)

    save_model(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours") == ours.config
    read = load_model(tmp_path / "ours")
    assert mx.array_equal(read(mx.array(pixels)).layers.logits, want)
    back = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "ours").eval()
    got = theirs_of(back, pixels).intermediate_logits[:, 1:]
    assert largest_difference(want, got) <= TOLERANCE


@pytest.mark.parametrize("case", ["projected", "nano"])
def test_sizes_without_a_configuration(tmp_path, case):
    theirs = transformers.DFineForObjectDetection(
        transformers.DFineConfig(**{**SMALL, **CASES[case]})
    )
    theirs.save_pretrained(tmp_path)
    want = read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    got = load_model(tmp_path).config
    for name in ("hidden_expansion", "depth_mult"):  # rounded to whole channels and blocks
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=0.05)
    # What no shape tells.
    unknown = ("num_queries", "num_denoising", "encoder_attention_heads")
    kept = (*unknown, "hidden_expansion", "depth_mult")
    assert dataclasses.replace(got, **{name: getattr(want, name) for name in kept}) == want


# Of networks that the code of github.com/Peterande/D-FINE builds.
OFFICIAL = (
    "backbone.stem.stem2a.conv.weight",
    "backbone.stem.stem4.bn.running_var",
    "backbone.stages.0.blocks.0.layers.1.conv.weight",
    "backbone.stages.1.downsample.bn.weight",
    "backbone.stages.2.blocks.1.layers.0.conv1.conv.weight",
    "backbone.stages.2.blocks.1.layers.0.conv2.bn.bias",
    "backbone.stages.3.blocks.0.aggregation.1.bn.running_mean",
    "encoder.input_proj.1.conv.weight",
    "encoder.input_proj.1.norm.running_mean",
    "encoder.encoder.0.layers.0.self_attn.in_proj_weight",
    "encoder.encoder.0.layers.0.linear2.bias",
    "encoder.lateral_convs.0.norm.running_var",
    "encoder.fpn_blocks.0.cv1.conv.weight",
    "encoder.fpn_blocks.0.cv2.0.conv1.norm.bias",
    "encoder.fpn_blocks.0.cv2.0.bottlenecks.0.conv2.conv.weight",
    "encoder.fpn_blocks.0.cv2.1.norm.weight",
    "encoder.pan_blocks.0.cv3.0.conv2.conv.weight",
    "encoder.pan_blocks.0.cv3.1.conv.weight",
    "encoder.pan_blocks.0.cv4.norm.running_var",
    "encoder.downsample_convs.0.0.cv1.conv.weight",
    "encoder.downsample_convs.0.0.cv2.norm.bias",
    "decoder.up",
    "decoder.reg_scale",
    "decoder.anchors",
    "decoder.valid_mask",
    "decoder.decoder.up",
    "decoder.decoder.reg_scale",
    "decoder.decoder.layers.2.self_attn.in_proj_bias",
    "decoder.decoder.layers.2.norm1.weight",
    "decoder.decoder.layers.2.cross_attn.num_points_scale",
    "decoder.decoder.layers.2.cross_attn.attention_weights.weight",
    "decoder.decoder.layers.2.gateway.gate.weight",
    "decoder.decoder.layers.2.gateway.norm.bias",
    "decoder.decoder.layers.2.norm3.bias",
    "decoder.decoder.lqe_layers.2.reg_conf.layers.1.weight",
    "decoder.denoising_class_embed.weight",
    "decoder.query_pos_head.layers.0.weight",
    "decoder.enc_output.proj.weight",
    "decoder.enc_output.norm.weight",
    "decoder.enc_score_head.bias",
    "decoder.enc_bbox_head.layers.0.weight",
    "decoder.dec_score_head.2.weight",
    "decoder.pre_bbox_head.layers.2.weight",
    "decoder.dec_bbox_head.2.layers.1.bias",
)


@pytest.mark.parametrize("case", ["projected", "nano"])
def test_official_names(tmp_path, case):
    theirs, ours = twins(case)
    known = OFFICIAL
    if case == "nano":
        known += (
            "backbone.stem.stem2b.lab.scale",
            "backbone.stages.2.blocks.0.layers.1.conv2.lab.bias",
        )
    missing = "encoder.pan_blocks.0.cv2.1.norm.bias", "model.encoder.pan_blocks.0.conv2.norm.bias"
    assert_reads_official(theirs, ours, tmp_path, known, missing)
    # As the published settings have it.
    state = {**official_state(theirs), "decoder.reg_scale": torch.tensor([8])}
    state["decoder.decoder.reg_scale"] = state["decoder.reg_scale"]
    scale = load_weights(model_of(ours.config), state).model.decoder.reg_scale
    assert scale.dtype == mx.float32
    assert scale.item() == 8


def test_errors():
    theirs, ours = twins("nano")
    state = dict(hub_state(theirs))
    state["surplus"] = state.pop("model.decoder.layers.1.gateway.gate.bias")
    with pytest.raises(ValueError, match=r"missing: 'model.decoder.layers.1.gate.*'surplus'"):
        load_weights(ours, state)
    state = {**hub_state(theirs), "model.decoder.up": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"decoder.up' must have shape \(1,\)"):
        load_weights(ours, state)
    with pytest.raises(ValueError, match="layer_scale must be 1"):
        DFINEConfig(layer_scale=2)
    with pytest.raises(ValueError, match="num_feature_levels must be the number of"):
        DFINEConfig(num_feature_levels=4)
    with pytest.raises(ValueError, match="eval_idx must be one of the decoder_layers, 6; got 6"):
        DFINEConfig(eval_idx=6)
    with pytest.raises(ValueError, match="mask must be None"):
        ours(mx.zeros((1, 96, 96, 3)), mask=mx.zeros((1, 96, 96), mx.bool_))
