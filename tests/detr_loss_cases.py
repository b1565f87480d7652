"""Random predictions and targets for the losses of detectors, and what transformers makes of them.

transformers' losses run in float64, on the values that float32 holds.
"""

import mlx.core as mx
import numpy as np
import torch
from transformers.loss import loss_d_fine

from mlx_deform.models.detr.losses import draw_noise
from mlx_deform.models.detr.outputs import (
    DenoisingQueries,
    DetectorOutputs,
    LayerOutputs,
    Target,
)

CLASSES = 7
BINS = 8  # of D-FINE's distributions
LAYERS = 3
# Objects of each picture, and the number of queries: pictures without objects, none at all,
# more objects than queries.
CASES = {
    "unequal": ((2, 0, 5), 11),
    "one picture": ((4,), 9),
    "no objects": ((0, 0), 6),
    "more objects than queries": ((6, 1, 9), 5),
}
GROUPS = 2  # of denoising queries


def targets_of(counts, rng, classes=CLASSES):
    return [
        Target(
            rng.integers(classes, size=n),
            np.concatenate([rng.uniform(0.25, 0.75, (n, 2)), rng.uniform(0.1, 0.5, (n, 2))], -1)
            .astype(np.float32)
            .reshape(n, 4),
        )
        for n in counts
    ]


def labels_of(targets):
    """Targets as transformers takes them."""
    return [
        {
            "class_labels": torch.tensor(target.labels, dtype=torch.int64),
            "boxes": torch.tensor(target.boxes, dtype=torch.float64),
        }
        for target in targets
    ]


def random_boxes(rng, *shape):
    boxes = np.concatenate(
        [rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.6, (*shape, 2))], -1
    )
    return boxes.astype(np.float32)


def random_arrays(counts, queries, rng, *, corners=False, denoising=True):
    """Of all depths, by name, queries of denoising first, as float32 NumPy."""
    pictures, most = len(counts), max(counts)
    copies = 2 * most * GROUPS if denoising else 0
    shape = (pictures, LAYERS, copies + queries)

    def normal(*shape):
        return rng.normal(0, 1.5, shape).astype(np.float32)

    arrays = {
        "logits": normal(*shape, CLASSES),
        "boxes": random_boxes(rng, *shape),
        "encoder_logits": normal(pictures, queries, CLASSES),
        "encoder_boxes": random_boxes(rng, pictures, queries),
    }
    if corners:
        # Distances of edges may give boxes beyond the picture, and sizes below zero.
        arrays["boxes"] = 1.6 * arrays["boxes"] - np.float32(0.2)
        arrays |= {
            "corners": normal(*shape, 4 * (BINS + 1)),
            "references": random_boxes(rng, *shape),
            "initial_logits": normal(pictures, 1, copies + queries, CLASSES),
            "initial_boxes": random_boxes(rng, pictures, 1, copies + queries),
        }
    return arrays, copies


def outputs_of(arrays, copies):
    """A detector's outputs of MLX arrays as `random_arrays` names them."""

    def part(first, last, prefix=""):
        names = ("logits", "boxes", "corners", "references")
        found = [arrays.get(prefix + name) for name in names]
        return LayerOutputs(*(None if x is None else x[:, :, first:last] for x in found))

    layers, with_initial = part(copies, None), "initial_logits" in arrays
    return DetectorOutputs(
        logits=layers.logits[:, -1],
        boxes=layers.boxes[:, -1],
        layers=layers,
        encoder=(arrays["encoder_logits"], arrays["encoder_boxes"]),
        denoising=part(0, copies) if copies else None,
        initial=part(copies, None, "initial_") if with_initial else None,
        initial_denoising=part(0, copies, "initial_") if with_initial and copies else None,
    )


def copies_of(targets, copies):
    """What the criterion reads of denoising queries: where the positive copies are."""
    most = max(len(target.labels) for target in targets)
    positives = [
        np.concatenate([2 * most * g + np.arange(len(t.labels)) for g in range(GROUPS)])
        for t in targets
    ]
    empty = mx.zeros((len(targets), copies))
    return DenoisingQueries(empty, empty, empty, positives, GROUPS)


def meta_of(queries, copies, number):
    """The same as transformers takes it, of so many queries proper."""
    return {
        "dn_positive_idx": [torch.tensor(places) for places in queries.positives],
        "dn_num_group": queries.groups,
        "dn_num_split": [copies, number],
    }


def leaves(arrays):
    """The arrays as float64 tensors that want gradients."""
    return {
        name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in arrays.items()
    }


def gradients_of(loss, tensors):
    """Of a tensor by name, zeros where the loss doesn't depend on it."""
    if loss.requires_grad:
        loss.backward()
    return {
        name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in tensors.items()
    }


def run_criterion(criterion, arrays, copies, targets, queries=None):
    """Total, parts and gradients of every array, as float64 NumPy."""
    names = list(arrays)

    def loss(*values):
        outputs = outputs_of(dict(zip(names, values, strict=True)), copies)
        return criterion(outputs, targets, queries)

    values = [mx.array(arrays[name]) for name in names]
    (total, parts), gradients = mx.value_and_grad(loss, argnums=list(range(len(names))))(*values)
    return (
        total.item(),
        {name: part.item() for name, part in parts.items()},
        {name: np.array(g, np.float64) for name, g in zip(names, gradients, strict=True)},
    )


def patched_noise(monkeypatch, noise):
    """Makes torch's random numbers those of the noise, in the order transformers draws them."""
    floats = iter([noise.flips, noise.shifts])
    integers = iter([noise.labels, (noise.signs + 1) / 2])

    def take(source, like, dtype=None):
        drawn = torch.tensor(next(source))
        assert drawn.shape == like.shape
        return drawn.to(like.dtype if dtype is None else dtype)

    monkeypatch.setattr(torch, "rand_like", lambda x, dtype=None: take(floats, x, dtype))
    monkeypatch.setattr(
        torch, "randint_like", lambda x, low, high, dtype=None: take(integers, x, dtype)
    )


def patched_distances(monkeypatch):
    """transformers finds D-FINE's bins in float32 only; the rest of its loss runs in float64."""
    original = loss_d_fine.bbox2distance

    def bbox2distance(points, boxes, *settings):
        return (x.double() for x in original(points.float(), boxes.float(), *settings))

    monkeypatch.setattr(loss_d_fine, "bbox2distance", bbox2distance)


def noise_for(targets, places, seed, classes=CLASSES):
    return draw_noise(len(targets), places, classes, seed)
