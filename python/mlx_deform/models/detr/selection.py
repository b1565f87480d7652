"""From pixels to queries: anchors of every pixel, and the most promising of them."""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

# Width and height of an anchor on the first level, in units of the picture; twice that on the next.
ANCHOR_SIZE = 0.05
# Anchors nearer to the picture's border are of no use.
MARGIN = 0.01


@functools.lru_cache(maxsize=32)
def _anchors(shapes: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    boxes = []
    for level, (height, width) in enumerate(shapes):
        rows, columns = np.indices((height, width), np.float32)
        x, y = (columns + np.float32(0.5)) / width, (rows + np.float32(0.5)) / height
        size = np.full_like(x, ANCHOR_SIZE * 2**level)
        boxes.append(np.stack([x, y, size, size], axis=-1).reshape(-1, 4))
    boxes = np.concatenate(boxes)[None]
    valid = ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = np.log(boxes / (1 - boxes))
    return np.where(valid, logits, np.finfo(np.float32).max), valid


def anchors(shapes: Sequence[tuple[int, int]]) -> tuple[mx.array, mx.array]:
    """A box around every pixel of maps of these sizes (H, W), large to small.

    Returns:
        tuple: float32 logits of (cx, cy, w, h), of shape ``(1, S, 4)``, the largest float32 where
        the box is of no use; and boolean ``(1, S, 1)``, whether it is of use.
    """
    logits, valid = _anchors(tuple(tuple(shape) for shape in shapes))
    return mx.array(logits), mx.array(valid)


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
