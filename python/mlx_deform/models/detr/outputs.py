"""What detectors take and give in training, and what they give of a picture."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Target(NamedTuple):
    """The objects of one picture of a batch.

    labels: integers of shape (n,). boxes: (cx, cy, w, h) in units of the picture, of shape (n, 4).
    """

    labels: np.ndarray
    boxes: np.ndarray


class DenoisingQueries(NamedTuple):
    """Noisy copies of the targets that the decoder is to repair, D of them for each picture.

    labels: integers of shape (N, D); ``num_classes`` marks padding. boxes: logits of
    (cx, cy, w, h), of shape (N, D, 4). blocked: boolean, of shape (D + Q, D + Q), True where a
    query may not attend to another. positives: for each picture, the places among the D of its
    positive copies, group by group. groups: the number of copies of the targets.
    """

    labels: mx.array
    boxes: mx.array
    blocked: mx.array
    positives: list[np.ndarray]
    groups: int


@dataclass
class LayerOutputs:
    """Predictions of every decoder layer: axes are (N, layers, queries, ...), boxes (cx, cy, w, h).

    corners: of D-FINE alone, the logits of the distributions of the four edges; references: the
    boxes that they are relative to.
    """

    logits: mx.array
    boxes: mx.array
    corners: mx.array | None = None
    references: mx.array | None = None


@dataclass
class DetectorOutputs:
    """What a detector gives of a batch of N pictures.

    logits: (N, Q, classes) of the last layer, before the sigmoid. boxes: (N, Q, 4) of the last
    layer, (cx, cy, w, h) in units of the picture. layers: the same of every decoder layer.
    encoder: what the encoder proposed: logits (N, Q, classes) and boxes (N, Q, 4), of the
    selected proposals (RT-DETR, D-FINE) or of all (Deformable DETR in two stages). denoising:
    of the denoising queries, in training. initial: D-FINE's boxes before the first layer and
    its ``pre`` logits, with the layers' form and a single layer.
    """

    logits: mx.array
    boxes: mx.array
    layers: LayerOutputs
    encoder: tuple[mx.array, mx.array] | None = None
    denoising: LayerOutputs | None = None
    initial: LayerOutputs | None = None
    initial_denoising: LayerOutputs | None = None


def split(
    predictions: LayerOutputs, denoising: DenoisingQueries | None
) -> tuple[LayerOutputs | None, LayerOutputs]:
    """What the decoder predicts of the denoising queries, which are first, and of the others."""
    if denoising is None:
        return None, predictions
    count = denoising.labels.shape[1]
    arrays = vars(predictions).values()
    return (
        LayerOutputs(*(None if a is None else a[:, :, :count] for a in arrays)),
        LayerOutputs(*(None if a is None else a[:, :, count:] for a in arrays)),
    )
