"""Detections in COCO's JSON, which pycocotools reads.

https://cocodataset.org/#format-results: every detection has ``image_id``, ``category_id``,
``bbox`` (x, y, width, height, in pixels) and ``score``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .inference import Detections
from .labels import COCO

# COCO numbers its 80 categories from 1 to 90.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORIES = tuple(number for number in range(1, 91) if number not in UNUSED)


def category_ids(names: Mapping[int, str]) -> dict[int, int]:
    """By label: COCO's own number if the labels are COCO's 80 in order, else the label itself."""
    # Some files call a motorcycle a motorbike, but the ends are the same.
    ends = names.get(0), names.get(len(COCO) - 1)
    if len(names) == len(COCO) and ends == (COCO[0], COCO[-1]):
        return dict(enumerate(CATEGORIES))
    return {label: label for label in names}


def image_ids(paths: Sequence[Path]) -> list[int]:
    """Of files named by numbers, as COCO's are, the numbers; else 1 and on."""
    names = [path.stem for path in paths]
    if all(name.isascii() and name.isdigit() for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def results_of(
    found: Detections, image_id: int, categories: Mapping[int, int]
) -> list[dict[str, Any]]:
    """The detections of a picture in COCO's result format.

    Args:
        found (Detections): What was detected.
        image_id (int): The picture's number.
        categories (dict): By label, the category's number; see :func:`category_ids`.
    """
    return [
        {
            "image_id": image_id,
            "category_id": categories.get(int(label), int(label)),
            "bbox": [float(side) for side in (*box[:2], *(box[2:] - box[:2]))],
            "score": float(score),
        }
        for box, score, label in zip(*found, strict=True)
    ]


def dataset(
    images: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Results with the pictures and categories that they speak of, as a COCO data set.

    ``COCO(file)`` of pycocotools reads it; its ``annotations`` are the list that
    ``COCO.loadRes`` takes.

    Args:
        images: Dictionaries with ``id``, ``file_name``, ``width`` and ``height``.
        results: Of :func:`results_of`.
        names: Of the labels.
    """
    numbers = category_ids(names)
    annotations = [
        {"id": index, **result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for index, result in enumerate(results, 1)
    ]
    return {
        "images": list(images),
        "annotations": annotations,
        "categories": [{"id": numbers[label], "name": name} for label, name in names.items()],
    }
