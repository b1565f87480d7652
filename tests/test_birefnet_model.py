"""The whole BiRefNet port beside its twin: predictions, gradients, weights, training, compile."""

import dataclasses
import functools
import hashlib

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import birefnet_twin as twin
from mlx_deform.models.birefnet import (
    BiRefNet,
    BiRefNetConfig,
    SwinConfig,
    config_of,
    decoder,
    layers,
    load_weights,
)
from mlx_deform.models.birefnet.config import BACKBONES, CONFIGS
from numerics import to_numpy
from test_birefnet_blocks import assert_close, tensor, to_mlx

SMALL = BiRefNetConfig(
    SwinConfig(channels=8, depths=(2, 1, 2, 1), heads=(1, 2, 4, 8), window=5),
    dropout=0.0,
    drop_path=0.0,
)
IMAGES = (3, 3, 64, 96)  # PyTorch's layout


@functools.cache
def reference_of(config):
    return twin.randomize(twin.BiRefNet(config))


def port_of(reference, config):
    return load_weights(BiRefNet(config), reference.state_dict())


def frozen(model):
    """The model in training, but with the statistics of inference; both frameworks."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm | torch.nn.BatchNorm2d):
            module.eval()
    return model


def assert_all_close(got, want):
    """Training's outputs, each relative to its own magnitude."""
    assert [len(arrays) for arrays in got] == [4, 3, 3]
    for arrays, tensors in zip(got, want, strict=True):
        for array, t in zip(arrays, tensors, strict=True):
            assert_close(array, t)


# ---------------------------------------------------------------------------
# Names. Digests of the sorted lines "name shape" of the state dicts that the official code builds
# (ZhengPeng7/BiRefNet at 25cb930, models/birefnet.py with `bb` set in config.py).

OFFICIAL = {
    "swin_v1_t": (586, "21fbcd6899bd52164eb47e7d0af30df38035302a1540caef7ffd6878bb5e8e3c"),
    "swin_v1_s": (754, "f1f1f6be2ca1edf47e8d07f9f3095aed686181dfba2dd1972721d4c2e653bbe3"),
    "swin_v1_b": (754, "6c9adbea459dcfa2e538cad5d4800acd9aa1faeb7a2c3a30bbfa248c0f976938"),
    "swin_v1_l": (754, "acbf22b9f4441cb7a524cf30344e028d9d3a917f8c45f748304d908f6f3d43de"),
}


@pytest.mark.parametrize("backbone", OFFICIAL)
def test_names_and_shapes_are_the_official_ones(backbone):
    """The twin's are; and the port asks for exactly these, shapes included."""
    config = BiRefNetConfig(BACKBONES[backbone])
    with torch.device("meta"):
        state = twin.BiRefNet(config).state_dict()
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in state.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == OFFICIAL[backbone]

    weights = [(name, t) for name, t in state.items() if t.is_floating_point()]
    elements = sum(t.numel() for _, t in weights)
    parameters = tree_flatten(BiRefNet(config).parameters())
    assert sum(array.size for _, array in parameters) == elements


def expected_place(name, array):
    """Where an official array must be in the port: its name, an index, and the array there."""
    index = slice(None)
    for sequential in ("squeeze_module", "conv_out1", "global_avg_pool", "gdt_convs"):
        for level in ("", *(f"{kind}_{n}" for kind in ("", "_pred", "_attn") for n in (2, 3, 4))):
            name = name.replace(f"{sequential}{level}.", f"{sequential}{level}.layers.")
    channels = 3 * len(array)  # of modulator_conv
    if "modulator_conv" in name:
        index = slice(channels * 2 // 3, channels)
    elif "offset_conv" in name:
        index = slice(0, len(array))
    name = name.replace("modulator_conv", "offset_conv").replace("regular_conv.", "")
    return name, index, array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def test_every_official_array_comes_to_its_place():
    reference = reference_of(SMALL)
    parameters = dict(tree_flatten(port_of(reference, SMALL).parameters()))
    filled = {name: np.zeros(array.shape[:1], bool) for name, array in parameters.items()}
    for name, t in reference.state_dict().items():
        if name.endswith(("num_batches_tracked", "relative_position_index")):
            continue
        place, index, want = expected_place(name, t.numpy())
        assert np.array_equal(np.array(parameters[place][index]), want), name
        assert not filled[place][index].any(), name
        filled[place][index] = True
    assert all(rows.all() for rows in filled.values())


# ---------------------------------------------------------------------------
# Outputs


def test_swin_t():
    """The published configuration, at a small size: every prediction within 1e-4."""
    config = dataclasses.replace(config_of("BiRefNet_lite"), dropout=0.0, drop_path=0.0)
    reference = twin.randomize(twin.BiRefNet(config)).eval()
    model = port_of(reference, config)
    x = tensor(1, 3, 64, 96)
    with torch.no_grad():
        want = reference(x)
    got = frozen(model)(to_mlx(x))
    assert_all_close(got, want)
    for array, t in zip(got.predictions, want[0], strict=True):
        np.testing.assert_allclose(to_numpy(array), t.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["channels", "columns"])
@pytest.mark.parametrize("pieces", [None, 4096])
def test_inference(order, pieces, monkeypatch):
    if pieces:
        for module in (layers, decoder):
            monkeypatch.setattr(module, "piece", lambda: pieces)
    config = dataclasses.replace(SMALL, patch_order=order)
    reference = reference_of(config).eval()
    model = port_of(reference, config).eval()
    x = tensor(2, 3, 32, 64)
    with torch.no_grad():
        want = reference(x)[0][-1]
    assert_close(model(to_mlx(x)), want)
    steps = list(model.steps(to_mlx(x)))
    assert len(steps) == model.step_count


def test_training_outputs_statistics_and_all():
    reference = twin.randomize(twin.BiRefNet(SMALL)).train()
    model = port_of(reference, SMALL).train()
    x = tensor(*IMAGES)
    with torch.no_grad():
        want = reference(x)
    assert_all_close(model(to_mlx(x)), want)
    statistics = {name: t for name, t in reference.state_dict().items() if "running_" in name}
    found = dict(tree_flatten(model.parameters()))
    assert len(statistics) > 80
    for name, t in statistics.items():
        place, _, want = expected_place(name, t.numpy())
        np.testing.assert_allclose(np.array(found[place]), want, rtol=1e-3, atol=1e-4)


def test_gradients_of_every_parameter():
    reference = frozen(twin.randomize(twin.BiRefNet(SMALL)))
    model = frozen(port_of(reference, SMALL))
    x = tensor(2, 3, 32, 64)
    outputs = [t for tensors in reference(x) for t in tensors]
    cotangents = [tensor(*t.shape, seed=seed) for seed, t in enumerate(outputs)]
    sum((t * c).sum() for t, c in zip(outputs, cotangents, strict=True)).backward()

    def loss(model):
        arrays = [array for arrays in model(to_mlx(x)) for array in arrays]
        return sum((a * to_mlx(c)).sum() for a, c in zip(arrays, cotangents, strict=True))

    _, gradients = nn.value_and_grad(model, loss)(model)
    found = dict(tree_flatten(gradients))
    checked = 0
    for name, parameter in reference.named_parameters():
        place, index, want = expected_place(name, parameter.grad.numpy())
        got = to_numpy(found[place][index])
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= 2e-3, (name, error)
        checked += 1
    assert checked > 200


def test_a_training_step_decreases_the_loss():
    """By what the gradient promises: the step's length times the gradient's square."""
    model = port_of(reference_of(SMALL), SMALL).train()
    x = to_mlx(tensor(3, 3, 32, 64))
    mask = (x.mean(-1, keepdims=True) > 0).astype(mx.float32)
    edges = mx.abs(layers.laplacian(x.mean(-1, keepdims=True)))

    def loss(model):
        outputs = model(x)
        total = mx.array(0.0)
        for logits in outputs.predictions:
            logits = layers.resize(logits, mask.shape[1:3])
            total = total + nn.losses.binary_cross_entropy(logits, mask)
        for logits in outputs.gradient_predictions:
            logits = layers.resize(logits, mask.shape[1:3])
            total = total + nn.losses.binary_cross_entropy(logits, edges)
        return total

    before, gradients = nn.value_and_grad(model, loss)(model)
    square = sum(mx.square(g).sum() for _, g in tree_flatten(gradients)).item()
    promised = 1e-3 * before.item()
    optim.SGD(promised / square).update(model, gradients)
    decrease = before.item() - loss(model).item()
    assert 0.7 * promised < decrease < 1.1 * promised, (decrease, promised)


def test_compiled_inference_equals_eager():
    model = port_of(reference_of(SMALL), SMALL).eval()
    compiled = mx.compile(model)
    for seed in (1, 2):
        x = to_mlx(tensor(1, 3, 32, 64, seed=seed))
        np.testing.assert_allclose(to_numpy(compiled(x)), to_numpy(model(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types(dtype):
    """Within twice the error that PyTorch's own bfloat16 or float16 makes."""
    reference = reference_of(SMALL).eval()
    model = port_of(reference, SMALL).eval().set_dtype(dtype)
    x = tensor(1, 3, 32, 64)
    with torch.no_grad():
        want = reference(x)[0][-1].permute(0, 2, 3, 1).numpy()
    got = model(to_mlx(x).astype(dtype))
    assert got.dtype == dtype
    eps = 2.0**-10 if dtype == mx.float16 else 2.0**-7
    error = np.abs(to_numpy(got) - want).max() / np.abs(want).max()
    # The roundings of some 60 layers in a row, as a random walk.
    assert error <= 8 * eps, error
    kept = {a.dtype for name, a in tree_flatten(model.parameters()) if "running_" in name}
    assert kept == {mx.float32}


# ---------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("shape", [(1, 48, 64, 3), (1, 64, 96, 1), (64, 96, 3), (0, 32, 32, 3)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"^\[BiRefNet\] x must .* multiples of 32; got \("):
        BiRefNet(SMALL)(mx.zeros(shape))


def test_configurations_by_name():
    assert BiRefNetConfig() == config_of("BiRefNet") == BiRefNet().config
    assert config_of("briaai/RMBG-2.0").patch_order == "columns"
    assert config_of("rmbg-2.0").backbone is config_of("swin_l").backbone
    assert config_of("ZhengPeng7/BiRefNet_lite-2K").size == (1440, 2560)
    assert {config_of(f"swin_{size}").backbone_name[-1] for size in "tsbl"} == set("tsbl")
    assert all(side % 32 == 0 for config in CONFIGS.values() for side in config.size)
    with pytest.raises(ValueError, match=r"must be one of BiRefNet, .*; got 'U2Net'"):
        config_of("U2Net")
    with pytest.raises(ValueError, match=r"patch_order .* channels, columns; got 'rows'"):
        BiRefNetConfig(patch_order="rows")
