"""transformers' Deformable DETR with random weights, ours with the same, and pictures padded."""

import copy

import mlx.core as mx
import numpy as np
import torch
import transformers

from detr_twin import (
    SCORE_SCALE,
    channels_first,
    in_order,
    largest_difference,
    pictures,
    port,
    randomise,
    same_order,
)
from mlx_deform.models.detr.selection import best, take


def deformable_twin(config, seed=0):
    """As :func:`detr_twin.twin`; every layer has a head of its own where layers refine."""
    theirs = transformers.DeformableDetrForObjectDetection(config)
    if config.with_box_refine and not config.two_stage:
        # As in the published files; transformers ties those that it makes itself.
        theirs.class_embed = torch.nn.ModuleList(map(copy.deepcopy, theirs.class_embed))
    if config.dilation:
        dilate(theirs.model.backbone.model.encoder.stages[-1].layers)
    randomise(theirs, seed)
    if config.two_stage:
        with torch.no_grad():
            theirs.class_embed[-1].weight.mul_(SCORE_SCALE)
    return theirs.eval(), port(theirs)


def dilate(blocks):
    """A stage's blocks as torchvision and timm dilate them; transformers leaves ResNets to timm."""
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (min(index, 1) + 1,) * 2


def padded(height, width, count=2, seed=0):
    """Pictures of the given size and smaller ones, and where they are padding."""
    pixels = pictures(height, width, count, seed)
    mask = np.zeros(pixels.shape[:3], bool)
    for index in range(1, count):
        mask[index, height - 17 * index :] = True
        mask[index, :, width - 29 * index :] = True
    return np.where(mask[..., None], 0, pixels), mask


def call(theirs, pixels, mask=None):
    """transformers' outputs, with those of all layers: axes are (N, layers, queries, ...)."""
    theirs.config.auxiliary_loss = True  # else it gives the last layer's alone
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.4)}] * len(pixels)
    outputs = theirs(
        channels_first(pixels),
        pixel_mask=None if mask is None else torch.from_numpy(~mask).long(),
        labels=labels,
    )
    layers = [
        *outputs.auxiliary_outputs,
        {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes},
    ]
    outputs.layer_logits = torch.stack([layer["logits"] for layer in layers], dim=1)
    outputs.layer_boxes = torch.stack([layer["pred_boxes"] for layer in layers], dim=1)
    return outputs


def called(ours, pixels, mask=None):
    return ours(mx.array(pixels), None if mask is None else mx.array(mask))


def deformable_differences(outputs, theirs):
    """The largest differences of logits and boxes, over all layers of the decoder.

    Queries whose scores are the same but for rounding come in any order.
    """
    got = outputs.layers.logits, outputs.layers.boxes
    if outputs.encoder is not None:
        logits, boxes = outputs.encoder
        chosen = take(boxes, best(logits[..., 0], outputs.boxes.shape[1]))
        got = in_order(got, same_order(chosen, theirs.init_reference_points))
    want = theirs.layer_logits, theirs.layer_boxes
    return tuple(largest_difference(*pair) for pair in zip(got, want, strict=True))
