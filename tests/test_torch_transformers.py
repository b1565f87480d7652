"""patch_transformers(): the models of transformers, small and random, computed by MLX."""

# ruff: noqa: E402  (torch and transformers may not be installed)
import copy
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers is older than 5", allow_module_level=True)

from transformers import BertConfig, ResNetConfig, RTDetrResNetConfig, SwinConfig
from transformers.models.d_fine.modeling_d_fine import (
    multi_scale_deformable_attention_v2 as imported_before,
)

import mlx_deform.torch as bridge
from mlx_deform.torch import _bridge, _transformers
from torch_cases import (
    DEVICE,
    DTYPE,
    one_thread,  # noqa: F401
    relative_error,
)

TOLERANCE = 1e-9 if torch.float64 == DTYPE else 1e-5


@pytest.fixture
def calls(monkeypatch):
    """What went to MLX."""
    made = []
    call = _bridge.call

    def recording(function, rows):
        made.append(len(rows))
        return call(function, rows)

    monkeypatch.setattr(_bridge, "call", recording)
    return made


# ---------------------------------------------------------------------------
# The table


def test_every_model_of_transformers_is_in_the_table():
    names = "|".join(_transformers.CODE)
    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(rf"^(?:class|def) ({names})\b", text, re.MULTILINE):
            assert path.name == f"modeling_{path.parent.name}.py"
            assert path.parent.name not in found
            found[path.parent.name] = name
    assert found == {model: name for model, name in _transformers.MODELS.items() if model in found}
    if transformers.__version__ == "5.24.0":
        assert found == _transformers.MODELS


def test_all_of_them_are_reached(calls):
    """Each model's own function, called as its layers call it."""
    torch.manual_seed(0)
    shapes, points = [(5, 7), (3, 4)], [2, 2]
    value = torch.randn(2, 47, 3, 6)
    locations, weights = torch.rand(2, 4, 3, 4, 2), torch.rand(2, 4, 3, 4)
    by_level = locations.unflatten(3, (2, 2)), weights.unflatten(3, (2, 2))
    arguments = {
        _transformers.LAYER: (None, value, None, shapes, None, *by_level, 64),
        _transformers.BY_LEVEL: (value, shapes, *by_level),
        _transformers.IN_A_ROW: (value, shapes, locations, weights, points),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functions = _transformers._functions()
    if transformers.__version__ == "5.24.0":
        assert len(functions) == len(_transformers.MODELS)
    for function in functions:
        name = _transformers._name(function)
        want = function(*arguments[name])
        assert not calls
        with bridge.patch_transformers():
            got = function(*arguments[name])
        assert len(calls) == 1
        assert relative_error(got, want) <= 1e-5
        calls.clear()


# ---------------------------------------------------------------------------
# The models


def resnet():
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def swin(stages=("stage1", "stage2", "stage3", "stage4")):
    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        out_features=list(stages),
    )


def detr(**changes):
    return {
        "d_model": 32,
        "num_queries": 9,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
        **changes,
    }


def real_time(**changes):
    return detr(
        encoder_layers=1,
        backbone_config=RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        decoder_in_channels=[32, 32, 32],
        num_denoising=6,
        num_labels=5,
        **changes,
    )


def mask(**changes):
    return {
        "backbone_config": swin(),
        "hidden_dim": 32,
        "encoder_feedforward_dim": 40,
        "dim_feedforward": 40,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_attention_heads": 4,
        "num_queries": 9,
        "num_labels": 5,
        "dropout": 0.0,
        **changes,
    }


def deformable_detr(**changes):
    config = transformers.DeformableDetrConfig(
        **detr(backbone_config=resnet(), encoder_n_points=3, decoder_n_points=2, num_labels=5),
        **changes,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr():
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**real_time()))


def rt_detr_v2(method="default"):
    config = transformers.RTDetrV2Config(**real_time(decoder_method=method))
    return transformers.RTDetrV2ForObjectDetection(config)


def d_fine(method="default"):
    config = transformers.DFineConfig(
        **real_time(decoder_n_points=[3, 4, 2], decoder_method=method),
        lqe_hidden_dim=8,
        max_num_bins=8,
    )
    return transformers.DFineForObjectDetection(config)


def grounding_dino():
    text = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = transformers.GroundingDinoConfig(
        **detr(backbone_config=swin(("stage2", "stage3", "stage4")), text_config=text),
        fusion_droppath=0.0,
        max_text_len=16,
    )
    return transformers.GroundingDinoForObjectDetection(config)


def mask2former():
    config = transformers.Mask2FormerConfig(**mask(feature_size=32, mask_feature_size=32))
    return transformers.Mask2FormerForUniversalSegmentation(config)


def oneformer():
    config = transformers.OneFormerConfig(
        **mask(conv_dim=32, mask_dim=32),
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=50,
        text_encoder_context_length=7,
        task_seq_len=7,
        text_encoder_n_ctx=2,
    )
    return transformers.OneFormerForUniversalSegmentation(config)


# Models, and how often they call the function.
MODELS = {
    "deformable_detr": (deformable_detr, 4),
    "rt_detr": (rt_detr, 2),
    "rt_detr_v2": (rt_detr_v2, 2),
    "rt_detr_v2 discrete": (lambda: rt_detr_v2("discrete"), 2),
    "d_fine": (d_fine, 2),
    "d_fine discrete": (lambda: d_fine("discrete"), 2),
    "grounding_dino": (grounding_dino, 4),
    "mask2former": (mask2former, 2),
    "oneformer": (oneformer, 2),
}


def made(name):
    """Random in everything: offsets that start as whole pixels lie where derivatives jump."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            if "running_var" in key:
                tensor.uniform_(0.5, 2)
            elif "running_mean" in key or isinstance(tensor, torch.nn.Parameter):
                tensor += 0.05 * torch.randn_like(tensor)
            if "sampling_offsets.bias" in key:
                tensor += torch.rand_like(tensor)
    return model.to(DEVICE, DTYPE)


def inputs_of(name):
    torch.manual_seed(1)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 96)}
    if name == "grounding_dino":
        inputs["input_ids"] = torch.tensor([[101 % 50, 7, 8, 12, 9, 2]] * 2)
        inputs["attention_mask"] = torch.ones(2, 6, dtype=torch.long)
    if name == "oneformer":
        inputs["task_inputs"] = torch.randint(1, 50, (2, 7))
    return {
        key: tensor.to(DEVICE, DTYPE) if tensor.is_floating_point() else tensor.to(DEVICE)
        for key, tensor in inputs.items()
    }


def floating(values):
    """The tensors within a model's output."""
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = values.values()
    if isinstance(values, (list, tuple, type({}.values()))):
        return [tensor for value in values for tensor in floating(value)]
    return []


def run(model, name):
    """Outputs, and the gradients of all parameters, by name."""
    model.zero_grad()
    outputs = floating(model(**inputs_of(name)))
    generator = torch.Generator().manual_seed(2)
    total = 0
    for output in outputs:
        if output.requires_grad:
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            # Masked logits are infinite.
            finite = torch.where(output.isfinite() & (output.abs() < 1e9), output, 0)
            total = total + (finite * cotangent.to(output)).sum()
    total.backward()
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return results, {key: grad for key, grad in gradients.items() if grad is not None}


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
    for key, value in want[0].items():
        unusual = ~value.isfinite()
        assert torch.equal(got[0][key][unusual], value[unusual])
        error = relative_error(got[0][key].masked_fill(unusual, 0), value.masked_fill(unusual, 0))
        assert error <= TOLERANCE, f"{key}: {error}"
    # Biases of keys and before norms have gradients of 0, but for rounding.
    least = 1e-4 * max(gradient.abs().max().item() for gradient in want[1].values())
    for key, value in want[1].items():
        error = (got[1][key] - value).abs().max().item() / max(value.abs().max().item(), least)
        assert error <= TOLERANCE, f"{key}: {error}"


@pytest.mark.parametrize("name", MODELS)
def test_models_made_before(name, calls):
    model, times = made(name), MODELS[name][1]
    want = run(model, name)
    assert not calls
    offsets = [value for key, value in want[1].items() if "sampling_offsets.weight" in key]
    assert len(offsets) == (0 if "discrete" in name else times)
    assert all(gradient.abs().max() > 0 for gradient in offsets)
    with bridge.patch_transformers():
        got = run(model, name)
        assert len(calls) == 2 * times  # forward and backward
    assert_same(got, want)
    assert_same(run(model, name), want)
    assert len(calls) == 2 * times  # transformers' own again


@pytest.mark.parametrize("name", ["rt_detr", "d_fine"])
def test_models_made_within(name, calls):
    """They stay transformers' own, and can be copied and pickled."""
    with bridge.patch_transformers():
        model = made(name).eval()
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        got = run(model, name)
    before = len(calls)
    assert before == 2 * MODELS[name][1]
    for each in (model, *others):
        assert_same(got, run(each.eval(), name))
    assert len(calls) == before


def losses(name, steps=6):
    model = made(name).float().train()  # the loss of D-FINE is float32
    inputs = {key: tensor.float() for key, tensor in inputs_of(name).items()}
    generator = torch.Generator().manual_seed(3)
    boxes = [0.3 + 0.4 * torch.rand(3, 4, generator=generator) for _ in range(2)]
    labels = [
        {"class_labels": torch.tensor([0, 3, 1], device=DEVICE), "boxes": each.to(DEVICE)}
        for each in boxes
    ]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    curve = []
    for _ in range(steps):
        torch.manual_seed(4)  # of the denoising queries
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine"])
def test_training_follows_the_curve_of_transformers(name, calls):
    """The models' own losses, matching and all."""
    pytest.importorskip("scipy", reason="transformers matches boxes with scipy")
    want = losses(name)
    assert not calls
    with bridge.patch_transformers():
        got = losses(name)
    assert len(calls) == 6 * 2 * MODELS[name][1]
    assert min(want[1:]) < want[0]  # it learns
    for one, other in zip(got, want, strict=True):
        assert abs(one - other) <= 1e-5 * abs(other)


# ---------------------------------------------------------------------------
# The patch


def call_d_fine(function=imported_before, device="cpu"):
    value = torch.ones(1, 6, 2, 4, device=device)
    locations = torch.full((1, 5, 2, 3, 2), 0.5, device=device)
    weights = torch.ones(1, 5, 2, 3, device=device)
    return function(value, [(2, 3)], locations, weights, [3])


def test_patches_nest_and_end_once(calls):
    code = imported_before.__code__
    first = bridge.patch_transformers()
    with bridge.patch_transformers() as second:
        call_d_fine()
    second.undo()
    call_d_fine()
    assert len(calls) == 2
    first.undo()
    first.undo()
    call_d_fine()
    assert len(calls) == 2
    assert imported_before.__code__ is code
    with bridge.patch_transformers():
        call_d_fine()
    assert len(calls) == 3


def test_a_patch_before_any_model_is_imported():
    program = """
from mlx_deform.torch import _bridge, patch_transformers
patch_transformers()
import torch
from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention
made, call = [], _bridge.call
_bridge.call = lambda *arguments: made.append(1) or call(*arguments)
value, locations = torch.ones(1, 6, 2, 4), torch.rand(1, 5, 2, 1, 3, 2)
weights = torch.rand(1, 5, 2, 1, 3)
MultiScaleDeformableAttention()(value, None, [(2, 3)], None, locations, weights, 64)
print(len(made))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "1\n", run.stderr


def test_other_devices_are_those_of_transformers(calls):
    with bridge.patch_transformers():
        assert call_d_fine(device="meta").is_meta
    assert not calls


def test_errors_end_the_patch_too(calls):
    with pytest.raises(bridge.InvalidArgument, match="method"), bridge.patch_transformers():
        call_d_fine(lambda *arguments: imported_before(*arguments, method="nearest"))
    call_d_fine()
    assert not calls


def test_both_patches_hold_together(calls):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with bridge.patch_transformers(), bridge.patch_torchvision():
        call_d_fine()
    call_d_fine()
    assert len(calls) == 1


def test_compile(calls):
    model = made("rt_detr_v2").eval()
    attention = model.model.decoder.layers[0].encoder_attn
    torch.manual_seed(5)
    states, maps = torch.randn(2, 9, 32), torch.randn(2, 47, 32)
    shapes = [(5, 7), (3, 3), (1, 3)]
    references = torch.rand(2, 9, 1, 4)

    def function(states, maps):
        return attention(
            states,
            encoder_hidden_states=maps,
            reference_points=references.to(states),
            spatial_shapes=torch.tensor(shapes, device=states.device),
            spatial_shapes_list=shapes,
        )[0]

    arguments = [tensor.to(DEVICE, DTYPE).requires_grad_() for tensor in (states, maps)]
    torch.compiler.reset()
    with bridge.patch_transformers():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got = compiled(*arguments)
        cotangent = torch.randn_like(got)
        gradients = torch.autograd.grad(got, arguments, cotangent)
    assert len(calls) == 2
    want = function(*arguments)
    assert relative_error(got, want) <= TOLERANCE
    for one, other in zip(gradients, torch.autograd.grad(want, arguments, cotangent), strict=True):
        assert relative_error(one, other) <= TOLERANCE
    torch.compiler.reset()


def test_ways_that_are_not_known_stay_as_they_are(monkeypatch, calls):
    from transformers.models.d_fine import modeling_d_fine

    def other(value, something_new):
        pass

    monkeypatch.setattr(modeling_d_fine, "multi_scale_deformable_attention_v2", other)
    code = other.__code__
    with (
        pytest.warns(UserWarning, match=r"d_fine.* is called in a way that is not known"),
        bridge.patch_transformers(),
    ):
        assert other.__code__ is code


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="transformers is not installed"):
        bridge.patch_transformers()
