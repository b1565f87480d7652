"""A whole training step on small detectors: losses and all gradients equal transformers'.

transformers' step runs in float64, on the same weights, pictures, targets and noise.
"""

import sys
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import (
    DeformableDetrConfig,
    DFineConfig,
    HGNetV2Config,
    ResNetConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
)

import detr_twin
from detr_loss_cases import labels_of, noise_for, patched_distances, patched_noise, targets_of
from detr_twin import channels_first, pictures, twin
from mlx_deform.models.detr import load_weights, model_of
from mlx_deform.models.detr.losses import criterion_of, denoising_layout, denoising_queries
from numerics import EPS

CLASSES = 5
COUNTS = (3, 0, 1)  # objects of each picture
SIZE = (96, 64)
# Batch normalisation of maps of 3x2 pixels makes hundreds of each rounding.
ROUNDINGS = 400
LOSS_TOLERANCE = ROUNDINGS * EPS["float32"]
# Relative to the largest of a parameter's gradient: the way back is as long again.
GRADIENT_TOLERANCE = 25 * LOSS_TOLERANCE


def hybrid_settings(in_channels):
    return {
        "num_labels": CLASSES,
        "encoder_in_channels": in_channels,
        "encoder_hidden_dim": 24,
        "encoder_ffn_dim": 40,
        "encoder_attention_heads": 4,
        "d_model": 32,
        "decoder_in_channels": [24, 24, 24],
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "decoder_layers": 3,
        "num_queries": 14,
        "num_denoising": 7,
    }


def rt_detr(config=RTDetrConfig, **settings):
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return config(backbone_config=backbone, **hybrid_settings([24, 32, 40]) | settings)


def d_fine():
    backbone = HGNetV2Config(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 16, 24, 32],
        stage_mid_channels=[8, 8, 12, 16],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {"max_num_bins": 8, "decoder_n_points": [3, 2, 3]}
    return DFineConfig(backbone_config=backbone, **hybrid_settings([24, 32, 40]), **sizes)


def deformable_detr(**settings):
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 2, 1],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    return DeformableDetrConfig(
        backbone_config=backbone,
        num_labels=CLASSES,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=14,
        two_stage_num_proposals=13,
        dropout=0.0,
        auxiliary_loss=True,
        **settings,
    )


CONFIGS = {
    "rt_detr": rt_detr,
    "rt_detr trained backbone": lambda: rt_detr(freeze_backbone_batch_norms=False),
    "rt_detr_v2": lambda: rt_detr(RTDetrV2Config, decoder_n_points=3),
    "d_fine": d_fine,
    "deformable_detr": deformable_detr,
    "deformable_detr refined": lambda: deformable_detr(with_box_refine=True),
    "deformable_detr in two stages": lambda: deformable_detr(with_box_refine=True, two_stage=True),
}


class Step(NamedTuple):
    """transformers' step: the total, its parts, gradients by the names of the state dict."""

    total: float
    parts: dict[str, float]
    gradients: dict[str, torch.Tensor]


def torch_step(model, pixels, mask, targets, noise, monkeypatch):
    """The step of a model of transformers, in float64."""
    model.double().train()
    module = sys.modules[type(model).__module__]

    def denoising_in_float64(*args, **settings):
        # Attention misreads a float32 mask beside float64 queries.
        queries, boxes, blocked, meta = original(*args, **settings)
        return queries, boxes.double(), blocked.double(), meta

    inputs = {"pixel_values": channels_first(pixels).double(), "labels": labels_of(targets)}
    if mask is not None:
        inputs["pixel_mask"] = torch.tensor(~mask)
    with monkeypatch.context() as patched:
        if noise is not None:
            original = module.get_contrastive_denoising_training_group
            patched.setattr(module, original.__name__, denoising_in_float64)
            patched_noise(patched, noise)
        outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in model.state_dict(keep_vars=True).items()
    }
    parts = {name: x.item() for name, x in outputs.loss_dict.items()}
    return Step(outputs.loss.item(), parts, gradients)


def in_our_layout(state, config):
    """Arrays of transformers' by our names: gradients load as weights do."""
    holder = load_weights(model_of(config), {name: x.float() for name, x in state.items()})
    return {name: np.array(x) for name, x in tree_flatten(holder.parameters())}


def shared(gradients, config):
    """Ours as if the layers shared their classes' head, which they do in transformers alone.

    With refined boxes but a single stage each layer has its own in the published models.
    """
    if config.model_type != "deformable_detr" or config.two_stage or not config.with_box_refine:
        return gradients
    for name in ("weight", "bias"):
        heads = [f"class_embed.{layer}.{name}" for layer in range(config.decoder_layers)]
        total = sum(gradients[head] for head in heads)
        gradients |= dict.fromkeys(heads, total)
    return gradients


def weighted(parts, criterion):
    """transformers' parts as ours: with their weights, and what are no losses left out."""
    if criterion.weights.keys() >= {"ce"}:
        return {
            name: criterion.weights[name.split("_")[1]] * value
            for name, value in parts.items()
            if name.startswith("loss_")
        }
    return {name: value for name, value in parts.items() if value != 0}


@pytest.mark.parametrize("name", CONFIGS)
def test_step_is_transformers(name, monkeypatch):
    patched_distances(monkeypatch)
    # Saturated scores would make the costs of the matching ties.
    monkeypatch.setattr(detr_twin, "SCORE_SCALE", 1.0)
    theirs, ours = twin(CONFIGS[name](), seed=1)
    rng = np.random.default_rng(2)
    targets = targets_of(COUNTS, rng, CLASSES)
    pixels = pictures(*SIZE, count=len(COUNTS), seed=3)
    config, noise, mask = ours.config, None, None
    if getattr(config, "num_denoising", 0):
        places = denoising_layout(targets, config.num_denoising)[1]
        noise = noise_for(targets, places, 4, CLASSES)
    else:
        mask = np.zeros(pixels.shape[:3], bool)
        mask[1, 80:], mask[2, :, 48:] = True, True

    # The published recipe freezes two stages of it; transformers, of one of its two backbones, all.
    for parameter in theirs.model.backbone.parameters():
        parameter.requires_grad_(True)
    ours.unfreeze()

    truth = torch_step(theirs, pixels, mask, targets, noise, monkeypatch)
    criterion = criterion_of(config, as_transformers=True)
    queries = denoising_queries(targets, config, noise=noise) if noise else None
    ours.train()

    def loss(pixels):
        outputs = ours(pixels, None if mask is None else mx.array(mask), queries)
        return criterion(outputs, targets, queries)

    (total, parts), gradients = nn.value_and_grad(ours, loss)(mx.array(pixels))
    assert total.item() == pytest.approx(truth.total, rel=LOSS_TOLERANCE)
    expected_parts = weighted(truth.parts, criterion)
    assert parts.keys() == expected_parts.keys()
    for part, value in parts.items():
        near = pytest.approx(
            expected_parts[part], rel=LOSS_TOLERANCE, abs=EPS["float32"] * truth.total
        )
        assert value.item() == near, part

    expected = in_our_layout(truth.gradients, config)
    actual = shared(dict(tree_flatten(gradients)), config)
    assert actual.keys() == dict(tree_flatten(ours.trainable_parameters())).keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for key, gradient in expected.items():
        if key not in actual:  # frozen
            assert not gradient.any(), key
            continue
        # A bias before a softmax or a normalisation has the gradient 0, but for rounding.
        floor = 64 * EPS["float32"] * largest
        bound = GRADIENT_TOLERANCE * np.abs(gradient).max() + floor
        error = np.abs(np.array(actual[key]) - gradient).max()
        assert error <= bound, f"{key}: {error} > {bound}"

    # The running statistics of batch normalisation after the step.
    statistics = in_our_layout(theirs.state_dict(), config)
    for key, x in tree_flatten(ours.parameters()):
        if "running" in key:
            np.testing.assert_allclose(x, statistics[key], rtol=1e-4, atol=1e-5, err_msg=key)
