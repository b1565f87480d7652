"""Models of transformers under patch_transformers(), beside themselves without it.

Small ones with random weights: no network is needed.
"""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

from mlx_deform.torch import _transformers, patch_transformers  # noqa: E402

BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
DETECTOR = {
    "num_queries": 7,
    "d_model": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_n_points": 3,
    "use_pretrained_backbone": False,
}
RT_BACKBONE = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
RT_DETECTOR = {
    **DETECTOR,
    "backbone_config": RT_BACKBONE,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [12, 16, 20],
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 4,
    "num_labels": 5,
    "num_denoising": 0,
    "anchor_image_size": None,
}


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        **DETECTOR, backbone_config=BACKBONE, encoder_layers=2, encoder_n_points=2,
        num_feature_levels=3, num_labels=5,
    )  # fmt: skip
    return transformers.DeformableDetrForObjectDetection(config), pixels(49, 65)


def rt_detr():
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**RT_DETECTOR)), pixels()


def rt_detr_v2(method="default"):
    config = transformers.RTDetrV2Config(**RT_DETECTOR, decoder_method=method)
    return transformers.RTDetrV2ForObjectDetection(config), pixels()


def d_fine():
    settings = {**RT_DETECTOR, "decoder_n_points": [3, 2, 1]}
    return transformers.DFineForObjectDetection(transformers.DFineConfig(**settings)), pixels()


def grounding_dino():
    config = transformers.GroundingDinoConfig(
        **DETECTOR, backbone_config=BACKBONE, encoder_layers=1, encoder_n_points=2,
        num_feature_levels=4, two_stage=True, query_dim=4, max_text_len=8,
        text_config={
            "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50,
        },
    )  # fmt: skip
    inputs = pixels(65, 97)
    inputs["input_ids"] = torch.tensor([[101 % 50, 7, 9, 12]])
    return transformers.GroundingDinoForObjectDetection(config), inputs


SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=SWIN, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=24, encoder_layers=2, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=24, num_queries=5, num_labels=4, dropout=0.0,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config), pixels()


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=SWIN, conv_dim=32, mask_dim=32, hidden_dim=32, num_queries=6,
        encoder_feedforward_dim=24, encoder_layers=2, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=24, is_training=False, text_encoder_width=16, text_encoder_vocab_size=30,
        text_encoder_num_layers=1, text_encoder_context_length=8, task_seq_len=5, max_seq_len=5,
        dropout=0.0, use_task_norm=True,
    )  # fmt: skip
    inputs = pixels()
    inputs["task_inputs"] = torch.randn(1, 5)
    return transformers.OneFormerForUniversalSegmentation(config), inputs


def pixels(height=64, width=64):
    return {"pixel_values": torch.randn(1, 3, height, width)}


BOUND = 1e-8
FAMILIES = {
    "deformable_detr": deformable_detr,
    "rt_detr": rt_detr,
    "rt_detr_v2": rt_detr_v2,
    "rt_detr_v2, discrete": lambda: rt_detr_v2("discrete"),
    "d_fine": d_fine,
    "grounding_dino": grounding_dino,
    "mask2former": mask2former,
    "oneformer": oneformer,
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    torch.manual_seed(7)
    model, inputs = FAMILIES[request.param]()
    # Offsets that depend on the query, and scores that top-k cannot confuse.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                parameter.normal_(0, 0.5)
    # float64: the gradient of a bias before a normalisation is 0, but for rounding.
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    return model.double().eval(), inputs


def floats(outputs):
    """Every floating-point tensor that a model returns, by name."""
    found = {}
    for name, value in outputs.items():
        for i, tensor in enumerate(value if isinstance(value, (tuple, list)) else [value]):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                found[f"{name} {i}"] = tensor
    return found


def run(model, inputs):
    """Outputs, and the gradients of the parameters."""
    model.zero_grad()
    outputs = floats(model(**inputs))
    torch.manual_seed(11)
    finite = [x for x in outputs.values() if x.requires_grad and torch.isfinite(x).all()]
    sum((x * torch.randn_like(x)).sum() for x in finite).backward()
    gradients = {
        # Of a discrete location it is zero, or there is none.
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return {name: x.detach() for name, x in outputs.items()}, gradients


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        size = max(1.0, float(want[name].nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(got[name], want[name], atol=BOUND * size, rtol=0, msg=name)


def counted(monkeypatch):
    calls = []
    right = _transformers.multi_scale_deformable_attention

    def counting(*arguments, **settings):
        calls.append(settings)
        return right(*arguments, **settings)

    monkeypatch.setattr(_transformers, "multi_scale_deformable_attention", counting)
    core = _transformers.MultiScaleDeformableAttention
    forward = core.forward

    def counting_forward(self, *arguments, **settings):
        calls.append(settings)
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(core, "forward", counting_forward)
    return calls


def test_outputs_and_gradients(family, monkeypatch):
    model, inputs = family
    want, want_gradients = run(model, inputs)
    moved = [name for name, gradient in want_gradients.items() if gradient.abs().max() > 1e-6]
    assert any("attention_weights" in name for name in moved)
    calls = counted(monkeypatch)
    with patch_transformers():
        got, got_gradients = run(model, inputs)  # a model from before the patch
        patched = len(calls)
    assert patched >= 1
    assert_close(got, want)
    assert_close(got_gradients, want_gradients)
    again, _ = run(model, inputs)
    assert len(calls) == patched, "undone"
    assert_close(again, want)


def test_a_model_made_under_the_patch(monkeypatch):
    calls = counted(monkeypatch)
    with patch_transformers():
        torch.manual_seed(3)
        model, inputs = d_fine()
        model.eval()(**inputs)
        assert calls
    count = len(calls)
    copy.deepcopy(model)(**inputs)
    assert len(calls) == count, "undone for it too"


def test_patches_nest():
    def holds():
        from transformers.models.mask2former import modeling_mask2former

        name = modeling_mask2former.multi_scale_deformable_attention.__module__
        return name == _transformers.__name__

    assert not holds()
    outer = patch_transformers()
    with patch_transformers():
        assert holds()
    assert holds()
    outer.undo()
    outer.undo()
    assert not holds()


def test_every_model_with_the_attention_is_known():
    """Of the installed version: modules by their text."""
    from pathlib import Path

    models = Path(transformers.__file__).parent / "models"
    layers, functions = set(), set()
    for path in models.glob("*/modeling_*.py"):
        text = path.read_text()
        if "class MultiScaleDeformableAttention(" in text:
            layers.add(path.parent.name)
        if "\ndef multi_scale_deformable_attention" in text:
            functions.add(path.parent.name)
    assert layers <= set(_transformers.LAYERS)
    assert functions <= _transformers.FUNCTIONS.keys() | _transformers.HOLDERS.keys()
    assert layers
    assert functions
