"""Held-out scenes with what was found in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..drawing import draw
from ..inference import Detections
from .evaluation import NAMES
from .scenes import SIDE, Scene

SCALE = 3
GAP = 8
TITLE = 24  # pixels of height
THRESHOLD = 0.4  # of the scores that are drawn


def enlarged(scene: Scene, found: Detections) -> Image.Image:
    sure = found.scores > THRESHOLD
    shown = Detections(found.boxes[sure] * SCALE, found.scores[sure], found.labels[sure])
    picture = Image.fromarray(scene.picture)
    side = SIDE * SCALE
    return draw(picture.resize((side, side), Image.Resampling.BICUBIC), shown, NAMES)


def save(scenes: Sequence[Scene], found: Mapping[str, Sequence[Detections]], out: Path) -> None:
    """A PNG with a row of the scenes for each network.

    found: the detections in the scenes, by what the network is titled.
    """
    width, height = SIDE * SCALE + GAP, SIDE * SCALE + TITLE + GAP
    sheet = Image.new("RGB", (width * len(scenes) + GAP, height * len(found)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (title, detections) in enumerate(found.items()):
        pen.text((GAP, row * height + 2), title, fill="black", font=font)
        for column, pair in enumerate(zip(scenes, detections, strict=True)):
            sheet.paste(enlarged(*pair), (column * width + GAP, row * height + TITLE))
    sheet.save(out, format="PNG")
