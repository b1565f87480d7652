"""Detectors of transformers with random weights that hide nothing, and ours with the same."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlx.core as mx
import numpy as np
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from mlx_deform.models.detr import DenoisingQueries, load_weights, model_of
from mlx_deform.models.detr.families import FAMILIES
from mlx_deform.models.detr.weights import unwrapped
from mlx_deform.nn.checkpoints import IGNORED, torch_weights

transformers.logging.set_verbosity_error()

# The scores that queries are selected by lie so far apart that rounding changes no selection.
SCORE_SCALE = 30.0
SCORE_HEADS = ("enc_score_head",)

# Of logits and boxes in float32, whatever the layer.
TOLERANCE = 1e-4


def randomise(model, seed=0):
    """Draws every weight, bias and statistic anew: none is 0 or 1, or the same as another.

    Signals keep about their size from layer to layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + mean)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or is_buffer(name):
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("sampling_offsets.bias"):
                normal(tensor, 2)
            elif name.endswith(("running_mean", "bias")):
                normal(tensor, 0.1)
            elif tensor.ndim == 1:
                normal(tensor, 0.1, mean=1)
            else:
                normal(tensor, tensor[0].numel() ** -0.5)
        for name, module in model.named_modules():
            if name.endswith(SCORE_HEADS):
                module.weight.mul_(SCORE_SCALE)
    return model


def is_buffer(name):
    """Whether it is the name of something that holds no weights."""
    return name.endswith(IGNORED)


def hub_state(theirs):
    """What ``save_pretrained`` writes, by the hub's names; heads may be in it twice."""
    return revert_weight_conversion(theirs, theirs.state_dict())


def twin(torch_config, seed=0):
    """transformers' detector, randomised, and ours with its configuration and weights."""
    theirs = transformers.AutoModelForObjectDetection.from_config(torch_config)
    return randomise(theirs, seed).eval(), port(theirs)


def port(theirs):
    """Our detector with the configuration and the weights of transformers' one."""
    family = FAMILIES[theirs.config.model_type]
    ours = model_of(family.config.from_json(theirs.config.to_dict()))
    return load_weights(ours, theirs.state_dict()).eval()


def pictures(height, width, count=1, seed=0):
    """float32 (N, H, W, 3) in [0, 1], smooth as photographs are."""
    rng = np.random.default_rng(seed)
    small = rng.random((count, 3, height // 16, width // 16), dtype=np.float32)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(small), (height, width), mode="bicubic"
    )
    return large.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


def channels_first(pixels):
    """Our pixels as transformers takes them."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def largest_difference(got, want):
    """Of an array and a tensor; NaN where either has one."""
    got, want = np.array(got.astype(mx.float32)), want.detach().float().numpy()
    assert got.shape == want.shape, f"shape {got.shape} is not {want.shape}"
    return float(np.abs(got - want).max())


def differences(outputs, theirs):
    """The largest differences of logits and boxes, over all layers of the decoder.

    Queries whose scores are the same but for rounding come in any order.
    """
    got = outputs.layers.logits, outputs.layers.boxes
    if hasattr(theirs, "enc_topk_bboxes"):
        got = in_order(got, same_order(outputs.encoder[1], theirs.enc_topk_bboxes))
    want = theirs.intermediate_logits, theirs.intermediate_reference_points
    if getattr(theirs, "intermediate_predicted_corners", None) is not None:
        # D-FINE's first entry, in training alone, comes before the layers' own.
        want = [tensor[:, -outputs.layers.logits.shape[1] :] for tensor in want]
    return tuple(largest_difference(*pair) for pair in zip(got, want, strict=True))


def same_order(got, want):
    """Where each box of ``want`` (N, Q, 4) is in ``got``, integers (N, Q)."""
    got, want = np.array(got), want.detach().numpy()
    order = np.tile(np.arange(got.shape[1]), (len(got), 1))
    for places, ours, theirs in zip(order, got, want, strict=True):
        (moved,) = np.nonzero(np.abs(ours - theirs).max(axis=-1) > TOLERANCE)
        distances = np.abs(ours[moved] - theirs[moved, None]).max(axis=-1)
        places[moved] = moved[distances.argmin(axis=1)] if len(moved) else moved
        assert len(set(places)) == len(places), "the selected queries differ"
    return order


def in_order(arrays, order):
    """Arrays (N, layers, Q, ...) with the queries in another order, integers (N, Q)."""
    order = mx.array(order)[:, None, :, None]
    return [mx.take_along_axis(array, order, axis=2) for array in arrays]


def assert_same_state(ours, theirs):
    """Our names and shapes are the hub's, but for buffers and for heads that are there twice."""
    names = FAMILIES[ours.config.model_type].names
    want = {
        name: tuple(tensor.shape)
        for name, tensor in names(unwrapped(hub_state(theirs))).items()
        if not is_buffer(name)
    }
    got = {name: tuple(array.shape) for name, array in torch_weights(ours).items()}
    assert got == want


class Recorder:
    """transformers' denoising queries: made at random once, then the same in every call."""

    def __init__(self, module, monkeypatch):
        self.make = module.get_contrastive_denoising_training_group
        self.made = None
        monkeypatch.setattr(module, self.make.__name__, self)

    def __call__(self, class_embed=None, **settings):
        if self.made is None:
            self.made = self.make(class_embed=self.embed, **settings)
        _, boxes, mask, meta = self.made
        queries = class_embed(self.labels)
        return queries, boxes.to(queries.dtype), mask.to(queries.dtype), meta

    def embed(self, labels):
        self.labels = labels
        return labels

    @property
    def queries(self):
        """As ours takes them."""
        _, boxes, mask, meta = self.made
        return DenoisingQueries(
            mx.array(self.labels.numpy()),
            mx.array(boxes.numpy()),
            mx.array(mask.numpy() < 0),
            [places.numpy() for places in meta["dn_positive_idx"]],
            meta["dn_num_group"],
        )


def random_sum(arrays):
    """The sum of all numbers, each times a random one; the same ones in every call."""
    rng = np.random.default_rng(1)
    total = 0
    for array in arrays:
        weights = rng.standard_normal(array.shape).astype(np.float32)
        total = (
            total + (array * (mx if isinstance(array, mx.array) else torch).asarray(weights)).sum()
        )
    return total
