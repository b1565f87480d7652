"""Detections drawn over a picture."""

import colorsys
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from ..pictures import to_rgb
from .inference import Detections

# Of the circle of hues from one label to the next, so that neighbours differ: the golden ratio.
TURN = 0.618034


def colour_of(label: int) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * TURN % 1, 0.8, 0.95))


def draw(picture: Image.Image, found: Detections, names: Mapping[int, str]) -> Image.Image:
    """The picture with the boxes, their labels and scores, the surest on top.

    Args:
        picture (PIL.Image.Image): Of any mode; it stays as it is.
        found (Detections): What was detected in it.
        names (dict): Of the labels.

    Returns:
        PIL.Image.Image: Of mode RGB and the picture's size.
    """
    picture = to_rgb(picture).copy()
    pen = ImageDraw.Draw(picture)
    unit = max(picture.size) / 500  # boxes and letters look alike in pictures of all sizes
    width = max(1, round(unit * 1.5))
    font = ImageFont.load_default(max(10, round(unit * 9)))
    for box, score, label in reversed(list(zip(*found, strict=True))):
        colour = colour_of(int(label))
        x1, y1, x2, y2 = (float(side) for side in box)
        if not (x1 <= x2 and y1 <= y2):  # of a network that gives no numbers, say
            continue
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        text = f"{names.get(int(label), int(label))} {score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        wide, high = right - left + 2 * width, bottom - top + 2 * width
        x = max(0, min(x1, picture.width - wide))
        y = max(0, y1 - high)
        pen.rectangle((x, y, x + wide, y + high), fill=colour)
        dark = sum(colour) < 400
        at = x + width - left, y + width - top
        pen.text(at, text, fill="white" if dark else "black", font=font)
    return picture
