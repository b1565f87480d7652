"""load_weights, load_model, save_weights: which files, and what is said of those that don't fit."""

import dataclasses
import functools
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import birefnet_twin as twin
from mlx_deform.models.birefnet import (
    BiRefNet,
    BiRefNetConfig,
    SwinConfig,
    config,
    load_model,
    load_weights,
    save_weights,
)

# Its own number of blocks in the third stage, by which backbones are told apart.
SMALL = BiRefNetConfig(SwinConfig(8, (1, 1, 3, 1), (1, 2, 4, 8), 3), size=(32, 64))


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """The small model under a name of its own."""
    monkeypatch.setitem(config.CONFIGS, "small", SMALL)


@functools.cache
def official_state():
    return twin.randomize(twin.BiRefNet(SMALL)).state_dict()


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def assert_same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_official_files(prefix, suffix, tmp_path):
    state = {f"{prefix}{name}": t for name, t in official_state().items()}
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        arrays = {name: mx.array(t.numpy()) for name, t in state.items()}
        mx.save_safetensors(str(path), arrays, {"format": "pt"})
    model = load_weights(BiRefNet(SMALL), path)
    assert_same_parameters(model, load_weights(BiRefNet(SMALL), official_state()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_weights_come_back(dtype, tmp_path):
    changed = dataclasses.replace(SMALL, patch_order="columns", size=(64, 96))
    model = load_weights(BiRefNet(changed), official_state()).set_dtype(getattr(mx, dtype))
    save_weights(model, tmp_path / "mlx.safetensors")
    again = load_model(tmp_path / "mlx.safetensors", dtype=getattr(mx, dtype))
    assert again.config == changed
    assert not again.training
    assert_same_parameters(again, model)
    other = load_model(tmp_path / "mlx.safetensors", patch_order="channels")
    assert other.config == dataclasses.replace(changed, patch_order="channels")
    other = load_model(tmp_path / "mlx.safetensors", "small")
    assert other.config == SMALL
    assert other.bb.patch_embed.proj.weight.dtype == mx.float32


def test_load_model(tmp_path):
    torch.save(official_state(), tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth", "small", dtype=mx.float16)
    assert model.config is SMALL
    kinds = {a.dtype for name, a in parameters(model).items() if ".bn" not in name}
    assert mx.float16 in kinds
    assert model.squeeze_module.layers[0].bn_in.weight.dtype == mx.float32
    assert model(mx.zeros((1, 32, 32, 3), mx.float16)).dtype == mx.float16


def test_the_model_of_a_backbone(tmp_path):
    """An official file tells its backbone, and so which model it is."""
    with torch.device("meta"):
        tiny = twin.SwinTransformer(96, (2, 2, 6, 2), (3, 6, 12, 24), 7).state_dict()
    state = {f"bb.{name}": np.zeros(tuple(t.shape), np.int8) for name, t in tiny.items()}
    with pytest.raises(ValueError, match=r"with swin_v1_l; got those of swin_v1_t.*BiRefNet_lite"):
        load_weights(BiRefNet(), state)
    mx.save_safetensors(
        str(tmp_path / "tiny.safetensors"), {k: mx.array(v) for k, v in state.items()}
    )
    with pytest.raises(ValueError, match=r"missing: 'squeeze_module\.0.* more; unexpected: none"):
        load_model(tmp_path / "tiny.safetensors")


BIAS = "decoder.lateral_block3.conv.bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BIAS: None}, rf"missing: '{BIAS}'; unexpected: none"),
        ({"refiner.bias": torch.ones(2)}, r"missing: none; unexpected: 'refiner.bias'"),
        ({BIAS: torch.ones(7)}, rf"'{BIAS}' must have shape \(32,\); got \(7,\)$"),
        (
            {
                BIAS: torch.ones(7),
                "bb.norm0.weight": torch.ones(2, 3),
                "bb.norm0.bias": None,
                "bb.norm9.bias": torch.ones(1),
            },
            r"'bb.norm0.weight' must have shape \(8,\); got \(2, 3\); "
            rf"'{BIAS}' must .*; names .* missing: 'bb.norm0.bias'; unexpected: 'bb.norm9.bias'",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    model = BiRefNet(SMALL)
    before = parameters(model)
    state = {**official_state(), **changes}
    with pytest.raises(ValueError, match=message):
        load_weights(model, {name: t for name, t in state.items() if t is not None})
    assert all(mx.array_equal(a, before[name]) for name, a in parameters(model).items())


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_model(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"must be a \.safetensors, \.pth.* file; got .*\.onnx"):
        load_model(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors; got .*\.npz"):
        save_weights(BiRefNet(SMALL), tmp_path / "model.npz")
    for text in ("{}", "[]", "text", json.dumps({"backbone": {"channels": 8}})):
        path = tmp_path / "model.safetensors"
        mx.save_safetensors(str(path), {"a": mx.ones(1)}, {"birefnet_config": text})
        with pytest.raises(ValueError, match=r"birefnet_config must be one; got"):
            load_model(path)
    official_file = tmp_path / "official.pth"
    torch.save(official_state(), official_file)
    with pytest.raises(ValueError, match=r"one of BiRefNet, .*; got 'U2Net'"):
        load_model(official_file, "U2Net")
