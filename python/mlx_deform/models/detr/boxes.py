"""Boxes: their forms, their overlaps, and the logits that boxes are refined in.

A box is ``(x1, y1, x2, y2)``, two corners, or ``(cx, cy, w, h)``, its centre and size.
"""

import mlx.core as mx

# Sigmoids are inverted no closer to 0 and 1 than this.
EPSILON = 1e-5


def to_corners(boxes: mx.array) -> mx.array:
    """Corners ``(x1, y1, x2, y2)`` of boxes ``(cx, cy, w, h)``, of shape ``(..., 4)``."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return mx.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def to_centres(boxes: mx.array) -> mx.array:
    """Centres and sizes ``(cx, cy, w, h)`` of boxes ``(x1, y1, x2, y2)``, of shape ``(..., 4)``."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return mx.concatenate([(low + high) / 2, high - low], axis=-1)


def inverse_sigmoid(x: mx.array, epsilon: float = EPSILON) -> mx.array:
    """The logit of numbers in [0, 1], finite at its ends: each side is at least ``epsilon``."""
    x = mx.clip(x, 0, 1)
    return mx.log(mx.maximum(x, epsilon) / mx.maximum(1 - x, epsilon))


def area(boxes: mx.array) -> mx.array:
    """The areas of boxes ``(x1, y1, x2, y2)``; shape ``(..., 4)`` to ``(...)``."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _overlap(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Intersection and union of boxes, corresponding or broadcast."""
    low = mx.maximum(a[..., :2], b[..., :2])
    high = mx.minimum(a[..., 2:], b[..., 2:])
    sides = mx.maximum(high - low, 0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection, area(a) + area(b) - intersection


def iou(a: mx.array, b: mx.array) -> mx.array:
    """Intersection over union of boxes ``(x1, y1, x2, y2)``.

    Args:
        a (array): Of shape ``(..., 4)``.
        b (array): Of a shape that broadcasts with it: ``a[:, None]`` and ``b[None]`` give every
            pair.

    Returns:
        array: Of the common shape without its last axis.
    """
    intersection, union = _overlap(a, b)
    return intersection / union


def generalized_iou(a: mx.array, b: mx.array) -> mx.array:
    """Generalised IoU, in [-1, 1], of boxes as :func:`iou` takes them.

    Rezatofighi et al., "Generalized Intersection over Union", arXiv:1902.09630.
    """
    intersection, union = _overlap(a, b)
    low = mx.minimum(a[..., :2], b[..., :2])
    high = mx.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low)[..., 0] * (high - low)[..., 1]
    return intersection / union - (hull - union) / hull
