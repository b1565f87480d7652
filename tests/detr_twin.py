"""Detectors of transformers with random weights that hide nothing, and ours with the same."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from mlx_deform.models.detr import load_weights, model_of
from mlx_deform.models.detr.families import FAMILIES

transformers.logging.set_verbosity_error()

# Scores of pictures are so far apart that rounding changes no selection.
SCORE_SCALE = 30.0
SCORE_HEADS = ("enc_score_head",)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every weight, bias and statistic anew, so that none is 0 or 1 or tied by chance.

    Signals keep about their size from layer to layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale=1.0, mean=0.0):
        drawn = torch.randn(tensor.shape, generator=generator) * scale + mean
        tensor.copy_(drawn.to(tensor.dtype))

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith("points_scale"):
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias")):
                normal(tensor, 0.1)
            elif tensor.ndim == 1:
                normal(tensor, 0.1, 1.0)
            else:
                normal(tensor, (tensor[0].numel()) ** -0.5)
        for name, module in model.named_modules():
            if name.endswith(SCORE_HEADS):
                module.weight.mul_(SCORE_SCALE)
            if name.endswith("sampling_offsets"):
                normal(module.bias, 2.0)
    return model


def hub_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What ``save_pretrained`` writes: the hub's names, heads once."""
    return revert_weight_conversion(model, model.state_dict())


def twin(torch_config, seed: int = 0):
    """transformers' detector, randomised, and ours with its configuration and weights."""
    theirs = transformers.AutoModelForObjectDetection.from_config(torch_config)
    randomise(theirs, seed).eval()
    family = FAMILIES[torch_config.model_type]
    ours = model_of(family.config.from_json(torch_config.to_dict()))
    load_weights(ours, theirs.state_dict())
    ours.eval()
    return theirs, ours


def pictures(height: int, width: int, count: int = 1, seed: int = 0) -> np.ndarray:
    """float32 (N, H, W, 3) in [0, 1], smooth as photographs are."""
    rng = np.random.default_rng(seed)
    small = rng.random((count, 3, height // 16, width // 16), dtype=np.float32)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(small), (height, width), mode="bicubic", antialias=False
    )
    return large.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
