"""From pixels to queries: anchors of every pixel, and the most promising of them."""

import mlx.core as mx
import numpy as np

from .pyramid import Pyramid

# Width and height of an anchor on the first level, in units of the picture; twice that on the next.
ANCHOR_SIZE = 0.05
# Anchors nearer to the picture's border are of no use.
MARGIN = 0.01


def anchors(pyramid: Pyramid) -> tuple[mx.array, mx.array]:
    """A box around every pixel of a batch's maps.

    Returns:
        tuple: float32 logits of (cx, cy, w, h), of shape ``(N, S, 4)``, the largest float32 where
        the box is of no use; and boolean ``(N, S, 1)``, whether it is of use. Without padding
        ``N`` is 1.
    """
    centres = pyramid.centres
    sizes = [
        np.full((h * w, 2), ANCHOR_SIZE * 2**level, np.float32)
        for level, (h, w) in enumerate(pyramid.shapes)
    ]
    sizes = mx.broadcast_to(mx.array(np.concatenate(sizes)), centres.shape)
    boxes = mx.concatenate([centres, sizes], axis=-1)
    valid = ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(axis=-1, keepdims=True)
    if pyramid.mask is not None:
        valid &= mx.logical_not(pyramid.mask)[..., None]
    logits = mx.log(boxes / (1 - boxes))
    return mx.where(valid, logits, mx.finfo(mx.float32).max), valid


def best(scores: mx.array, count: int) -> mx.array:
    """Where the ``count`` largest of each row are, largest first: (N, S) to (N, count)."""
    if scores.shape[1] < count:
        raise ValueError(
            f"[detr] a picture must have at least num_queries = {count} places on its maps; "
            f"got {scores.shape[1]}"
        )
    return mx.argsort(-mx.stop_gradient(scores), axis=1)[:, :count]


def take(x: mx.array, places: mx.array) -> mx.array:
    """Rows of (N, S, C) at (N, Q): an array of shape (N, Q, C)."""
    return mx.take_along_axis(x, places[..., None], axis=1)
