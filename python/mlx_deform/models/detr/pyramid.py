"""The maps of a batch of pictures: their sizes, and how much of each is picture.

Pictures of different sizes are padded at the bottom and on the right to make a batch. Of
every map it is known where it is padding, and points are given in units of its part that is
not ("Deformable DETR", arXiv:2010.04159, and models/deformable_transformer.py of its code).
"""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np


def nearest(mask: mx.array, shape: tuple[int, int]) -> mx.array:
    """A mask (N, H, W) at another size: of each pixel the nearest above and left of it."""

    def places(size, new):
        # In float32, as torch.nn.functional.interpolate computes them.
        floor = np.floor(np.arange(new, dtype=np.float32) * np.float32(size / new))
        return mx.array(np.minimum(floor.astype(np.int32), size - 1))

    (H, W), (h, w) = mask.shape[1:], shape
    return mask[:, places(H, h)][:, :, places(W, w)]


class Pyramid:
    """Maps of L levels, S pixels together; without padding N is 1 in what it gives.

    Args:
        shapes (sequence): The sizes (H, W) of the maps, large to small.
        mask (array, optional): Of the pictures, boolean, of shape (N, height, width): True where
            they are padding. Default: there is none.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], mask: mx.array | None = None):
        self.shapes = [tuple(shape) for shape in shapes]
        self._masks = None if mask is None else [nearest(mask, shape) for shape in self.shapes]

    @functools.cached_property
    def mask(self) -> mx.array | None:
        """Boolean (N, S), True where the maps are padding; None without padding."""
        if self._masks is None:
            return None
        return mx.concatenate([mask.flatten(1) for mask in self._masks], axis=1)

    @functools.cached_property
    def inside(self) -> list[mx.array]:
        """Of each level, float32 of shape (N, H, W): 1 where it is picture, 0 where padding."""
        if self._masks is None:
            return [mx.ones((1, *shape)) for shape in self.shapes]
        return [mx.logical_not(mask).astype(mx.float32) for mask in self._masks]

    @functools.cached_property
    def _extents(self) -> list[mx.array]:
        """Of each level, (width, height) of the picture in pixels, of shape (N, 2)."""
        return [
            mx.stack([inside[:, 0].sum(axis=1), inside[:, :, 0].sum(axis=1)], axis=-1)
            for inside in self.inside
        ]

    @functools.cached_property
    def ratios(self) -> mx.array:
        """The picture's share of each map's width and height: (N, L, 2)."""
        sizes = [mx.array([float(w), float(h)]) for h, w in self.shapes]
        parts = [extent / size for extent, size in zip(self._extents, sizes, strict=True)]
        return mx.stack(parts, axis=1)

    @functools.cached_property
    def centres(self) -> mx.array:
        """The pixels' centres (x, y) in units of the picture: (N, S, 2)."""
        levels = []
        for (height, width), extent in zip(self.shapes, self._extents, strict=True):
            rows, columns = np.indices((height, width), np.float32).reshape(2, -1)
            pixels = mx.array(np.stack([columns, rows], axis=-1) + np.float32(0.5))
            levels.append(pixels[None] / extent[:, None])
        return mx.concatenate(levels, axis=1)

    def on_maps(self, points: mx.array) -> mx.array:
        """Points or boxes in units of the picture, in units of each map.

        points: (N, Q, 2), points (x, y), or (N, Q, 4), boxes (cx, cy, w, h). Gives
        (N, Q, L, 2 or 4); without padding all levels have the same, and L is 1.
        """
        if self._masks is None:
            return points[:, :, None]
        ratios = mx.tile(self.ratios, (1, 1, points.shape[-1] // 2))
        return points[:, :, None] * ratios[:, None]
