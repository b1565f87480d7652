"""RT-DETR and RT-DETRv2 beside transformers': predictions, gradients, weights, half types."""

import dataclasses
import functools
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from transformers.models.rt_detr import modeling_rt_detr
from transformers.models.rt_detr_v2 import modeling_rt_detr_v2

from detr_official import assert_reads_official, official_state
from detr_twin import (
    TOLERANCE,
    Recorder,
    assert_same_state,
    channels_first,
    differences,
    hub_state,
    largest_difference,
    pictures,
    port,
    random_sum,
    twin,
)
from mlx_deform.models.detr import (
    RTDETR,
    RTDETRConfig,
    RTDETRv2Config,
    config_of,
    load_model,
    load_weights,
    read_config,
    save_model,
)
from mlx_deform.models.detr.config import labels_of
from mlx_deform.models.detr.families import CONFIGS
from mlx_deform.models.detr.pyramid import Pyramid
from mlx_deform.models.detr.rt_detr_weights import hub_names
from mlx_deform.models.detr.selection import anchors
from mlx_deform.models.detr.weights import inferred_config
from mlx_deform.models.layers import BatchNorm
from mlx_deform.nn.checkpoints import torch_weights

BASIC = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 40, 56],
    "depths": [2, 1, 2, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
BOTTLENECK = {**BASIC, "layer_type": "bottleneck", "hidden_sizes": [32, 48, 64, 80]}
SMALL = {
    "backbone_config": BASIC,
    "encoder_in_channels": [24, 40, 56],
    "encoder_hidden_dim": 48,
    "hidden_expansion": 0.5,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "d_model": 32,
    "decoder_in_channels": [48, 48, 48],
    "decoder_ffn_dim": 52,
    "decoder_layers": 3,
    "num_queries": 23,
    "num_labels": 5,
    "num_denoising": 10,
}
CLASSES = {"rt_detr": transformers.RTDetrConfig, "rt_detr_v2": transformers.RTDetrV2Config}
CASES = {
    "rt_detr": ("rt_detr", {}),
    "bottleneck": (
        "rt_detr",
        {
            "backbone_config": BOTTLENECK,
            "encoder_in_channels": [48, 64, 80],
            "hidden_expansion": 1.0,
        },
    ),
    "layers": ("rt_detr", {"encoder_layers": 2, "encode_proj_layers": [1, 2]}),
    "levels": ("rt_detr", {"num_feature_levels": 4}),
    "rt_detr_v2": ("rt_detr_v2", {"decoder_offset_scale": 0.7, "decoder_n_points": 3}),
    "discrete": ("rt_detr_v2", {"decoder_method": "discrete"}),
}
SIZE = (96, 160)


@functools.cache
def twins(case):
    model_type, settings = CASES[case]
    return twin(CLASSES[model_type](**{**SMALL, **settings}))


def theirs_of(model, pixels):
    with torch.no_grad():
        return model(channels_first(pixels))


@pytest.mark.parametrize("case", CASES)
def test_predictions(case):
    theirs, ours = twins(case)
    pixels = pictures(*SIZE, count=2)
    want, got = theirs_of(theirs, pixels), ours(mx.array(pixels))
    assert max(differences(got, want)) <= TOLERANCE
    assert largest_difference(got.logits, want.logits) <= TOLERANCE
    assert largest_difference(got.boxes, want.pred_boxes) <= TOLERANCE
    # These scores are enlarged, and so are their roundings.
    logits, boxes = got.encoder
    assert largest_difference(logits, want.enc_topk_logits) <= 10 * TOLERANCE
    assert largest_difference(boxes, want.enc_topk_bboxes) <= TOLERANCE


def test_points_of_each_level():
    """transformers' module counts them by level, its configuration doesn't."""
    theirs, _ = twin(transformers.RTDetrV2Config(**SMALL))
    points = [3, 6, 3]
    for layer in theirs.model.decoder.layers:
        layer.encoder_attn.n_points_list = points
        scale = torch.tensor([1 / count for count in points for _ in range(count)])
        layer.encoder_attn.n_points_scale = scale
    config = dataclasses.replace(port(theirs).config, decoder_n_points=tuple(points))
    ours = load_weights(RTDETR(config), theirs.state_dict()).eval()
    pixels = pictures(*SIZE)
    assert max(differences(ours(mx.array(pixels)), theirs_of(theirs, pixels))) <= TOLERANCE
    assert RTDETRv2Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("case", ["rt_detr", "bottleneck", "levels", "rt_detr_v2"])
def test_names_and_shapes(case):
    theirs, ours = twins(case)
    assert_same_state(ours, theirs)


# ---------------------------------------------------------------------------
# Training


TARGETS = [
    {
        "class_labels": torch.tensor([1, 3, 2]),
        "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.5], [0.6, 0.5, 0.1, 0.2], [0.7, 0.2, 0.5, 0.3]]),
    },
    {"class_labels": torch.tensor([4]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2]])},
]


def gradients_of_theirs(theirs, pixels):
    """Of a random sum of all that is predicted in training, by the hub's names."""
    theirs.train().zero_grad()
    got = theirs.model(pixels, labels=TARGETS)
    layers = got.intermediate_logits, got.intermediate_reference_points
    random_sum((*layers, got.enc_topk_logits, got.enc_topk_bboxes)).backward()
    return hub_names({name: p.grad.clone().numpy() for name, p in theirs.named_parameters()})


def gradients_of_ours(ours, pixels, denoising):
    def loss(model):
        got = model(pixels, denoising=denoising)
        layers = (
            mx.concatenate([getattr(got.denoising, name), getattr(got.layers, name)], axis=2)
            for name in ("logits", "boxes")
        )
        return random_sum((*layers, *got.encoder))

    _, gradients = nn.value_and_grad(ours.train(), loss)(ours)
    names = {name for name, _ in tree_flatten(gradients)}
    return {n: np.array(a) for n, a in torch_weights(ours.update(gradients)).items() if n in names}


@pytest.mark.parametrize(
    ("case", "module", "frozen"),
    [("rt_detr", modeling_rt_detr, True), ("rt_detr_v2", modeling_rt_detr_v2, False)],
    ids=["rt_detr", "rt_detr_v2"],
)
def test_gradients(monkeypatch, case, module, frozen):
    """With denoising queries; the backbone's batch normalisation frozen, and in training."""
    model_type, settings = CASES[case]
    settings = {**SMALL, **settings, "freeze_backbone_batch_norms": frozen}
    theirs, ours = twin(CLASSES[model_type](**settings))
    torch.manual_seed(0)
    recorder = Recorder(module, monkeypatch)
    pixels = pictures(*SIZE, count=2)
    gradients_of_theirs(theirs, channels_first(pixels))  # makes the queries, in float32
    want = gradients_of_theirs(theirs.double(), channels_first(pixels).double())
    got = gradients_of_ours(ours, mx.array(pixels), recorder.queries)
    assert got.keys() == want.keys()
    norms = {name: np.linalg.norm(gradient) for name, gradient in want.items()}
    floor = 1e-6 * max(norms.values())  # some are zero but for rounding, as of a key's bias
    errors = {
        name: np.linalg.norm(got[name] - gradient) / (norms[name] + floor)
        for name, gradient in want.items()
    }
    # Where the sign of an activation is a matter of rounding, float32 is far from the truth.
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 0.1, worst
    assert np.median(list(errors.values())) <= 3e-4


def test_padding_of_denoising_queries_learns_nothing():
    _, ours = twins("rt_detr")
    labels = mx.array([[0, 5, 2]])

    def loss(model):
        return model.model.embed(labels, mx.float32).sum()

    _, gradients = nn.value_and_grad(ours, loss)(ours)
    rows = gradients["model"]["denoising_class_embed"]["weight"].sum(axis=1)
    assert rows.tolist() == [32, 0, 32, 0, 0, 0]


def test_frozen_norms_stay_frozen():
    _, ours = twin(transformers.RTDetrConfig(**SMALL))
    ours.unfreeze()
    names = [name for name, _ in tree_flatten(ours.trainable_parameters())]
    assert not any("normalization" in name or "running" in name for name in names)
    assert any(name.endswith("norm.weight") for name in names)
    before = torch_weights(ours)
    ours.train()
    mx.eval(ours(mx.array(pictures(*SIZE, count=2))).logits)
    changed = {n for n, a in torch_weights(ours).items() if not mx.array_equal(a, before[n])}
    assert changed
    assert all(".running_" in name and ".backbone." not in name for name in changed)


def test_a_new_model_finds_nothing():
    model = RTDETR(RTDETRConfig.from_json({**SMALL, "initializer_bias_prior_prob": None})).eval()
    outputs = model(mx.array(pictures(*SIZE)))
    assert mx.sigmoid(outputs.encoder[0]).mean().item() < 0.05
    # Boxes are the anchors, through every layer.
    shapes = [(12, 20), (6, 10), (3, 5)]
    known = mx.sigmoid(anchors(Pyramid(shapes))[0])[0]
    distances = mx.abs(outputs.layers.boxes[0, :, :, None] - known).max(axis=-1).min(axis=-1)
    assert distances.max().item() < 1e-5


# ---------------------------------------------------------------------------
# Types, compilation, steps


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types(dtype):
    theirs, _ = twins("rt_detr")
    ours = port(theirs)
    pixels = mx.array(pictures(*SIZE))
    want = ours(pixels)
    ours.set_dtype(dtype)
    got = ours(pixels)
    kept = {
        name
        for name, module in ours.named_modules()
        if isinstance(module, BatchNorm) and module.running_var.dtype == mx.float32
    }
    assert kept == {name for name, module in ours.named_modules() if isinstance(module, BatchNorm)}
    assert ours.dtype == got.logits.dtype == got.layers.logits.dtype == dtype
    assert got.boxes.dtype == got.layers.boxes.dtype == mx.float32
    # Most queries are those of float32, if in another order.
    found = mx.abs(got.boxes[0, :, None] - want.boxes[0]).max(axis=-1).min(axis=-1)
    assert mx.sort(found)[len(found) // 2].item() < (0.01 if dtype == mx.float16 else 0.05)


def test_compiled():
    _, ours = twins("rt_detr_v2")
    pixels = mx.array(pictures(*SIZE))

    def predict(pixels):
        outputs = ours(pixels)
        return outputs.logits, outputs.boxes

    for got, want in zip(mx.compile(predict)(pixels), predict(pixels), strict=True):
        assert mx.allclose(got, want, atol=1e-5)


def test_steps():
    _, ours = twins("layers")
    pixels = mx.array(pictures(*SIZE))
    steps = list(ours.steps(pixels))
    assert len(steps) == ours.step_count
    assert all(isinstance(step, mx.array) for step in steps[:-1])
    assert mx.array_equal(steps[-1].boxes, ours(pixels).boxes)


# ---------------------------------------------------------------------------
# Configurations and weights


def test_configurations():
    for model_type, cls in CLASSES.items():
        theirs = cls(num_labels=80, id2label=config_of("rtdetr_r50vd").id2label)
        ours = config_of("rtdetr_r50vd" if model_type == "rt_detr" else "rtdetr_v2_r50vd")
        assert type(ours).from_json(theirs.to_dict()) == ours
        want = theirs.to_dict() | {
            "architectures": [ours.architecture],
            "label2id": {label: number for number, label in ours.id2label.items()},
        }
        assert want.items() <= cls.from_dict(ours.to_json()).to_dict().items()
    for name, config in CONFIGS.items():
        assert config_of(f"PekingU/{name.upper()}") is config
        assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
    assert labels_of({"num_labels": 2}) == {0: "LABEL_0", 1: "LABEL_1"}
    assert labels_of({"id2label": {"0": "cat"}}) == {0: "cat"}


@pytest.mark.parametrize("case", ["bottleneck", "rt_detr_v2"])
def test_files(tmp_path, case):
    """save_pretrained's folder, ours, and a file alone; transformers reads ours."""
    theirs, ours = twins(case)
    pixels = pictures(*SIZE)
    want = ours(mx.array(pixels)).layers.logits

    theirs.save_pretrained(tmp_path / "theirs")
    for path in ("theirs", "theirs/model.safetensors"):
        assert mx.array_equal(load_model(tmp_path / path)(mx.array(pixels)).layers.logits, want)

    save_model(ours, tmp_path / "ours")
    read = load_model(tmp_path / "ours")
    assert read.config == ours.config == read_config(tmp_path / "ours")
    assert mx.array_equal(read(mx.array(pixels)).layers.logits, want)
    back = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "ours").eval()
    assert largest_difference(want, theirs_of(back, pixels).intermediate_logits) <= TOLERANCE

    # Both copies of the heads, as older files have them.
    state = hub_state(theirs)
    heads = {n.removeprefix("model.decoder."): t for n, t in state.items() if "_embed." in n}
    torch.save({**state, **heads}, tmp_path / "pytorch_model.bin")
    shutil.copy(tmp_path / "ours" / "config.json", tmp_path)
    assert mx.array_equal(load_model(tmp_path)(mx.array(pixels)).layers.logits, want)


@pytest.mark.parametrize("case", ["bottleneck", "layers", "levels", "rt_detr_v2"])
def test_sizes_without_a_configuration(tmp_path, case):
    model_type, settings = CASES[case]
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    theirs = transformers.AutoModelForObjectDetection.from_config(
        CLASSES[model_type](**{**SMALL, **settings, **heads})
    )
    theirs.save_pretrained(tmp_path)
    want = read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    got = load_model(tmp_path).config
    # What no shape tells.
    unknown = ("num_queries", "num_denoising", "decoder_offset_scale")
    assert dataclasses.replace(got, **{name: getattr(want, name) for name in unknown}) == want


# Of networks that the code of github.com/lyuwenyu/RT-DETR builds.
OFFICIAL = {
    "rt_detr": (
        "backbone.conv1.conv1_3.conv.weight",
        "backbone.conv1.conv1_3.norm.running_var",
        "backbone.res_layers.0.blocks.0.short.conv.weight",
        "backbone.res_layers.0.blocks.1.branch2b.norm.bias",
        "backbone.res_layers.3.blocks.0.short.conv.conv.weight",
        "backbone.res_layers.3.blocks.0.short.conv.norm.running_mean",
        "encoder.input_proj.2.0.weight",
        "encoder.input_proj.2.1.running_mean",
        "encoder.encoder.0.layers.0.self_attn.in_proj_bias",
        "encoder.encoder.0.layers.0.norm2.bias",
        "encoder.lateral_convs.1.conv.weight",
        "encoder.fpn_blocks.1.bottlenecks.2.conv1.norm.weight",
        "encoder.downsample_convs.0.norm.bias",
        "decoder.input_proj.2.conv.weight",
        "decoder.input_proj.2.norm.weight",
        "decoder.decoder.layers.2.self_attn.in_proj_weight",
        "decoder.decoder.layers.2.self_attn.out_proj.weight",
        "decoder.decoder.layers.2.cross_attn.sampling_offsets.bias",
        "decoder.decoder.layers.2.norm2.weight",
        "decoder.decoder.layers.2.linear1.weight",
        "decoder.decoder.layers.2.norm3.weight",
        "decoder.denoising_class_embed.weight",
        "decoder.query_pos_head.layers.1.weight",
        "decoder.enc_output.0.weight",
        "decoder.enc_output.1.bias",
        "decoder.enc_score_head.weight",
        "decoder.enc_bbox_head.layers.2.bias",
        "decoder.dec_score_head.2.bias",
        "decoder.dec_bbox_head.2.layers.2.weight",
    ),
    "rt_detr_v2": (
        "encoder.input_proj.2.conv.weight",
        "encoder.input_proj.2.norm.running_mean",
        "decoder.anchors",
        "decoder.valid_mask",
        "decoder.decoder.layers.2.cross_attn.num_points_scale",
        "decoder.enc_output.proj.weight",
        "decoder.enc_output.norm.bias",
    ),
}


@pytest.mark.parametrize("case", ["rt_detr", "bottleneck", "levels", "layers", "rt_detr_v2"])
def test_official_names(tmp_path, case):
    theirs, ours = twins(case)
    missing = (
        "decoder.decoder.layers.1.norm2.bias",
        "model.decoder.layers.1.encoder_attn_layer_norm.bias",
    )
    assert_reads_official(theirs, ours, tmp_path, OFFICIAL[CASES[case][0]], missing)


def test_queries_that_are_learned():
    """transformers' network with them is broken, so that there is no twin."""
    theirs, _ = twins("rt_detr")
    state = {**official_state(theirs), "decoder.tgt_embed.weight": torch.randn(31, 32)}
    config = inferred_config(state)
    assert config.learn_initial_query
    assert config.num_queries == 31
    model = load_weights(RTDETR(config), state).model
    assert np.array_equal(model.weight_embedding.weight, state["decoder.tgt_embed.weight"])


def test_errors(tmp_path):
    theirs, ours = twins("rt_detr")
    state = dict(hub_state(theirs))
    state["surplus"] = state.pop("model.decoder.layers.1.fc1.bias")
    with pytest.raises(ValueError, match=r"missing: 'model.decoder.layers.1.fc1.bias'.*'surplus'"):
        load_weights(ours, state)
    state = {**hub_state(theirs), "model.enc_score_head.weight": torch.zeros(6, 32)}
    with pytest.raises(ValueError, match=r"enc_score_head.weight' must have shape \(5, 32\)"):
        load_weights(ours, state)
    with pytest.raises(ValueError, match=r"multiples of 32; got \(1, 96, 100, 3\)"):
        ours(mx.zeros((1, 96, 100, 3)))
    with pytest.raises(ValueError, match="mask must be None"):
        ours(mx.zeros((1, 96, 96, 3)), mask=mx.zeros((1, 96, 96), mx.bool_))
    with pytest.raises(ValueError, match="num_queries = 23 places"):
        ours(mx.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="normalize_before must be False"):
        RTDETRConfig(normalize_before=True)
    with pytest.raises(ValueError, match="decoder_method must be 'default' or 'discrete'"):
        RTDETRv2Config(decoder_method="nearest")
    with pytest.raises(ValueError, match="activation must be one of relu"):
        RTDETR(dataclasses.replace(ours.config, activation_function="tanhish"))
    with pytest.raises(ValueError, match="a model must be one of rtdetr_r18vd"):
        config_of("yolo")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(ValueError, match="must have a model_type of rt_detr"):
        read_config(tmp_path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"weight": mx.zeros(3)})
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"must be of a known family"):
        load_model(tmp_path / "other.safetensors")
