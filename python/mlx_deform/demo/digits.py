"""scikit-learn's handwritten digits, rotated, scaled and sheared at random."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .._ext import deform_conv2d

PIXELS = 8  # the width and height of the digits as they ship
CANVAS = 20  # and of the images that the networks see
MAGNIFICATION = 1.75  # a digit that isn't scaled is 14 pixels wide
TRAINING_DIGITS = 1347  # of 1797
TEST_WARPS = 4  # of each test digit


@dataclass(frozen=True)
class Ranges:
    """What the warps are drawn from, uniformly."""

    rotation: float = 60  # degrees, either way
    smallest: float = 0.5  # scale
    largest: float = 1.25
    shear: float = 0.4  # either way

    def __str__(self):
        return (
            f"rotated by up to {self.rotation:g} degrees, scaled by {self.smallest:g} to "
            f"{self.largest:g}, sheared by up to {self.shear:g}"
        )


def random_warps(rng, count, ranges):
    """(count, 2, 2): from a pixel of the canvas to one of the digit, both from their middles."""
    angle = np.radians(rng.uniform(-ranges.rotation, ranges.rotation, count))
    height, width = rng.uniform(ranges.smallest, ranges.largest, (2, count)) * MAGNIFICATION
    shear = rng.uniform(-ranges.shear, ranges.shear, count)
    forward = np.empty((count, 2, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    forward[:, 0] = np.stack([height * cos, width * (shear * cos - sin)], -1)
    forward[:, 1] = np.stack([height * sin, width * (shear * sin + cos)], -1)
    return np.linalg.inv(forward)


def warp(digits, warps):
    """The warped digits, (N, CANVAS, CANVAS, 1), as a deformable convolution of 1x1 makes them.

    digits: (N, PIXELS, PIXELS), warps: (N, 2, 2), both NumPy.
    """
    margin = (CANVAS - PIXELS) // 2
    canvas = np.pad(digits, ((0, 0), (margin, margin), (margin, margin)))[..., None]
    pixels = np.indices((CANVAS, CANVAS)).transpose(1, 2, 0) - (CANVAS - 1) / 2
    samples = np.einsum("nij,hwj->nhwi", warps, pixels)
    offset = mx.array((samples - pixels).astype(np.float32))
    return deform_conv2d(mx.array(canvas.astype(np.float32)), offset, mx.ones((1, 1, 1, 1)))


class Digits:
    """Digits to train on, warped anew each time, and others to test on, warped once for all."""

    def __init__(self, ranges=Ranges(), training=TRAINING_DIGITS, test=None):
        from sklearn.datasets import load_digits

        digits, labels = load_digits(return_X_y=True)
        digits = digits.reshape(-1, PIXELS, PIXELS).astype(np.float32) / 16
        rng = np.random.default_rng(0)
        order = rng.permutation(len(digits))
        train, rest = order[:training], order[TRAINING_DIGITS:][:test]
        self.ranges = ranges
        self.digits, self.labels = digits[train], labels[train]
        self.test_labels = np.tile(labels[rest], TEST_WARPS)
        warps = random_warps(rng, len(self.test_labels), ranges)
        self.test_images = warp(np.tile(digits[rest], (TEST_WARPS, 1, 1)), warps)

    def __len__(self):
        return len(self.labels)

    def batches(self, rng, size, rank=0, ranks=1):
        """One epoch: pairs of images and labels, of which every rank gets its equal share.

        All ranks must draw from generators in the same state.
        """
        order = rng.permutation(len(self))
        for start in range(0, len(order) - size + 1, size):
            warps = random_warps(rng, size, self.ranges)
            mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
            chosen = order[start : start + size][mine]
            yield warp(self.digits[chosen], warps[mine]), mx.array(self.labels[chosen])
