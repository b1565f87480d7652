"""Pictures in, named boxes out, as transformers' ``post_process_object_detection`` has them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..pictures import read_picture
from .boxes import to_corners
from .detector import Detector
from .outputs import DetectorOutputs

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Detections", "detect", "detections_of", "read_picture"]

# By family: of how many detections the threshold chooses, where it isn't as many as queries.
MOST = {"deformable_detr": 100}


class Detections(NamedTuple):
    """What was found in a picture, the surest first.

    boxes: (x1, y1, x2, y2) in pixels of the picture, float32 of shape (n, 4). scores: float32 in
    [0, 1]. labels: integers; ``model.config.id2label`` has their names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def detections_of(
    outputs: DetectorOutputs,
    sizes: Sequence[tuple[int, int]],
    threshold: float = 0.5,
    most: int | None = None,
) -> list[Detections]:
    """The detections in each picture of a batch: the best pairs of a query and a class.

    Args:
        outputs (DetectorOutputs): Of the model.
        sizes (sequence of pairs): The pictures' heights and widths.
        threshold (float): Scores must be above it.
        most (int): How many at most. Default: the number of queries.
    """
    logits = np.array(outputs.logits.astype(mx.float32))
    scores = np.array(mx.sigmoid(outputs.logits.astype(mx.float32)))
    boxes = np.array(to_corners(outputs.boxes.astype(mx.float32)))
    queries, classes = logits.shape[1:]
    found = []
    for own, own_scores, own_boxes, (height, width) in zip(
        logits, scores, boxes, sizes, strict=True
    ):
        # Logits still tell apart what the sigmoid rounds to 1.
        order = np.argsort(-own, axis=None, kind="stable")[: most or queries]
        order = order[own_scores.flat[order] > threshold]
        scale = np.float32([width, height, width, height])
        chosen = own_boxes[order // classes] * scale
        found.append(Detections(chosen, own_scores.flat[order], order % classes))
    return found


def detect(
    model: Detector,
    picture: "Image.Image",
    threshold: float = 0.5,
    on_step: Callable[[], None] = lambda: None,
) -> Detections:
    """Finds and names the objects in a picture.

    Args:
        model (Detector): In evaluation mode; see :func:`load_model`. Its ``processor``, an
            :class:`ImageProcessor`, makes the picture its input.
        picture (PIL.Image.Image): Of any mode.
        threshold (float): Scores must be above it. Default: 0.5.
        on_step (callable): Called ``model.step_count`` times, after each step of the model.

    Returns:
        Detections: Boxes in pixels, scores and labels, the surest first.

    Raises:
        ValueError: If the model is in training mode, or can't take the picture.

    Example:
        >>> from mlx_deform.models.detr import load_model
        >>> from mlx_deform.models.detr.inference import detect, read_picture
        >>> model = load_model("rtdetr_r18vd")  # doctest: +SKIP
        >>> boxes, scores, labels = detect(model, read_picture("cat.jpg"))  # doctest: +SKIP
        >>> [model.config.id2label[int(label)] for label in labels]  # doctest: +SKIP
        ['cat']
    """
    if model.training:
        raise ValueError("[detr] the model must be in evaluation mode; call model.eval()")
    inputs = model.processor([picture], model.dtype)
    for result in model.steps(*inputs):
        mx.eval(result if isinstance(result, mx.array) else (result.logits, result.boxes))
        on_step()
    most = MOST.get(model.config.model_type)
    return detections_of(result, [(picture.height, picture.width)], threshold, most)[0]
