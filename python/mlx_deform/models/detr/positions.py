"""Where the pixels of a picture are, and where boxes are, told to attention as waves.

A coordinate becomes sines and cosines of many frequencies ("Attention Is All You Need",
arXiv:1706.03762, section 3.5), those of a pair side by side, as in DETR.
"""

import math

import mlx.core as mx
import mlx.nn as nn

TEMPERATURE = 10000.0

# Keeps the quotient finite where a map is padding from its first pixel.
EPSILON = 1e-6

# Rows, and columns, that learned positions are there for.
LEARNED = 50


def waves(x: mx.array, count: int) -> mx.array:
    """(...) to (..., count), float32: sin, cos, sin, cos of ever longer waves."""
    exponents = mx.arange(count // 2, dtype=mx.float32) / (count // 2)
    angles = x.astype(mx.float32)[..., None] * TEMPERATURE**-exponents
    return mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).flatten(-2)


def box_positions(boxes: mx.array, dims: int) -> mx.array:
    """Waves of boxes (cx, cy, w, h) in units of the picture: (..., 4) to (..., 4 * dims)."""
    return waves(boxes * (2 * math.pi), dims).flatten(-2)


class SinePositions(nn.Module):
    """Waves of the row and of the column, in units of the part of a map that is no padding.

    Args:
        dims (int): Channels; the first half tells the row.

    Call:
        ``positions(inside)`` with ``inside`` of shape ``(N, H, W)``, float32: 1 where the map is
        picture, 0 where it is padding; gives ``(N, H, W, dims)``, float32.
    """

    def __init__(self, dims: int):
        super().__init__()
        if dims % 4:
            raise ValueError(f"[SinePositions] dims must be divisible by 4; got {dims}")
        self._dims = dims

    def __call__(self, inside: mx.array) -> mx.array:
        rows, columns = mx.cumsum(inside, axis=1), mx.cumsum(inside, axis=2)
        y = (rows - 0.5) / (rows[:, -1:] + EPSILON) * (2 * math.pi)
        x = (columns - 0.5) / (columns[:, :, -1:] + EPSILON) * (2 * math.pi)
        return mx.concatenate([waves(y, self._dims // 2), waves(x, self._dims // 2)], axis=-1)


class LearnedPositions(nn.Module):
    """A vector of every column and one of every row, called as :class:`SinePositions` is."""

    def __init__(self, dims: int):
        super().__init__()
        self.row_embeddings = nn.Embedding(LEARNED, dims // 2)
        self.column_embeddings = nn.Embedding(LEARNED, dims // 2)

    def __call__(self, inside: mx.array) -> mx.array:
        _, H, W = inside.shape
        if max(H, W) > LEARNED:
            raise ValueError(
                f"[LearnedPositions] a map must have at most {LEARNED} rows and columns; "
                f"got {H} and {W}"
            )
        rows, columns = self.row_embeddings.weight[:H], self.column_embeddings.weight[:W]
        shape = (1, H, W, rows.shape[1])
        parts = [columns[None, None], rows[None, :, None]]
        return mx.concatenate([mx.broadcast_to(part, shape) for part in parts], axis=-1)
