"""Pairs of frames cut from scikit-image's pictures: a noisy one, and a neighbour that moved."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from .._ext import deform_conv2d

# They come with scikit-image; halved, so that a frame shows more than a texture.
TRAINING = (
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "ihc.png",
    "rocket.jpg",
)
TEST = ("astronaut.png", "motorcycle_left.png")

SIDE = 48  # pixels of a frame
BLOCK = 16  # and of a block that has one motion vector, as in a video stream
SHIFT, BEND = 5, 2  # pixels that a frame moves at the most, and that its edges move beyond that
MARGIN = SHIFT + 2 * BEND  # around a frame, so that what moves in is there
NOISE, NEIGHBOUR_NOISE = 0.25, 0.05  # standard deviations, of values between 0 and 1
TEST_PAIRS = 64


@dataclass(frozen=True)
class Batch:
    """Frames of shape (N, SIDE, SIDE, 3), and vectors of (N, SIDE / BLOCK, SIDE / BLOCK, 2).

    A vector (dy, dx) says where in the neighbour a block of the frame is found, in pixels.
    """

    noisy: mx.array
    neighbour: mx.array
    vectors: mx.array
    truth: mx.array

    def __getitem__(self, part):
        return Batch(self.noisy[part], self.neighbour[part], self.vectors[part], self.truth[part])

    def __len__(self):
        return len(self.truth)


@cache
def load_picture(name):
    """(H, W, 3) between 0 and 1, of half the size of the file's."""
    import skimage.data
    import skimage.io

    picture = skimage.io.imread(Path(skimage.data.__file__).parent / name) / 255
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    height, width = (size // 2 for size in picture.shape[:2])
    halved = picture[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean((1, 3))
    return halved.astype(np.float32)


def random_motions(rng, count):
    """(count, patch, patch, 2) in pixels: shifts, turns, shears and zooms of a frame's patch."""
    shift = rng.uniform(-SHIFT, SHIFT, (count, 1, 1, 2))
    bend = rng.uniform(-BEND, BEND, (count, 2, 2)) / 2
    place = (np.indices((SIDE + 2 * MARGIN,) * 2) + 0.5 - SIDE / 2 - MARGIN) / (SIDE / 2)
    return (shift + np.einsum("nij,jhw->nhwi", bend, place)).astype(np.float32)


def warp(patches, motions):
    """Each pixel of the patches, (N, H, W, 3), fetched from as far away as its motion says."""
    every_channel = mx.eye(3)[:, None, None]
    return deform_conv2d(mx.array(patches), mx.array(motions), every_channel)


def random_patches(rng, names, count):
    """(count, patch, patch, 3): frames and what is around them."""
    side = SIDE + 2 * MARGIN
    patches = []
    for name in rng.choice(names, count):
        picture = load_picture(str(name))
        row, column = (rng.integers(size - side + 1) for size in picture.shape[:2])
        patch = picture[row : row + side, column : column + side]
        patches.append(patch[:, :: rng.choice((-1, 1))])
    return np.stack(patches)


def random_batch(rng, names, count, rank=0, ranks=1):
    """The share of a rank in a batch; all ranks draw from generators in the same state."""
    patches, motions = random_patches(rng, names, count), random_motions(rng, count)
    noise = rng.standard_normal((2, count, SIDE, SIDE, 3)).astype(np.float32)
    mine = slice(rank * count // ranks, (rank + 1) * count // ranks)
    patches, motions, noise = patches[mine], motions[mine], noise[:, mine]

    inner = slice(MARGIN, MARGIN + SIDE)
    truth = mx.array(patches[:, inner, inner])
    neighbour = warp(patches, motions)[:, inner, inner]
    blocks = SIDE // BLOCK
    tiles = motions[:, inner, inner].reshape(-1, blocks, BLOCK, blocks, BLOCK, 2)
    return Batch(
        truth + NOISE * mx.array(noise[0]),
        neighbour + NEIGHBOUR_NOISE * mx.array(noise[1]),
        -mx.array(tiles.mean((2, 4))),  # a pixel that fetched from there is found back here
        truth,
    )


class Frames:
    """Pairs to train on, drawn anew for each step, and pairs of other pictures to test on."""

    def __init__(self, test_pairs=TEST_PAIRS):
        self.test = random_batch(np.random.default_rng(0), TEST, test_pairs)

    def batches(self, rng, steps, size, rank=0, ranks=1):
        for _ in range(steps):
            yield random_batch(rng, TRAINING, size, rank, ranks)
