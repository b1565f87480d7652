"""Losses of the classes: each class by itself says whether an object is one of it."""

import mlx.core as mx
import mlx.nn as nn


def sigmoid_focal_loss(
    logits: mx.array, targets: mx.array, alpha: float = 0.25, gamma: float = 2.0
) -> mx.array:
    """Focal loss: cross-entropy that gives less weight to what is predicted well already.

    With ``p`` the probability given to the truth, ``-a (1 - p)**gamma log(p)``, where ``a`` is
    alpha for what is there and 1 - alpha for what isn't. Lin et al., "Focal Loss for Dense
    Object Detection", arXiv:1708.02002.

    Args:
        logits (array): Of any shape.
        targets (array): Of that shape, 1 where the class is there, else 0.
        alpha (float): In [0, 1].
        gamma (float): 0 gives the weighted cross-entropy.

    Returns:
        array: The loss of each element, of that shape.
    """
    probability = mx.sigmoid(logits)
    missed = probability * (1 - targets) + (1 - probability) * targets
    weights = (alpha * targets + (1 - alpha) * (1 - targets)) * missed**gamma
    return weights * nn.losses.binary_cross_entropy(logits, targets, reduction="none")


def varifocal_loss(
    logits: mx.array,
    scores: mx.array,
    targets: mx.array,
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> mx.array:
    """Varifocal loss: the probability of an object's class shall be how well its box fits.

    Cross-entropy with the scores; what is there is weighted by its score, what isn't by
    ``alpha * p**gamma``, ``p`` the probability. Weights and scores have no gradient. Zhang et al.,
    "VarifocalNet", arXiv:2008.13367; as in RT-DETR, arXiv:2304.08069.

    Args:
        logits (array): Of any shape.
        scores (array): Of that shape: the IoU with its object for an object's class, else 0.
        targets (array): Of that shape, 1 for an object's class, else 0.
        alpha (float): At least 0.
        gamma (float): At least 0.

    Returns:
        array: The loss of each element, of that shape.
    """
    scores = mx.stop_gradient(scores)
    probability = mx.stop_gradient(mx.sigmoid(logits))
    weights = alpha * probability**gamma * (1 - targets) + scores
    return weights * nn.losses.binary_cross_entropy(logits, scores, reduction="none")
