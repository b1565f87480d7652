"""`python -m mlx_deform.models.detr`: pictures in, boxes and COCO's JSON out, errors."""

import dataclasses
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_deform.models.detr import RTDETR, ImageProcessor, RTDETRConfig, families, load_model
from mlx_deform.models.detr import save_model as save
from mlx_deform.models.detr.__main__ import main
from mlx_deform.models.detr.backbones.resnet import ResNetConfig
from mlx_deform.models.detr.inference import detect, read_picture

SMALL = RTDETRConfig(
    backbone_config=ResNetConfig(
        embedding_size=8, hidden_sizes=(8, 8, 16, 16), depths=(1, 1, 1, 1), layer_type="basic"
    ),
    id2label={0: "round", 1: "square", 2: "star"},
    num_queries=9,
    d_model=32,
    decoder_layers=1,
    decoder_ffn_dim=16,
    decoder_attention_heads=4,
    encoder_ffn_dim=16,
    encoder_attention_heads=4,
    encoder_hidden_dim=32,
    encoder_in_channels=(8, 16, 16),
    decoder_in_channels=(32, 32, 32),
    hidden_expansion=0.5,
)
PROCESSOR = ImageProcessor(size={"height": 64, "width": 96})


@pytest.fixture(autouse=True)
def published(monkeypatch):
    monkeypatch.setitem(families.CONFIGS, "small", SMALL)


def scene(height=50, width=70, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photograph(tmp_path):
    scene().save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as the hub has them, whose pictures have a size of their own."""
    mx.random.seed(3)
    model = RTDETR(SMALL)
    for head in model.model.decoder.class_embed:
        head.weight = mx.random.normal(head.weight.shape)
    model.processor = PROCESSOR
    save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def contents(path):
    return json.loads(path.read_text())


def test_the_command(photograph, folder, tmp_path, capsys):
    second = tmp_path / "other.jpg"
    scene(33, 44, seed=1).save(second)
    out = tmp_path / "new" / "folder"
    arguments = [str(photograph), str(second), "--weights", str(folder), "--out", str(out)]
    assert main([*arguments, "--threshold", "0.3"]) == 0
    model = load_model(folder)
    assert model.processor == PROCESSOR
    result = contents(out / "detections.json")
    assert [image["file_name"] for image in result["images"]] == ["photograph.png", "other.jpg"]
    assert result["images"][1] == {"id": 2, "file_name": "other.jpg", "width": 44, "height": 33}
    assert result["categories"] == [
        {"id": label, "name": name} for label, name in SMALL.id2label.items()
    ]
    for number, path in ((1, photograph), (2, second)):
        boxes, scores, labels = detect(model, read_picture(path), 0.3)
        assert 0 < len(labels) < SMALL.num_queries * 3
        own = [a for a in result["annotations"] if a["image_id"] == number]
        assert [a["category_id"] for a in own] == labels.tolist()
        np.testing.assert_allclose([a["score"] for a in own], scores, rtol=1e-5)
        sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        np.testing.assert_allclose([a["bbox"] for a in own], sides, rtol=1e-4, atol=1e-3)
        with Image.open(out / f"{path.stem}_detections.png") as drawn, read_picture(path) as before:
            assert drawn.size == before.size
            assert not np.array_equal(drawn, before)
    printed = capsys.readouterr().out
    for word in (
        "photograph_detections.png: ",
        " objects, ",
        " s, ",
        "MB at the peak",
        "rt_detr, ",
    ):
        assert word in printed
    assert "random" not in printed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_and_a_single_file(dtype, photograph, folder, tmp_path, capsys):
    weights = folder / "model.safetensors"
    arguments = [str(photograph), "--weights", str(weights), "--dtype", dtype]
    assert main([*arguments, "--out", str(tmp_path), "--threshold", "0"]) == 0
    assert f"{dtype}, on" in capsys.readouterr().out
    assert len(contents(tmp_path / "detections.json")["annotations"]) == SMALL.num_queries


def test_random_weights_are_told(photograph, tmp_path, capsys):
    assert main([str(photograph), "--random-weights", "small", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "the weights are random" in printed.out
    assert "the weights are random" in printed.err
    assert (tmp_path / "photograph_detections.png").is_file()


def test_an_unreadable_picture_does_not_stop_the_others(photograph, folder, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photograph.read_bytes()[:200])
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    files = [text, broken, tmp_path / "nowhere.png", tmp_path, photograph]
    arguments = ["--weights", str(folder), "--out", str(tmp_path)]
    assert main([*map(str, files), *arguments]) == 1
    errors = capsys.readouterr().err
    assert f"{text}: it is no picture" in errors
    assert f"{broken}: it can't be read" in errors
    assert f"{tmp_path / 'nowhere.png'}: there is no such file" in errors
    assert (tmp_path / "photograph_detections.png").is_file()
    assert not (tmp_path / "broken_detections.png").exists()
    assert [i["id"] for i in contents(tmp_path / "detections.json")["images"]] == [5]


def test_pictures_that_the_network_cannot_take(photograph, folder, tmp_path, capsys):
    size = {"shortest_edge": 50, "longest_edge": 80}
    settings = dataclasses.replace(PROCESSOR, size=size).to_json()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert main([str(photograph), "--weights", str(folder), "--out", str(tmp_path)]) == 1
    assert "multiples of 32; got (1, 50, 70, 3)" in capsys.readouterr().err


BROKEN = [
    ("config.json", "{", "config.json"),
    ("config.json", '{"model_type": "yolo"}', "must have a model_type of rt_detr"),
    ("config.json", '{"model_type": "rt_detr", "id2label": 3}', "must hold a configuration"),
    ("config.json", '{"model_type": "rt_detr"}', "must have shape"),
    ("preprocessor_config.json", "[]", "must be a dictionary"),
    ("preprocessor_config.json", '{"size": {"height": 3}}', "size must have"),
    ("preprocessor_config.json", '{"size": true}', "size must"),
    ("model.safetensors", "no weights", "must hold what its name says"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_broken_checkpoints(name, text, message, photograph, folder, capsys):
    (folder / name).write_text(text)
    assert main([str(photograph), "--weights", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mlx_deform: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.pth"], "there is no file 'nowhere.pth'"),
        (["--weights", "{folder}/.."], "there is no model.safetensors in"),
        (["--weights", "{photograph}"], "a file must be a .safetensors, .pth"),
        (["--random-weights", "yolo"], "a model must be one of rtdetr_r18vd, "),
        (["{photograph}", "--random-weights", "small"], "names of their own; got photograph.png"),
        (["--random-weights", "small", "--out", "{photograph}"], "--out can't be made"),
    ],
)
def test_what_cannot_run(arguments, message, photograph, folder, capsys):
    arguments = [a.format(photograph=photograph, folder=folder) for a in arguments]
    assert main([str(photograph), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mlx_deform: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "one of the arguments --weights --random-weights is required"),
        (["--random-weights"], "required: INPUT"),
        (["a.png", "--random-weights", "--weights", "b"], "not allowed with"),
        (["a.png", "--random-weights", "--threshold", "2"], "2 is not a number from 0 to 1"),
        (["a.png", "--random-weights", "--threshold", "nan"], "nan is not a number from 0 to 1"),
        (["a.png", "--random-weights", "--threshold", "x"], "x is not a number from 0 to 1"),
        (["a.png", "--random-weights", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        detect(RTDETR(SMALL), scene())


def test_every_step_is_told(folder):
    model, steps = load_model(folder), []
    detect(model, scene(), on_step=lambda: steps.append(1))
    assert len(steps) == model.step_count


def test_a_missing_package(photograph, monkeypatch, capsys):
    for name in ("command", "drawing"):
        monkeypatch.delitem(sys.modules, f"mlx_deform.models.detr.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main([str(photograph), "--random-weights"]) == 2
    assert 'PIL is not installed; pip install "mlx-deform[detr]"' in capsys.readouterr().err


def test_as_users_call_it(photograph, folder, tmp_path):
    """In a process of its own; nothing of it imports torch."""
    command = [sys.executable, "-X", "importtime", "-m", "mlx_deform.models.detr"]
    arguments = [str(photograph), "--weights", str(folder), "--threshold", "0.2"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "photograph_detections.png").size == (70, 50)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "mlx_deform.models.detr.rt_detr" in imported
    assert not {"torch", "torchvision", "matplotlib", "transformers", "scipy"} & imported
