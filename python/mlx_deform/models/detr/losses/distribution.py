"""D-FINE's losses of the distributions of a box's edges.

An edge's distance from its place in the reference box is the mean of a distribution over
``bins + 1`` distances that stand closer together near zero. Peng et al., "D-FINE: Redefine
Regression Task in DETRs as Fine-grained Distribution Refinement", arXiv:2410.13842.
"""

import mlx.core as mx
import mlx.nn as nn

from ..boxes import to_corners


def edge_distances(references: mx.array, boxes: mx.array, reg_scale: float) -> mx.array:
    """How far the edges of boxes are from the references, in ``1 / reg_scale`` of their size.

    Args:
        references (array): ``(cx, cy, w, h)`` of shape ``(M, 4)``.
        boxes (array): ``(cx, cy, w, h)`` of shape ``(M, 4)``.
        reg_scale (float): Sizes are divided by it.

    Returns:
        array: Outward distances of left, top, right and bottom, of shape ``(M, 4)``.
    """
    reg_scale = abs(reg_scale)
    corners = to_corners(boxes)
    centre = references[..., :2]
    outward = mx.concatenate([centre - corners[..., :2], corners[..., 2:] - centre], axis=-1)
    unit = references[..., 2:] / reg_scale + 1e-16
    return outward / mx.concatenate([unit, unit], axis=-1) - reg_scale / 2


def two_bins(distances: mx.array, values: mx.array) -> mx.array:
    """Distributions over the bins whose means are the distances: weights of two neighbours.

    Args:
        distances (array): Of shape ``(...)``; beyond the ends they count as the ends.
        values (array): What the bins stand for, ascending, of shape ``(bins + 1,)``.

    Returns:
        array: Of shape ``(..., bins + 1)``.
    """
    below = (values <= distances[..., None]).sum(-1) - 1
    below = mx.clip(below, 0, values.size - 2)
    low, high = values[below], values[below + 1]
    share = mx.clip((distances - low) / (high - low), 0, 1)[..., None]
    bin_ = mx.arange(values.size)
    below = below[..., None]
    return mx.where(bin_ == below, 1 - share, 0) + mx.where(bin_ == below + 1, share, 0)


def fine_grained_localization_loss(
    corners: mx.array, distributions: mx.array, ious: mx.array
) -> mx.array:
    """FGL: cross-entropy with the two bins beside the true distance, weighted by the IoU; eq. 6.

    After the distribution focal loss of Li et al., arXiv:2006.04388.

    Args:
        corners (array): Logits of shape ``(M, 4, bins + 1)``.
        distributions (array): Of the same shape, as :func:`two_bins` gives them.
        ious (array): Of shape ``(M,)``: how well each box fits.

    Returns:
        array: Of shape ``(M, 4)``.
    """
    if corners.size == 0:  # logsumexp refuses empty arrays
        return mx.zeros(corners.shape[:-1])
    return ious[:, None] * nn.losses.cross_entropy(corners, distributions, reduction="none")


def decoupled_distillation_loss(
    corners: mx.array,
    teacher: mx.array,
    weights: mx.array,
    matched: mx.array,
    temperature: float = 5.0,
) -> mx.array:
    """DDF: a layer's distributions learn from those of the last layer; eq. 8.

    The weighted divergence from the teacher, its mean over matched and over other queries by
    themselves, and of the two the mean by the roots of their numbers.

    Args:
        corners (array): Logits of shape ``(N, Q, 4, bins + 1)``.
        teacher (array): Logits of the same shape; no gradient goes there.
        weights (array): Of shape ``(N, Q)``: the IoU of what is matched, of others the
            teacher's confidence.
        matched (array): Boolean, of shape ``(N, Q)``.
        temperature (float): Both distributions are softened by it.

    Returns:
        array: A number.
    """
    student = nn.log_softmax(corners / temperature, axis=-1)
    teacher = nn.log_softmax(mx.stop_gradient(teacher) / temperature, axis=-1)
    divergence = (mx.exp(teacher) * (teacher - student)).sum(-1)
    loss = temperature**2 * mx.stop_gradient(weights) * divergence.mean(-1)

    total = norm = 0.0
    for group in (matched, ~matched):
        number = group.sum()
        root = mx.sqrt(number.astype(mx.float32))
        total = total + root * mx.where(group, loss, 0).sum() / mx.maximum(number, 1)
        norm = norm + root
    return total / norm
