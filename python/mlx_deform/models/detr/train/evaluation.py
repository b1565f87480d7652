"""COCO's mean average precision of detections on scenes whose objects are known."""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..coco import dataset, results_of
from ..detector import Detector
from ..inference import Detections, detections_of
from .scenes import CLASSES, SIDE, Scene, pixels_of

CHUNK = 25  # pictures at a time
NAMES = dict(enumerate(CLASSES))
NUMBERS = {label: label for label in NAMES}  # of the categories


class Precision(NamedTuple):
    """Means over the classes, between 0 and 1; NaN of a class without objects.

    mean: over IoU thresholds from 0.5 to 0.95. half: at IoU 0.5. by_class: at IoU 0.5.
    """

    mean: float
    half: float
    by_class: dict[str, float]


def find(model: Detector, scenes: Sequence[Scene]) -> list[Detections]:
    """As many detections for each scene as the model has queries, however unsure."""
    found = []
    for start in range(0, len(scenes), CHUNK):
        part = scenes[start : start + CHUNK]
        outputs = model(pixels_of(part))
        mx.eval(outputs.logits, outputs.boxes)
        found += detections_of(outputs, [(SIDE, SIDE)] * len(part), threshold=0)
    return found


def average_precision(scenes: Sequence[Scene], found: Sequence[Detections]) -> Precision:
    """pycocotools' figures of what was found in the scenes."""
    objects = [
        Detections(scene.boxes, np.ones(len(scene.labels)), scene.labels) for scene in scenes
    ]
    truth, results = (
        [entry for index, one in enumerate(part) for entry in results_of(one, index, NUMBERS)]
        for part in (objects, found)
    )
    if not results:
        return Precision(0.0, 0.0, dict.fromkeys(CLASSES, 0.0))
    images = [{"id": index, "width": SIDE, "height": SIDE} for index in range(len(scenes))]
    data = dataset(images, truth, NAMES)
    # pycocotools takes an annotation of number 0 for none.
    for number, annotation in enumerate(data["annotations"], start=1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **data}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # Axes: IoU thresholds, recalls, classes; all areas, at most 100 detections. -1 where a class
    # has no objects.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    by_class = precision[0].mean(axis=0)
    return Precision(
        float(np.nanmean(precision)),
        float(np.nanmean(by_class)),
        dict(zip(CLASSES, map(float, by_class), strict=True)),
    )
