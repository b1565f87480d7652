"""Which prediction is held to which object: one-to-one matching of the least total cost.

Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, section 3.1;
the focal form of the classification's cost is Deformable DETR's, arXiv:2010.04159.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..boxes import generalized_iou, to_corners
from ..outputs import Target

# Matched (queries, objects) of one picture, two integer arrays of shape (m,).
Match = tuple[np.ndarray, np.ndarray]


class Prediction(NamedTuple):
    """What one depth of a detector predicts: logits (N, Q, classes), boxes (N, Q, 4) cxcywh.

    corners: of D-FINE, logits (N, Q, 4 * (bins + 1)) of the distributions of the edges;
    references: the boxes (N, Q, 4) they are relative to; teacher: what they learn from.
    """

    logits: mx.array
    boxes: mx.array
    corners: mx.array | None = None
    references: mx.array | None = None
    teacher: "Prediction | None" = None


class MatchingCosts(NamedTuple):
    """The weights of the terms of the cost; alpha and gamma as in the focal loss.

    focal: whether the classification's cost is the focal loss of a sigmoid, or else the
    probability of a softmax.
    """

    classification: float
    boxes: float
    giou: float
    alpha: float = 0.25
    gamma: float = 2.0
    focal: bool = True


class Pairs(NamedTuple):
    """The matches of a whole batch: M predictions and the objects they are held to.

    places: (M,), in predictions flattened to (N * Q, ...). labels: (M,). boxes: (M, 4), cxcywh.
    count: what sums over the pairs are divided by, at least 1.
    """

    places: np.ndarray
    labels: np.ndarray
    boxes: mx.array
    count: float


def check_targets(targets: Sequence[Target], num_labels: int) -> list[Target]:
    """The targets as arrays of the right types.

    Raises:
        ValueError: If labels aren't integers in [0, num_labels), or boxes aren't finite, of the
            labels' number, and of positive width and height.
    """
    checked = []
    for i, (labels, boxes) in enumerate(targets):
        labels, boxes = np.asarray(labels), np.asarray(boxes, np.float32)
        if labels.size == 0:
            labels, boxes = np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"[criterion] labels must be integers of shape (n,); got {labels.dtype} of shape "
                f"{labels.shape} in targets[{i}]"
            )
        if boxes.shape != (len(labels), 4):
            raise ValueError(
                f"[criterion] boxes must have shape (n, 4), n the number of labels, "
                f"{len(labels)}; got {boxes.shape} in targets[{i}]"
            )
        wrong = labels[(labels < 0) | (labels >= num_labels)]
        if wrong.size:
            raise ValueError(
                f"[criterion] labels must be in [0, {num_labels}); got {wrong[0]} in targets[{i}]"
            )
        wrong = boxes[~(np.isfinite(boxes).all(-1) & (boxes[:, 2:] > 0).all(-1))]
        if len(wrong):
            raise ValueError(
                "[criterion] boxes must be finite (cx, cy, w, h) with w, h > 0; got "
                f"{wrong[0].tolist()} in targets[{i}]"
            )
        checked.append(Target(labels, boxes))
    return checked


def class_cost(logits: mx.array, labels: mx.array, costs: MatchingCosts) -> mx.array:
    """What it costs a query to take an object of a class.

    Args:
        logits (array): Of shape ``(N, Q, classes)``.
        labels (array): Integers of shape ``(N, T)``.
        costs (MatchingCosts): Its alpha, gamma and focal are read.

    Returns:
        array: Of shape ``(N, Q, T)``.
    """
    probability = mx.sigmoid(logits) if costs.focal else mx.softmax(logits, axis=-1)
    probability = mx.take_along_axis(
        probability,
        mx.broadcast_to(labels[:, None], (*logits.shape[:2], labels.shape[1])),
        axis=-1,
    )
    if not costs.focal:
        return -probability
    rest, tiny = 1 - probability, 1e-8
    present = -costs.alpha * rest**costs.gamma * mx.log(probability + tiny)
    absent = -(1 - costs.alpha) * probability**costs.gamma * mx.log(rest + tiny)
    return present - absent


def matching_cost(
    prediction: Prediction, labels: mx.array, boxes: mx.array, costs: MatchingCosts
) -> mx.array:
    """What each pair of a query and an object costs; float32, without gradient.

    Args:
        prediction (Prediction): Of N pictures and Q queries.
        labels (array): Integers of shape ``(N, T)``.
        boxes (array): ``(cx, cy, w, h)`` of shape ``(N, T, 4)``.
        costs (MatchingCosts): The weights.

    Returns:
        array: Of shape ``(N, Q, T)``.
    """
    logits, predicted = (mx.stop_gradient(x).astype(mx.float32) for x in prediction[:2])
    distance = mx.abs(predicted[:, :, None] - boxes[:, None]).sum(-1)
    giou = generalized_iou(to_corners(predicted)[:, :, None], to_corners(boxes)[:, None])
    return (
        costs.boxes * distance
        + costs.classification * class_cost(logits, labels, costs)
        - costs.giou * giou
    )


def match(
    predictions: dict[str, Prediction], targets: Sequence[Target], costs: MatchingCosts
) -> dict[str, list[Match]]:
    """The one-to-one matching of least cost, of every prediction and picture by itself.

    All costs are evaluated at once and brought to the host, where scipy solves the assignments.
    That works inside ``mx.grad``, whose graph goes on; not inside ``mx.compile``.

    Args:
        predictions (dict): Predictions by name.
        targets (list(Target)): The objects of each picture.
        costs (MatchingCosts): The weights.

    Returns:
        dict: For each name, for each picture the matched queries, ascending, and their objects:
        as many as there are of the fewer.

    Raises:
        ValueError: If a prediction isn't finite.
        ImportError: If scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError(
            "matching predictions with objects needs scipy: pip install 'mlx-deform[detr]'"
        ) from None

    sizes = [len(target.labels) for target in targets]
    # Padded to the most objects of a picture; what the padding costs is cut off on the host.
    labels = np.zeros((len(targets), max(sizes, default=0)), np.int32)
    boxes = np.full((*labels.shape, 4), 0.5, np.float32)
    for i, target in enumerate(targets):
        labels[i, : sizes[i]], boxes[i, : sizes[i]] = target
    labels, boxes = mx.array(labels), mx.array(boxes)

    finite = {
        (name, part): mx.isfinite(mx.stop_gradient(getattr(prediction, part))).all()
        for name, prediction in predictions.items()
        for part in ("logits", "boxes")
    }
    table = {
        name: matching_cost(prediction, labels, boxes, costs)
        for name, prediction in predictions.items()
    }
    mx.eval(finite, table)
    for (name, part), fine in finite.items():
        if not fine.item():
            raise ValueError(
                f"[criterion] predictions must be finite; got NaN or infinity in the {part} of "
                f"{name or 'the last layer'}: the model has probably diverged"
            )
    return {
        name: [
            linear_sum_assignment(cost[:, :size])
            for cost, size in zip(np.array(costs_of_name), sizes, strict=True)
        ]
        for name, costs_of_name in table.items()
    }


def union(matchings: Sequence[Sequence[Match]]) -> list[Match]:
    """For each picture, the matches of all matchings; a query keeps its most frequent object.

    An object may have several queries then: D-FINE's layers are all held to all of them
    (Peng et al., "D-FINE", arXiv:2410.13842, section 4.2).
    """
    united = []
    for matches in zip(*matchings, strict=True):
        votes = Counter(
            pair for match in matches for pair in zip(*(x.tolist() for x in match), strict=True)
        )
        chosen: dict[int, int] = {}
        for (query, thing), _ in sorted(votes.items(), key=lambda vote: (-vote[1], vote[0])):
            chosen.setdefault(query, thing)
        queries = np.array(sorted(chosen), np.int64)
        united.append((queries, np.array([chosen[query] for query in queries], np.int64)))
    return united


def pairs_of(
    matches: Sequence[Match], targets: Sequence[Target], queries: int, count: float
) -> Pairs:
    """The matches of a batch of pictures of so many queries, in one row; ``count`` as in Pairs."""
    places = [i * queries + picked for i, (picked, _) in enumerate(matches)]
    objects = [
        (target.labels[taken], target.boxes[taken])
        for target, (_, taken) in zip(targets, matches, strict=True)
    ]
    labels, boxes = zip(*objects, strict=True)
    return Pairs(
        np.concatenate(places).astype(np.int32),
        np.concatenate(labels),
        mx.array(np.concatenate(boxes)),
        max(float(count), 1.0),
    )
