"""`python -m mlx_deform.models.detr.train`: its scenes, its figures, its training, its files."""

import sys
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_deform.models.detr import __main__ as command
from mlx_deform.models.detr import load_model
from mlx_deform.models.detr.inference import Detections
from mlx_deform.models.detr.train import scenes as scenes_module
from mlx_deform.models.detr.train.__main__ import main
from mlx_deform.models.detr.train.evaluation import average_precision
from mlx_deform.models.detr.train.scenes import CLASSES, SIDE, Scene, Scenes
from mlx_deform.models.detr.train.training import (
    FlatOptimizer,
    Recipe,
    make_optimizer,
    network,
    train,
)
from mlx_deform.nn import ordinary


@pytest.fixture(scope="module")
def scenes():
    return Scenes()


def scene_of(*objects):
    """A black scene of (label, box)."""
    labels, boxes = zip(*objects, strict=True)
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    return Scene(picture, np.array(labels), np.array(boxes, np.float32))


def found(*objects):
    """Detections of (score, label, box)."""
    scores, labels, boxes = zip(*objects, strict=True)
    return Detections(np.array(boxes, np.float32), np.array(scores), np.array(labels))


def test_scenes_are_drawn_from_a_seed(scenes):
    first, again, other = (scenes.scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.picture != other.picture).any()


def test_targets_are_centres_and_sizes():
    target = scene_of((4, (24, 12, 72, 24))).target
    np.testing.assert_array_equal(target.labels, [4])
    np.testing.assert_allclose(target.boxes * SIDE, [[48, 18, 48, 12]])


def test_boxes_are_tight(scenes, monkeypatch):
    """On a black ground, with white objects, boxes are where the white is."""
    monkeypatch.setattr(scenes, "background", lambda rng: np.zeros((SIDE, SIDE, 3), np.uint8))
    paint = scenes.object

    def white(label, rng):
        pixels = paint(label, rng)
        pixels[..., :3] = 255
        return pixels

    monkeypatch.setattr(scenes, "object", white)
    single = 0
    for seed in range(60):
        scene = scenes.scene(np.random.default_rng(seed))
        inside = np.zeros((SIDE, SIDE), bool)
        for x1, y1, x2, y2 in scene.boxes.astype(int):
            assert 0 <= x1 < x2 <= SIDE
            assert 0 <= y1 < y2 <= SIDE
            # Where soft edges lie upon each other, what is white is a little larger.
            inside[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = True
        solid = scene.picture[..., 0] > 127
        assert not (solid & ~inside).any()
        if len(scene.labels) == 1:
            single += 1
            rows, columns = np.nonzero(solid)
            tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            np.testing.assert_array_equal(scene.boxes[0], tight)
    assert single > 5


def test_scenes_have_every_class_and_differ_in_number(scenes):
    drawn = [scenes.scene(np.random.default_rng(seed)) for seed in range(60)]
    assert {int(label) for scene in drawn for label in scene.labels} == set(range(len(CLASSES)))
    assert {len(scene.labels) for scene in drawn} >= {1, 2, 3, 4}


def test_held_out_scenes_share_no_ground_and_no_coin(scenes):
    held_out = Scenes(held_out=True)
    coins, others = (
        {cut.tobytes() for cut in part.cuts[CLASSES.index("coin")]} for part in (scenes, held_out)
    )
    assert min(len(coins), len(others)) >= 8
    assert not coins & others
    grounds, others = ({ground.tobytes() for ground in part.grounds} for part in (scenes, held_out))
    assert not grounds & others
    sources, others = (
        {source for source, _ in part}
        for part in (scenes_module.TRAINING_GROUNDS, scenes_module.HELD_OUT_GROUNDS)
    )
    assert not sources & others


def test_precision_of_the_truth_is_one():
    boxes = (5, 10, 45, 30), (50, 40, 80, 90)
    scenes = [scene_of((0, boxes[0]), (3, boxes[1])), scene_of((3, boxes[0]))]
    detections = [
        found((0.9, 0, boxes[0]), (0.8, 3, boxes[1])),
        found((0.7, 3, boxes[0]), (0.1, 5, boxes[1])),  # surest are the right ones
    ]
    precision = average_precision(scenes, detections)
    assert precision.mean == pytest.approx(1)
    assert precision.half == pytest.approx(1)
    assert precision.by_class["cat"] == pytest.approx(1)
    assert np.isnan(precision.by_class["cup"])


def test_precision_by_hand():
    """The first class: a box of IoU 0.6. The second: the surest is wrong, the next one right."""
    scenes = [scene_of((0, (10, 10, 50, 40)), (1, (60, 60, 90, 90)))]
    detections = [
        found((0.9, 0, (10, 10, 50, 28)), (0.8, 1, (0, 60, 9, 69)), (0.3, 1, (60, 60, 90, 90)))
    ]
    precision = average_precision(scenes, detections)
    assert precision.by_class["cat"] == pytest.approx(1)
    assert precision.by_class["coin"] == pytest.approx(0.5)
    assert precision.half == pytest.approx(0.75)
    # IoU 0.6 counts at 0.5, 0.55 and 0.6 of ten thresholds; float32 may lose the last.
    cat = 2 * precision.mean - 0.5
    assert cat == pytest.approx(0.3) or cat == pytest.approx(0.2)


def test_precision_of_nothing():
    scenes = [scene_of((0, (10, 10, 50, 40)))]
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, int))
    assert average_precision(scenes, [nothing]).half == 0


@pytest.mark.parametrize("kind", ["deformable", "fixed"])
def test_a_few_steps(scenes, kind):
    model = network(kind, seed=1)
    before = dict(tree_flatten(model.parameters()))
    losses = []
    train(model, scenes, Recipe(steps=2, batch_size=2), seed=1, progress=losses.append)
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert not model.training
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    moved = {name for name in after if mx.any(before[name] != after[name]).item()}
    offsets = {name for name in after if "sampling_offsets" in name}
    assert offsets
    if kind == "fixed":
        assert not offsets & moved
        assert all(mx.all(after[name] == 0).item() for name in offsets)
    else:
        assert any(name.endswith("sampling_offsets.weight") for name in moved)
    assert "model.decoder.class_embed.0.weight" in moved
    assert "model.backbone.model.embedder.embedder.0.convolution.weight" in moved


def test_a_step_is_that_of_the_optimizer():
    """The joined vector moves as MLX's own optimizer and clipping move the arrays."""
    models = [Mixed(), Mixed()]
    models[1].update(models[0].parameters())
    for model in models:
        model.rest[0].freeze()
    make = partial(optim.SGD, 0.1, momentum=0.9, weight_decay=0.1)
    joined, own = FlatOptimizer(models[0], make(), clip=0.7), make()
    x, cotangent = mx.random.normal((2, 11, 13, 3)), mx.random.normal((2, 3, 11, 2))
    for _ in range(3):
        for model in models:
            gradients = nn.value_and_grad(model, lambda x, m=model: (m(x) * cotangent).sum())(x)[1]
            if model is models[0]:
                joined.update(model, gradients)
            else:
                gradients, norm = optim.clip_grad_norm(gradients, 0.7)
                assert norm.item() > 0.7
                own.update(model, gradients)
    expected = dict(tree_flatten(models[1].parameters()))
    for name, array in tree_flatten(models[0].parameters()):
        np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)


def test_the_twins_differ_in_offsets_alone():
    one, two = (
        dict(tree_flatten(network(kind, 5).parameters())) for kind in ("deformable", "fixed")
    )
    differ = {name for name in one if mx.any(one[name] != two[name]).item()}
    assert differ
    assert all("sampling_offsets" in name for name in differ)


def test_the_learning_rate_rises_and_falls():
    optimizer = make_optimizer(Recipe(steps=100, learning_rate=0.5))
    schedule = optimizer._schedulers["learning_rate"]
    rates = [schedule(mx.array(step)).item() for step in range(100)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(0.5)
    assert 3 <= int(np.argmax(rates)) <= 8
    assert rates[-1] < 0.01


def test_the_command(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["--steps", "2", "--batch-size", "2", "--scenes", "9", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("mAP50", "deformable sampling", "sampling fixed", *CLASSES, str(out)):
        assert word in printed
    with Image.open(out / "detections.png") as image:
        assert image.size[0] > image.size[1] > 2 * SIDE
    model = load_model(out)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.processor.size == {"height": SIDE, "width": SIDE}
    found = tmp_path / "found"
    picture = str(out / "scene.png")
    assert command.main([picture, "--weights", str(out), "--out", str(found)]) == 0
    assert (found / "scene_detections.png").stat().st_size > 0


@pytest.mark.parametrize("package", ["pycocotools", "skimage"])
def test_a_missing_package(package, capsys, monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("mlx_deform.models.detr.train."):
            monkeypatch.delitem(sys.modules, name)
    train_package = sys.modules["mlx_deform.models.detr.train"]
    for part in ("experiment", "evaluation", "picture", "scenes", "training"):
        monkeypatch.delattr(train_package, part, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--steps", "1", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "mlx-deform[detr-train]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--batch-size", "x"], ["--learning-rate", "2"]]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1))
        self.rest = [
            nn.Conv2d(6, 4, 3, groups=2, bias=False),
            nn.Linear(4, 7),
            nn.Linear(7, 2, bias=False),
        ]

    def __call__(self, x):
        x = nn.relu(self.first(x))
        for layer in self.rest:
            x = layer(x)
        return x


def test_fast_products_are_the_same(monkeypatch):
    """Values and gradients of convolutions and linear layers, beside MLX's own."""
    monkeypatch.setattr(ordinary, "pays", lambda: True)
    mx.random.seed(2)
    model = Mixed()
    model.rest[1].freeze()
    x, cotangent = mx.random.normal((2, 11, 13, 3)), mx.random.normal((2, 3, 11, 2))

    def value_and_gradients():
        return nn.value_and_grad(model, lambda x: (model(x) * cotangent).sum())(x)

    value, gradients = value_and_gradients()
    assert ordinary.use_fast_products(model) is model
    assert type(model.first) is ordinary.Conv2d
    assert type(model.rest[2]) is ordinary.Linear
    fast_value, fast_gradients = value_and_gradients()
    np.testing.assert_allclose(fast_value, value, rtol=1e-5)
    ours, theirs = dict(tree_flatten(fast_gradients)), dict(tree_flatten(gradients))
    assert ours.keys() == theirs.keys()
    assert not any(name.startswith("rest.1") for name in ours)
    for name, gradient in theirs.items():
        largest = float(mx.abs(gradient).max())
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5 * largest, err_msg=name)
