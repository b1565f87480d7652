"""Detectors' pictures in and boxes out, beside transformers' image processors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.deformable_detr.image_processing_deformable_detr import (
    DeformableDetrImageProcessor,
)
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import (
    DeformableDetrImageProcessorPil,
)
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.rt_detr.image_processing_rt_detr import RTDetrImageProcessor

from mlx_deform.models.detr.coco import CATEGORIES, category_ids, dataset, image_ids, results_of
from mlx_deform.models.detr.drawing import colour_of, draw
from mlx_deform.models.detr.inference import Detections, detections_of
from mlx_deform.models.detr.labels import COCO as LABELS
from mlx_deform.models.detr.outputs import DetectorOutputs
from mlx_deform.models.detr.preprocessing import (
    DEFORMABLE_DETR,
    RT_DETR,
    ImageProcessor,
    read_processor,
)


def picture(height, width, seed=0):
    """Noise over colours that change gently: small filters and large ones differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [100 + 60 * np.sin(x / 11 + y / 17 + phase) for phase in range(3)]
    noise = rng.integers(0, 80, (height, width, 3))
    return Image.fromarray((np.stack(planes, -1) + noise).astype(np.uint8))


# ---------------------------------------------------------------------------
# Preprocessing

# By name: transformers' class on Pillow, that on torchvision, and settings of a file.
FILES = {
    "rt_detr": (
        RTDetrImageProcessorPil,
        RTDetrImageProcessor,
        {"size": {"height": 96, "width": 64}},
    ),
    "defaults": (RTDetrImageProcessorPil, RTDetrImageProcessor, {}),
    "normalised": (
        RTDetrImageProcessorPil,
        RTDetrImageProcessor,
        {"size": {"height": 64, "width": 96}, "do_normalize": True, "image_std": [0.2, 0.3, 0.4]},
    ),
    "bicubic": (
        RTDetrImageProcessorPil,
        RTDetrImageProcessor,
        {"size": {"height": 64, "width": 96}, "resample": 3, "rescale_factor": 1 / 127},
    ),
    "in a box": (
        RTDetrImageProcessorPil,
        RTDetrImageProcessor,
        {"size": {"max_height": 90, "max_width": 70}},
    ),
    "in bytes": (
        RTDetrImageProcessorPil,
        RTDetrImageProcessor,
        {"size": {"height": 64, "width": 96}, "do_rescale": False},
    ),
    "deformable_detr": (
        DeformableDetrImageProcessorPil,
        DeformableDetrImageProcessor,
        {"size": {"shortest_edge": 80, "longest_edge": 133}},
    ),
    "padded": (
        DeformableDetrImageProcessorPil,
        DeformableDetrImageProcessor,
        {
            "size": {"shortest_edge": 80, "longest_edge": 133},
            "pad_size": {"height": 140, "width": 150},
        },
    ),
    "as they are": (
        DeformableDetrImageProcessorPil,
        DeformableDetrImageProcessor,
        {"do_resize": False},
    ),
}


def ours(pictures, processor):
    """Pixels and mask as transformers has them: channels first, 1 where the picture is."""
    pixels, mask = processor(pictures)
    valid = np.ones(pixels.shape[:3], int) if mask is None else 1 - np.array(mask).astype(int)
    return np.array(pixels).transpose(0, 3, 1, 2), valid


@pytest.mark.parametrize("name", FILES)
def test_the_numbers_of_transformers(name):
    with_pillow, with_torchvision, settings = FILES[name]
    pictures = [picture(70, 117), picture(70, 117, seed=1)]
    if name in ("deformable_detr", "padded", "as they are"):
        pictures.append(picture(113, 61, seed=2))
    theirs = with_pillow(**settings)
    processor = ImageProcessor.from_json(theirs.to_dict())
    got, valid = ours(pictures, processor)
    want = theirs(pictures, return_tensors="np")
    np.testing.assert_array_equal(got, want["pixel_values"])
    if "pixel_mask" in want:
        np.testing.assert_array_equal(valid, want["pixel_mask"])
        assert 0 < valid.mean() < 1
    # torchvision's filter rounds a few 8-bit values to a neighbour.
    other = with_torchvision(**settings)(pictures, return_tensors="pt")["pixel_values"]
    step = 1.0 if not processor.do_rescale else processor.rescale_factor
    if processor.do_normalize:
        step /= min(processor.image_std)
    difference = np.abs(got - other.numpy())
    assert difference.max() <= 1.001 * step
    assert (difference < 1e-5).mean() > 0.98


@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (640, 480), (427, 640), (100, 1000), (80, 80), (80, 99), (333, 333)],
)
@pytest.mark.parametrize("size", [(800, 1333), (80, 133), (80, 80), (333, 5000)])
def test_sizes_with_the_proportions_kept(height, width, size):
    from transformers.image_transforms import get_size_with_aspect_ratio

    processor = ImageProcessor(size=dict(zip(("shortest_edge", "longest_edge"), size, strict=True)))
    assert processor.size_of(height, width) == get_size_with_aspect_ratio((height, width), *size)


def test_every_size_as_transformers_has_it():
    from transformers.image_transforms import get_size_with_aspect_ratio

    rng = np.random.default_rng(0)
    for height, width, shortest, extra in rng.integers(1, 900, (3000, 4)).tolist():
        longest = shortest + extra
        size = {"shortest_edge": shortest, "longest_edge": longest}
        got = ImageProcessor(size=size).size_of(height, width)
        assert got == get_size_with_aspect_ratio((height, width), shortest, longest)


def test_published_files():
    """Old files of the hub: a number for the size, names of before transformers 5."""
    old = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "DeformableDetrFeatureExtractor",
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_size": 1333,
        "size": 800,
    }
    assert ImageProcessor.from_json(old) == DEFORMABLE_DETR
    new = {
        "do_convert_annotations": True,
        "do_normalize": False,
        "do_pad": False,
        "do_rescale": True,
        "do_resize": True,
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "RTDetrImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "pad_size": None,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 640, "width": 640},
    }
    assert ImageProcessor.from_json(new) == RT_DETR
    assert ImageProcessor.from_json({}, "deformable_detr") == DEFORMABLE_DETR
    assert ImageProcessor.from_json({}, "d_fine") == RT_DETR
    assert ImageProcessor.from_json({**old, "pad_and_return_pixel_mask": False}).do_pad is False


@pytest.mark.parametrize("processor", [RT_DETR, DEFORMABLE_DETR])
def test_there_and_back(processor, tmp_path):
    import json

    text = json.dumps(processor.to_json())
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert read_processor(tmp_path, "rt_detr") == processor
    theirs = DeformableDetrImageProcessor if processor is DEFORMABLE_DETR else RTDetrImageProcessor
    again = ImageProcessor.from_json(theirs.from_dict(json.loads(text)).to_dict())
    assert again == processor


def test_masks_and_types():
    processor = ImageProcessor(size={"height": 32, "width": 64})
    pixels, mask = processor([picture(40, 50)], mx.float16)
    assert (pixels.shape, pixels.dtype, mask) == ((1, 32, 64, 3), mx.float16, None)
    grey = picture(40, 50).convert("L")
    assert processor([grey]).pixels.shape == (1, 32, 64, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 640}}, "size must have"),
        ({"size": {"height": 640, "width": 0}}, "size must have"),
        ({"size": {"height": -3, "width": 64}}, "positive integers"),
        ({"size": {"height": 64.5, "width": 64}}, "positive integers"),
        ({"size": "large"}, "size must have"),
        ({"resample": 9}, "resample must be one of Pillow's"),
        ({"image_mean": [0.5]}, "image_mean must be of 3"),
        ({"pad_size": {"height": 3}}, "pad_size must have"),
        ({"image_std": 0.5}, "settings must be"),
        ([], "must be a dictionary"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_json(settings)


def test_wrong_batches():
    proportions = {"shortest_edge": 32, "longest_edge": 99}
    with pytest.raises(ValueError, match="one size unless do_pad"):
        ImageProcessor(size=proportions)([picture(40, 50), picture(40, 60)])
    room = ImageProcessor(size=proportions, do_pad=True, pad_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="must fit pad_size"):
        room([picture(40, 50)])
    with pytest.raises(ValueError, match="at least one"):
        RT_DETR([])


def test_a_broken_file(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json' must hold one"):
        read_processor(tmp_path)


# ---------------------------------------------------------------------------
# Post-processing


def predictions(count=2, queries=130, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, (count, queries, classes)).astype(np.float32)
    boxes = rng.random((count, queries, 4), np.float32)
    return logits, boxes


@pytest.mark.parametrize("family", ["rt_detr", "deformable_detr"])
def test_detections_of_transformers(family):
    logits, boxes = predictions()
    sizes = [(50, 70), (33, 90)]
    raw = SimpleNamespace(logits=torch.from_numpy(logits), pred_boxes=torch.from_numpy(boxes))
    most, theirs = None, RTDetrImageProcessor()
    if family == "deformable_detr":
        most, theirs = 100, DeformableDetrImageProcessor()
    outputs = DetectorOutputs(mx.array(logits), mx.array(boxes), None)
    for threshold in (0.0, 0.6):
        want = theirs.post_process_object_detection(raw, threshold, sizes)
        got = detections_of(outputs, sizes, threshold, most)
        for own, other in zip(got, want, strict=True):
            assert len(own.scores) == (most or 130) or threshold > 0
            np.testing.assert_array_equal(own.labels, other["labels"])
            np.testing.assert_allclose(own.scores, other["scores"], rtol=1e-6)
            np.testing.assert_allclose(own.boxes, other["boxes"], rtol=1e-6, atol=1e-5)
            assert (own.scores > threshold).all()


def test_scores_that_round_to_one_keep_their_order():
    logits = np.full((1, 3, 2), -9, np.float32)
    logits[0, :, 1] = 30, 50, 40
    boxes = np.float32([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.2, 0.4], [0.75, 0.5, 0.1, 0.1]])
    outputs = DetectorOutputs(mx.array(logits), mx.array(boxes)[None], None)
    (found,) = detections_of(outputs, [(10, 20)])
    assert found.labels.tolist() == [1, 1, 1]
    np.testing.assert_allclose(found.boxes[0], [8, 3, 12, 7], rtol=1e-6)
    np.testing.assert_allclose(found.boxes[2], [0, 0, 10, 5], atol=1e-6)


def test_nothing_found():
    outputs = DetectorOutputs(mx.full((1, 4, 3), -20.0), mx.full((1, 4, 4), 0.5), None)
    (found,) = detections_of(outputs, [(10, 20)])
    assert [array.shape for array in found] == [(0, 4), (0,), (0,)]
    before = picture(20, 30)
    assert np.array_equal(draw(before, found, {}), before)
    assert results_of(found, 1, {}) == []


# ---------------------------------------------------------------------------
# Drawing and COCO's JSON


def test_drawing():
    before = Image.new("RGB", (500, 400), "white")
    boxes = np.float32([[100, 150, 300, 350], [-20, -20, 60, 60], [400, 300, np.nan, 350]])
    found = Detections(boxes, np.float32([0.9, 0.8, 0.7]), np.array([2, 5, 7]))
    after = draw(before, found, {2: "car"})
    assert before.getextrema() == ((255, 255),) * 3  # it stays as it was
    assert (after.size, after.mode) == ((500, 400), "RGB")
    pixels = np.asarray(after)
    for x, y in ((100, 250), (300, 250), (200, 350)):
        assert tuple(pixels[y, x]) == colour_of(2)
    assert tuple(pixels[250, 200]) == (255, 255, 255)
    assert tuple(pixels[30, 60]) == colour_of(5)
    label = pixels[140:149, 102:130].reshape(-1, 3)
    assert (label == colour_of(2)).all(-1).mean() > 0.3
    assert label.max(axis=-1).min() < 100  # its letters, dark


def test_categories():
    assert len(CATEGORIES) == len(LABELS) == 80
    ids = category_ids(dict(enumerate(LABELS)))
    named = {LABELS[label]: number for label, number in ids.items()}
    known = {"person": 1, "cat": 17, "toothbrush": 90}
    # On both sides of each gap.
    known |= {"fire hydrant": 11, "stop sign": 13, "zebra": 24, "backpack": 27, "umbrella": 28}
    known |= {"handbag": 31, "bottle": 44, "wine glass": 46, "bed": 65, "dining table": 67}
    known |= {"toilet": 70, "tv": 72, "refrigerator": 82, "book": 84}
    assert known.items() <= named.items()
    assert category_ids({0: "cat", 1: "dog"}) == {0: 0, 1: 1}


def test_image_ids(tmp_path):
    names = ["000000000139.jpg", "000000000285.jpg"]
    assert image_ids([tmp_path / name for name in names]) == [139, 285]
    assert image_ids([tmp_path / name for name in ("a.png", "7.png")]) == [1, 2]


def test_pycocotools_reads_the_results(tmp_path):
    import json

    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    names = dict(enumerate(LABELS))
    found = Detections(
        np.float32([[10, 20, 50, 80], [5, 5, 30, 20]]), np.float32([0.9, 0.6]), np.array([15, 79])
    )
    images = [{"id": 3, "file_name": "3.png", "width": 100, "height": 90}]
    results = results_of(found, 3, category_ids(names))
    assert results[0]["bbox"] == [10, 20, 40, 60]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(dataset(images, results, names)))
    truth = coco.COCO(str(path))
    assert truth.loadCats(truth.getCatIds(["cat"]))[0]["id"] == 17
    job = evaluation.COCOeval(truth, truth.loadRes(json.loads(path.read_text())["annotations"]))
    job.params.iouType = "bbox"
    job.evaluate()
    job.accumulate()
    job.summarize()
    assert job.stats[0] == pytest.approx(1)
