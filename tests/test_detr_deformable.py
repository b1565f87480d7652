"""Deformable DETR beside transformers': predictions, gradients, weights, half types."""

import dataclasses
import functools
import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torchvision
import transformers
from mlx.utils import tree_flatten

from deformable_detr_twin import call, called, deformable_differences, deformable_twin, padded
from detr_twin import (
    TOLERANCE,
    assert_same_state,
    channels_first,
    hub_state,
    largest_difference,
    pictures,
    port,
    randomise,
)
from mlx_deform.models.detr import (
    DeformableDETR,
    DeformableDETRConfig,
    config_of,
    load_model,
    load_weights,
    read_config,
    save_model,
)
from mlx_deform.models.detr.backbones.plain_resnet import PlainResNet, PlainResNetConfig
from mlx_deform.models.detr.deformable_detr_weights import BACKBONE, hub_names
from mlx_deform.models.detr.layers import FrozenBatchNorm
from mlx_deform.models.detr.pyramid import Pyramid, nearest
from mlx_deform.models.detr.selection import anchors
from mlx_deform.nn import load_torch_weights
from mlx_deform.nn.checkpoints import torch_weights

RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [24, 32, 48, 64],
    "depths": [2, 1, 2, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
BASIC = {**RESNET, "layer_type": "basic", "hidden_sizes": [16, 32, 48, 64]}
LAST = {**RESNET, "out_features": ["stage4"]}
SMALL = {
    "backbone_config": RESNET,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_ffn_dim": 44,
    "encoder_n_points": 3,
    "decoder_layers": 3,
    "decoder_ffn_dim": 52,
    "decoder_n_points": 2,
    "num_queries": 23,
    "two_stage_num_proposals": 19,
    "num_labels": 5,
}
CASES = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
    "single": {"backbone_config": LAST, "num_feature_levels": 1},
    "more_levels": {"backbone_config": LAST, "num_feature_levels": 3, "with_box_refine": True},
    "learned": {"backbone_config": BASIC, "position_embedding_type": "learned"},
}
# No multiple of anything.
SIZE = (117, 163)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """PyTorch's threads cost more than they bring at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def twins(case):
    return deformable_twin(transformers.DeformableDetrConfig(**{**SMALL, **CASES[case]}))


@torch.no_grad()
def theirs_of(theirs, pixels, mask=None):
    return call(theirs, pixels, mask)


def assert_same_predictions(got, want):
    assert max(deformable_differences(got, want)) <= TOLERANCE
    assert largest_difference(got.logits, want.logits) <= TOLERANCE
    assert largest_difference(got.boxes, want.pred_boxes) <= TOLERANCE


# ---------------------------------------------------------------------------
# Predictions


@pytest.mark.parametrize("case", CASES)
def test_predictions(case):
    theirs, ours = twins(case)
    pixels, mask = padded(*SIZE, count=3)
    want, got = theirs_of(theirs, pixels, mask), called(ours, pixels, mask)
    assert_same_predictions(got, want)
    if case == "two_stage":
        # These scores are enlarged, and so are their roundings.
        assert largest_difference(got.encoder[0], want.enc_outputs_class) <= 10 * TOLERANCE
        boxes = want.enc_outputs_coord_logits.sigmoid()
        assert largest_difference(got.encoder[1], boxes) <= TOLERANCE
    else:
        assert got.encoder is None


@pytest.mark.parametrize("case", ["plain", "two_stage"])
def test_predictions_without_padding(case):
    """No mask, and one that masks nothing, are the same."""
    theirs, ours = twins(case)
    pixels = pictures(*SIZE, count=2)
    got = called(ours, pixels)
    assert_same_predictions(got, theirs_of(theirs, pixels))
    unmasked = called(ours, pixels, np.zeros(pixels.shape[:3], bool))
    assert mx.allclose(got.layers.boxes, unmasked.layers.boxes, atol=1e-5)


@pytest.mark.parametrize("case", ["refine", "two_stage"])
def test_padding_is_not_seen(case):
    """Nothing of the encoder and decoder depends on what the maps hold where they are padding."""
    _, ours = twins(case)
    pixels, mask = padded(*SIZE)
    model, heads = ours.model, ours.heads
    maps = []
    for _ in model.backbone.conv_encoder.model.steps(mx.array(pixels), maps):
        pass
    for _ in model.project(maps):
        pass
    pyramid = Pyramid([x.shape[1:3] for x in maps], mx.array(mask))
    flat = mx.concatenate([x.flatten(1, 2) for x in maps], axis=1)

    def predicted(flat):
        *_, memory = model.encoder.steps(flat, model.positions(pyramid), pyramid)
        boxes = [mx.where(pyramid.mask[..., None], 0, memory)]
        if case == "two_stage":
            boxes.append(
                model.selected(*model.propose(memory, pyramid, heads[0][-1], heads[1][-1]))[2]
            )
        return boxes

    noise = mx.random.normal(flat.shape)
    other = predicted(mx.where(pyramid.mask[..., None], noise, flat))
    assert 0 < pyramid.mask.sum().item() < pyramid.mask.size
    assert all(mx.array_equal(a, b) for a, b in zip(predicted(flat), other, strict=True))


def test_nearest():
    rng = np.random.default_rng(0)
    for (H, W), shape in [((117, 163), (15, 21)), ((800, 1333), (25, 42)), ((5, 7), (7, 11))]:
        mask = rng.random((2, H, W)) < 0.5
        want = torch.nn.functional.interpolate(torch.from_numpy(mask)[None].float(), shape)[0]
        assert np.array_equal(np.array(nearest(mx.array(mask), shape)), want.bool().numpy())


def test_anchors_of_padded_maps():
    mask = np.zeros((2, 32, 48), bool)
    mask[1, 16:] = mask[1, :, 36:] = True
    pyramid = Pyramid([(8, 12), (4, 6)], mx.array(mask))
    logits, valid = anchors(pyramid)
    boxes = np.array(mx.sigmoid(logits))[1, :96].reshape(8, 12, 4)
    # The second picture has 4 x 9 of the first map's pixels.
    assert np.allclose(boxes[2, 5], [5.5 / 9, 2.5 / 4, 0.05, 0.05])
    usable = np.array(valid)[1, :96, 0].reshape(8, 12)
    assert np.array_equal(usable, ~mask[1, ::4, ::4])
    assert pyramid.ratios.tolist() == [[[1, 1]] * 2, [[0.75, 0.5], [pytest.approx(5 / 6), 0.5]]]


# ---------------------------------------------------------------------------
# The backbone


@pytest.mark.parametrize("dilated", [False, True])
def test_resnet(dilated):
    """torchvision's, by its names, with a stride or dilation in the last stage."""
    theirs = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [1, 2, 1, 3],
        replace_stride_with_dilation=[False, False, dilated],
    )
    del theirs.fc
    randomise(theirs).eval()
    config = PlainResNetConfig(depths=(1, 2, 1, 3), dilation=dilated, out_indices=(1, 2, 3, 4))
    ours = PlainResNet(config, FrozenBatchNorm)
    state = {f"{BACKBONE}.{name}": tensor for name, tensor in theirs.state_dict().items()}
    load_torch_weights(ours, hub_names(state), prefix=BACKBONE)
    pixels, maps = pictures(80, 112), []
    for x in ours.steps(mx.array(pixels), maps):
        mx.eval(x)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(channels_first(pixels)))))
    for stage, got in enumerate(maps, start=1):
        x = theirs.get_submodule(f"layer{stage}")(x)
        want = x.permute(0, 2, 3, 1)
        assert largest_difference(got, want) <= TOLERANCE * want.abs().max()
    assert maps[-1].shape[1:3] == ((5, 7) if dilated else (3, 4))


# ---------------------------------------------------------------------------
# Training


def weighed(arrays, weigh):
    """The sum of all arrays, each number times a weight of its own."""
    rng = np.random.default_rng(1)
    return sum((array * weigh(rng.standard_normal(array.shape))).sum() for array in arrays)


@pytest.mark.parametrize("case", ["plain", "refine", "two_stage"])
def test_gradients(case):
    """Of a random sum of all that is predicted, in training with padded pictures."""
    settings = {**SMALL, **CASES[case], "dropout": 0.0}
    theirs, ours = deformable_twin(transformers.DeformableDetrConfig(**settings))
    theirs.requires_grad_(True)  # transformers freezes all of this backbone
    theirs.train(), ours.train(), ours.unfreeze()
    pixels, mask = padded(*SIZE)

    want = call(theirs, pixels, mask)
    predicted = [want.layer_logits, want.layer_boxes]
    if case == "two_stage":
        predicted += [want.enc_outputs_class, want.enc_outputs_coord_logits.sigmoid()]
    weighed(predicted, torch.from_numpy).backward()

    def loss(model):
        outputs = called(model, pixels, mask)
        return weighed(
            [outputs.layers.logits, outputs.layers.boxes, *(outputs.encoder or ())], mx.array
        )

    _, gradients = nn.value_and_grad(ours, loss)(ours)
    trained = {name for name, _ in tree_flatten(gradients)}
    ours.update(gradients)
    got = torch_weights(ours)
    # A head that several layers share has the sum of their gradients in transformers, once.
    want = hub_names({name: p.grad for name, p in theirs.named_parameters()})
    assert trained == set(want)
    scale = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        # Some are zero but for rounding, as those of a key's bias; where a sample is at a
        # pixel's centre, its slope is a matter of rounding.
        bound = 2e-2 * gradient.abs().max() + 1e-6 * scale
        assert largest_difference(got[name], gradient) <= bound, name


def test_frozen_at_first():
    """As in the published recipe: the stem, the first stage and all batch normalisation."""
    model = DeformableDETR(DeformableDETRConfig.from_json(SMALL))
    backbone = f"{BACKBONE}."
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    convolutions = {name.removeprefix(backbone) for name in names if name.startswith(backbone)}
    assert all(re.match(r"encoder\.stages\.[123]\..*convolution", name) for name in convolutions)
    assert {name.split(".")[2] for name in convolutions} == {"1", "2", "3"}
    model.unfreeze()
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert f"{backbone}embedder.embedder.convolution.weight" in names
    assert not any("normalization" in name for name in names)


@pytest.mark.parametrize("case", ["plain", "refine", "two_stage"])
def test_a_new_model_finds_nothing(case):
    model = DeformableDETR(DeformableDETRConfig.from_json({**SMALL, **CASES[case]})).eval()
    outputs = called(model, pictures(*SIZE))
    assert mx.sigmoid(outputs.logits).mean().item() < 0.05
    sizes = outputs.boxes[..., 2:]
    if case == "two_stage":  # an anchor's
        known = mx.array([0.05, 0.1, 0.2, 0.4, 1.0])
        assert mx.abs(sizes[..., None] - known).min(axis=-1).max().item() < 1e-4
    else:
        assert mx.allclose(sizes, mx.sigmoid(mx.array(-2.0)))


def test_dropout_in_training():
    _, ours = twins("refine")
    pixels = pictures(*SIZE)
    want = called(ours, pixels).logits
    ours.train()
    noisy = called(ours, pixels).logits
    ours.eval()
    assert mx.abs(noisy - want).max().item() > 0.1
    assert mx.array_equal(called(ours, pixels).logits, want)


# ---------------------------------------------------------------------------
# Types, compilation, steps


@pytest.mark.parametrize(("case", "dtype"), [("refine", mx.float16), ("two_stage", mx.bfloat16)])
def test_half_types(case, dtype):
    theirs, _ = twins(case)
    ours = port(theirs)
    pixels, mask = padded(*SIZE)
    want = called(ours, pixels, mask)
    ours.set_dtype(dtype)
    got = called(ours, pixels, mask)
    assert ours.dtype == got.logits.dtype == got.layers.logits.dtype == dtype
    assert got.boxes.dtype == got.layers.boxes.dtype == mx.float32
    # Most queries are those of float32, if in another order.
    found = mx.abs(got.boxes[:, :, None] - want.boxes[:, None]).max(axis=-1).min(axis=-1).flatten()
    assert mx.sort(found)[len(found) // 2].item() < (0.01 if dtype == mx.float16 else 0.05)


@pytest.mark.parametrize("case", ["plain", "two_stage"])
def test_compiled(case):
    _, ours = twins(case)
    pixels, mask = map(mx.array, padded(*SIZE))

    def predict(pixels, mask):
        outputs = ours(pixels, mask)
        return outputs.logits, outputs.boxes

    for got, want in zip(mx.compile(predict)(pixels, mask), predict(pixels, mask), strict=True):
        assert mx.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("case", ["two_stage", "more_levels"])
def test_steps(case):
    _, ours = twins(case)
    pixels, mask = map(mx.array, padded(*SIZE))
    steps = list(ours.steps(pixels, mask))
    assert len(steps) == ours.step_count
    assert all(isinstance(step, mx.array) for step in steps[:-1])
    assert mx.array_equal(steps[-1].boxes, ours(pixels, mask).boxes)


# ---------------------------------------------------------------------------
# Configurations and weights

# What the hub's files of the published models say of their backbone.
HUB_CONFIG = {
    "model_type": "deformable_detr",
    "backbone": "resnet50",
    "backbone_config": None,
    "use_timm_backbone": True,
    "dilation": False,
    "num_feature_levels": 4,
    "num_queries": 300,
    "max_position_embeddings": 1024,
    "id2label": {str(label): name for label, name in config_of("deformable-detr").id2label.items()},
}
VARIANTS = {
    "deformable-detr": {},
    "deformable-detr-with-box-refine": {"with_box_refine": True},
    "deformable-detr-with-box-refine-two-stage": {"with_box_refine": True, "two_stage": True},
    "deformable-detr-single-scale": {"num_feature_levels": 1},
    "deformable-detr-single-scale-dc5": {"num_feature_levels": 1, "dilation": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_configurations(name):
    ours = config_of(f"SenseTime/{name}")
    assert DeformableDETRConfig.from_json(HUB_CONFIG | VARIANTS[name]) == ours
    assert DeformableDETRConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    # As transformers 5 writes it.
    theirs = transformers.DeformableDetrConfig.from_dict(HUB_CONFIG | VARIANTS[name])
    assert DeformableDETRConfig.from_json(theirs.to_dict()) == ours
    assert (ours.num_labels, ours.id2label[1], ours.id2label[90]) == (91, "person", "toothbrush")


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes(case):
    theirs, ours = twins(case)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("case", ["plain", "refine", "two_stage"])
def test_files(tmp_path, case):
    """save_pretrained's folder, ours, a file with every name; transformers reads ours."""
    theirs, ours = twins(case)
    pixels, mask = padded(*SIZE)
    want = called(ours, pixels, mask).layers.logits

    theirs.save_pretrained(tmp_path / "theirs")
    for path in ("theirs", "theirs/model.safetensors"):
        assert mx.array_equal(called(load_model(tmp_path / path), pixels, mask).layers.logits, want)

    save_model(ours, tmp_path / "ours")
    read = load_model(tmp_path / "ours")
    assert read.config == ours.config == read_config(tmp_path / "ours")
    assert mx.array_equal(called(read, pixels, mask).layers.logits, want)
    back = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "ours").eval()
    assert_same_predictions(called(ours, pixels, mask), theirs_of(back, pixels, mask))

    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((tmp_path / "ours" / "config.json").read_text())
    assert mx.array_equal(called(load_model(tmp_path), pixels, mask).layers.logits, want)


def test_class_heads_that_transformers_ties():
    """It writes one where layers refine, if all are the same."""
    config = transformers.DeformableDetrConfig(**{**SMALL, **CASES["refine"]})
    theirs = randomise(transformers.DeformableDetrForObjectDetection(config)).eval()
    state = {
        name: t
        for name, t in hub_state(theirs).items()
        if not re.match("class_embed.[1-9]|bbox", name)
    }
    ours = load_weights(DeformableDETR(DeformableDETRConfig.from_json(config.to_dict())), state)
    pixels, mask = padded(*SIZE)
    assert_same_predictions(called(ours.eval(), pixels, mask), theirs_of(theirs, pixels, mask))


def timm_names(state):
    """The hub's names of the backbone: timm's, with the layers' numbers from 1 on."""

    def new(name):
        if not name.startswith(BACKBONE):
            return name
        name = name.replace("embedder.embedder.convolution", "conv1")
        name = name.replace("embedder.embedder.normalization", "bn1")
        name = name.replace("shortcut.convolution", "downsample.0")
        name = name.replace("shortcut.normalization", "downsample.1")
        place = re.search(r"encoder\.stages\.(\d)\.layers\.(\d+)\.", name)
        if place:
            name = name.replace(place[0], f"layer{int(place[1]) + 1}.{place[2]}.")
        part = re.search(r"layer\.(\d)\.(convolution|normalization)", name)
        if part:
            kind = {"convolution": "conv", "normalization": "bn"}[part[2]]
            name = name.replace(part[0], f"{kind}{int(part[1]) + 1}")
        return name

    return {new(name): tensor for name, tensor in state.items()}


def official_names(theirs):
    """The state dict of github.com/fundamentalvision/Deformable-DETR."""
    parts = {
        "self_attn_layer_norm": ("norm1", "norm2"),
        "encoder_attn_layer_norm": (None, "norm1"),
        "final_layer_norm": ("norm2", "norm3"),
        "fc1": ("linear1", "linear1"),
        "fc2": ("linear2", "linear2"),
        "encoder_attn": (None, "cross_attn"),
    }
    state = {}
    for name, tensor in timm_names(hub_state(theirs)).items():
        name = name.replace(BACKBONE, "backbone.0.body")
        name = name.replace("model.query_position_embeddings", "query_embed")
        name = name.replace("model.input_proj", "input_proj")
        name = re.sub(r"^model\.", "transformer.", name)
        words = name.split(".")
        if words[0] == "transformer" and "layers" in words[2:3]:
            words[4] = parts.get(words[4], (words[4],) * 2)[words[1] == "decoder"]
        if ".decoder." in name and words[-2] in ("q_proj", "k_proj", "v_proj"):
            words = [*words[:-2], f"in_proj_{words[-1]}"]
            state.setdefault(".".join(words), {})[name.split(".")[-2][0]] = tensor
            continue
        state[".".join(words)] = tensor
    return {
        name: torch.cat([t[k] for k in "qkv"]) if isinstance(t, dict) else t
        for name, t in state.items()
    }


@pytest.mark.parametrize("case", ["plain", "refine", "two_stage"])
@pytest.mark.parametrize("names", ["timm", "official"])
def test_other_names(tmp_path, names, case):
    theirs, ours = twins(case)
    state = timm_names(hub_state(theirs)) if names == "timm" else official_names(theirs)
    known = {
        "timm": f"{BACKBONE}.layer1.0.downsample.0.weight",
        "official": "transformer.decoder.layers.2.self_attn.in_proj_weight",
    }
    assert known[names] in state
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    read = load_model(tmp_path / "checkpoint.pth", config=ours.config)
    got, want = torch_weights(read), torch_weights(ours)
    assert all(mx.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", CASES)
def test_sizes_without_a_configuration(tmp_path, case):
    _, ours = twins(case)
    save_model(ours, tmp_path)
    (tmp_path / "config.json").unlink()
    got = load_model(tmp_path).config
    # What no shape tells.
    unknown = ("two_stage_num_proposals", "auxiliary_loss")
    if CASES[case].get("two_stage"):
        unknown += ("num_queries",)
    known = {name: getattr(ours.config, name) for name in unknown}
    assert dataclasses.replace(got, **known) == ours.config


def test_errors():
    theirs, ours = twins("plain")
    state = dict(hub_state(theirs))
    state["surplus"] = state.pop("model.level_embed")
    with pytest.raises(ValueError, match=r"missing: 'model.level_embed'; unexpected: 'surplus'"):
        load_weights(ours, state)
    state = {**hub_state(theirs), "model.level_embed": torch.zeros(4, 32)}
    with pytest.raises(ValueError, match=r"level_embed' must have shape \(4, 64\); got \(4, 32\)"):
        load_weights(ours, state)
    pixels = mx.zeros((1, 64, 80, 3))
    with pytest.raises(
        ValueError, match=r"pixels must have shape \(N, H, W, 3\); got \(1, 64, 80\)"
    ):
        ours(pixels[..., 0])
    with pytest.raises(
        ValueError, match=r"mask must be boolean, of shape \(1, 64, 80\); got .*80, 64"
    ):
        ours(pixels, mx.zeros((1, 80, 64), mx.bool_))
    with pytest.raises(ValueError, match=r"mask must be boolean, .*; got mlx.core.int32"):
        ours(pixels, mx.zeros((1, 64, 80), mx.int32))
    with pytest.raises(ValueError, match="at most 50 rows and columns; got 4 and 51"):
        twins("learned")[1](mx.zeros((1, 32, 408, 3)))
    with pytest.raises(ValueError, match="with_box_refine must be True where two_stage is"):
        DeformableDETRConfig(two_stage=True)
    with pytest.raises(ValueError, match="position_embedding_type must be 'sine' or 'learned'"):
        DeformableDETRConfig(position_embedding_type="none")
    with pytest.raises(ValueError, match=r"backbone must be one of resnet18, .*; got 'swin'"):
        DeformableDETRConfig.from_json({"backbone": "swin"})
