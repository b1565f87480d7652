"""Scenes to learn from: objects cut from photographs, pasted on others.

Training scenes and held-out ones have no background and no coin in common. The photographs come
with scikit-image and scikit-learn; nothing is downloaded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from sklearn.datasets import load_sample_image

from ..outputs import Target

CLASSES = ("cat", "coin", "cup", "face", "motorcycle", "shuttle")
SIDE = 96  # of a scene, in pixels
STORED = 112  # the longer side of a cut-out, in pixels

# Outlines in the photographs: ellipses by the corners around them, and polygons, x,y x,y ...
OUTLINES = {
    "cat": (
        skimage.data.chelsea,
        [],
        "32,0 395,0 372,62 362,140 345,185 312,225 296,268 262,298 95,298 48,205 30,120",
    ),
    "cup": (skimage.data.coffee, [(76, 72, 480, 385), (172, 17, 406, 212)], ""),
    "face": (skimage.data.astronaut, [(152, 16, 302, 142), (183, 70, 268, 190)], ""),
    "motorcycle": (
        lambda: skimage.data.stereo_motorcycle()[0],
        [(118, 238, 284, 404)],
        "92,208 150,152 250,165 330,208 430,172 455,120 478,72 512,76 562,130 556,186 640,262 "
        "682,336 684,412 664,444 622,442 560,380 520,300 508,330 452,382 390,384 330,432 318,384 "
        "250,380 200,270",
    ),
    "shuttle": (
        skimage.data.astronaut,
        [],
        "398,10 412,0 426,8 436,40 446,34 455,60 455,196 470,240 466,276 358,276 352,222 368,170 "
        "380,92 394,70",
    ),
}

# Photographs and the parts of them, (x1, y1, x2, y2), that show no object.
TRAINING_GROUNDS = (
    (skimage.data.brick, (0, 0, 512, 512)),
    (skimage.data.grass, (0, 0, 512, 512)),
    (skimage.data.hubble_deep_field, (0, 0, 1000, 872)),
    (skimage.data.immunohistochemistry, (0, 0, 512, 512)),
    (skimage.data.page, (0, 0, 384, 191)),
    (skimage.data.camera, (330, 130, 512, 512)),
    (skimage.data.astronaut, (40, 270, 260, 490)),
    (lambda: skimage.data.stereo_motorcycle()[0], (0, 0, 440, 150)),
    (lambda: load_sample_image("flower.jpg"), (0, 0, 640, 427)),
)
HELD_OUT_GROUNDS = (
    (skimage.data.gravel, (0, 0, 512, 512)),
    (skimage.data.retina, (200, 200, 1211, 1211)),
    (skimage.data.rocket, (0, 0, 640, 427)),
    (skimage.data.moon, (0, 0, 512, 512)),
    (skimage.data.text, (0, 0, 448, 172)),
    (lambda: load_sample_image("china.jpg"), (0, 0, 640, 427)),
)


class Scene(NamedTuple):
    """A picture, uint8 of shape (SIDE, SIDE, 3), and its objects.

    labels: indices into CLASSES, (n,). boxes: (x1, y1, x2, y2) in pixels, (n, 4).
    """

    picture: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray

    @property
    def target(self) -> Target:
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        boxes = np.concatenate([(low + high) / 2, high - low], axis=1) / SIDE
        return Target(self.labels, boxes.astype(np.float32))


def pixels_of(scenes: Sequence[Scene]) -> mx.array:
    """The pictures as a network takes them: (N, SIDE, SIDE, 3), in [0, 1]."""
    return mx.array(np.stack([scene.picture for scene in scenes]).astype(np.float32) / 255)


def photograph(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def cut(image: Image.Image, mask: Image.Image) -> Image.Image:
    """What the mask shows, with soft edges, no larger than it is stored."""
    rim = max(mask.size) // 50
    low, high = np.array(mask.getbbox()).reshape(2, 2)
    box = (*(low - rim), *(high + rim))
    image, mask = image.crop(box), mask.crop(box)
    mask = mask.filter(ImageFilter.GaussianBlur(max(mask.size) / 100))
    image.putalpha(mask)
    image.thumbnail((STORED, STORED), Image.Resampling.BICUBIC)
    return image


def outlined(name: str) -> Image.Image:
    source, ellipses, polygon = OUTLINES[name]
    image = photograph(source())
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    for ellipse in ellipses:
        draw.ellipse(ellipse, fill=255)
    if polygon:
        points = [tuple(map(int, point.split(","))) for point in polygon.split()]
        draw.polygon(points, fill=255)
    return cut(image, mask)


def coins() -> list[Image.Image]:
    """Every whole coin of the photograph, which get darker from the top to the bottom."""
    pixels = skimage.data.coins()
    light = ndimage.gaussian_filter(pixels.astype(float), 1.5)
    found = ndimage.binary_fill_holes(light > ndimage.uniform_filter(light, 91))
    regions, _ = ndimage.label(ndimage.binary_opening(found, iterations=4))
    cuts = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(regions), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        whole = rows.start > 0 and rows.stop < pixels.shape[0] and columns.stop < pixels.shape[1]
        if whole and 30 < height < 80 and 0.75 < width / height < 1.33:
            mask = Image.fromarray(np.uint8(255) * (regions == index))
            cuts.append(cut(photograph(pixels), mask))
    return cuts


def recoloured(pixels: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """uint8 pixels in another light: a factor for each colour, contrast and brightness."""
    gain = 1 + strength * rng.uniform(-0.4, 0.4, 3) + strength * rng.uniform(-0.5, 0.5)
    shift = strength * rng.uniform(-40, 40)
    return np.clip(pixels * gain + shift, 0, 255).astype(np.uint8)


class Scenes:
    """Draws scenes.

    held_out: whether those to test on.
    """

    def __init__(self, held_out: bool = False):
        part = slice(1, None, 2) if held_out else slice(0, None, 2)
        self.cuts = [coins()[part] if name == "coin" else [outlined(name)] for name in CLASSES]
        grounds = HELD_OUT_GROUNDS if held_out else TRAINING_GROUNDS
        self.grounds = [photograph(source()).crop(box) for source, box in grounds]

    def background(self, rng: np.random.Generator) -> np.ndarray:
        """A square of a photograph, turned and recoloured: (SIDE, SIDE, 3), uint8."""
        image = self.grounds[rng.integers(len(self.grounds))]
        side = rng.integers(min(SIDE, *image.size), min(*image.size, 5 * SIDE) + 1)
        x, y = (rng.integers(whole - side + 1) for whole in image.size)
        box = (x, y, x + side, y + side)
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
        pixels = np.rot90(pixels, rng.integers(4))
        return recoloured(pixels[:, :: rng.choice([-1, 1])], rng, 0.7)

    def object(self, label: int, rng: np.random.Generator) -> np.ndarray:
        """A cut-out, scaled, mirrored, turned and recoloured: (h, w, 4), uint8."""
        image = self.cuts[label][rng.integers(len(self.cuts[label]))]
        scale = rng.uniform(24, 56) / max(image.size)
        stretch = rng.uniform(0.85, 1.18)
        size = [
            max(round(side * scale * s), 8)
            for side, s in zip(image.size, (stretch, 1), strict=True)
        ]
        image = image.resize(size, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, expand=True)
        pixels = np.array(image)
        pixels[..., :3] = recoloured(pixels[..., :3], rng, 0.3)
        return pixels

    def scene(self, rng: np.random.Generator) -> Scene:
        """A background with one to five objects, of which some touch the border or each other."""
        picture = self.background(rng)
        owner = np.full((SIDE, SIDE), -1)  # the object that each pixel shows
        labels, areas = [], []
        for _ in range(rng.integers(1, 6)):
            label = rng.integers(len(CLASSES))
            pixels = self.object(label, rng)
            solid = pixels[..., 3] > 127
            height, width = solid.shape
            # Up to a fifth of an object may lie outside.
            y, x = (int(rng.uniform(-0.2 * s, SIDE - 0.8 * s)) for s in (height, width))
            top, left = max(-y, 0), max(-x, 0)
            pixels, solid = (a[top : SIDE - y, left : SIDE - x] for a in (pixels, solid))
            at = np.s_[max(y, 0) : y + height, max(x, 0) : x + width]
            hidden = np.bincount(owner[at][solid] + 1, minlength=len(areas) + 1)[1:]
            if (hidden > 0.1 * np.array(areas)).any():
                continue
            alpha = pixels[..., 3:] / np.float32(255)
            picture[at] = np.rint(alpha * pixels[..., :3] + (1 - alpha) * picture[at])
            owner[at][solid] = len(areas)
            labels.append(label)
            areas.append(solid.sum())
        boxes = [self.box(owner == index) for index in range(len(labels))]
        return Scene(picture, np.array(labels), np.array(boxes, np.float32).reshape(-1, 4))

    @staticmethod
    def box(shown: np.ndarray) -> tuple[int, int, int, int]:
        """Around the pixels of a boolean map."""
        rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
