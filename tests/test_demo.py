"""`python -m mlx_deform`: what it saves, prints and returns."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_deform
from mlx_deform import _demo
from mlx_deform.__main__ import main

QUICK = ["--size", "64", "--repeats", "1"]


@pytest.fixture
def photograph(tmp_path):
    """A file with noise, wider than high; the path."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture
def without_timings(monkeypatch):
    monkeypatch.setattr(_demo, "print_timings", lambda *_: None)


def test_the_command_as_users_call_it(tmp_path):
    command = [sys.executable, "-m", "mlx_deform", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(", ok\n") == 2
    assert "torchvision" in done.stdout
    for word in ("device", "mlx_deform", "forward", "gradients", "mlx_deform.png"):
        assert word in done.stdout
    with Image.open(tmp_path / "mlx_deform.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        assert np.ptp(np.asarray(image.convert("L"))) > 200


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_any_picture(photograph, mode, tmp_path, capsys, without_timings):
    out = tmp_path / "out.png"
    Image.open(photograph).convert(mode).save(tmp_path / "picture.png")
    assert main([str(tmp_path / "picture.png"), "--out", str(out)]) == 0
    assert out.stat().st_size > 0
    assert f"saved    {out}" in capsys.readouterr().out


def test_a_lens_without_strength_is_the_identity(photograph):
    picture = _demo.load_picture(photograph, 64)
    assert picture.shape == (40, 60, 3)
    warped = _demo.Warp(picture, strength=0)(picture)
    np.testing.assert_array_equal(np.array(warped), picture)


def test_the_lens_enlarges_the_middle(photograph):
    dy, dx = _demo.lens(np.float64(7), np.float64(16), 21, 41, 0.5)
    assert dy > 0  # (7, 16) lies above and to the left of the middle, (10, 20)
    assert dx > 0
    middle = _demo.lens(np.float64(10), np.float64(20), 21, 41, 0.5)
    assert middle == (0, 0)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_output_is_reported(photograph, tmp_path, capsys, monkeypatch, wrong):
    right = _demo.deform_conv2d

    def broken(*arguments, **options):
        output = right(*arguments, **options)
        return output + wrong * (mx.arange(output.size) == 17).reshape(output.shape)

    monkeypatch.setattr(_demo, "deform_conv2d", broken)
    monkeypatch.setattr(_demo, "print_timings", lambda *_: None)
    assert main([str(photograph), "--out", str(tmp_path / "out.png")]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_a_wrong_gradient_is_reported(photograph, tmp_path, capsys, monkeypatch):
    right = _demo.deform_conv2d

    def broken(input, offset, weight, **options):
        skewed = offset + 1e-3 * (offset - mx.stop_gradient(offset))
        return right(input, skewed, weight, **options)

    monkeypatch.setattr(_demo, "deform_conv2d", broken)
    monkeypatch.setattr(_demo, "print_timings", lambda *_: None)
    assert main([str(photograph), "--out", str(tmp_path / "out.png")]) == 1
    printed = capsys.readouterr().out
    assert printed.count(", ok") == printed.count("MISMATCH") == 1


def one_sentence(capsys):
    """What was written to stderr, which must be a line and no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mlx_deform: ")
    return lines[0]


def test_unreadable_pictures(tmp_path, capsys):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (3, 90)).save(tmp_path / "sliver.png")
    cases = {
        "missing.png": "No such file",
        ".": "Is a directory",
        "text.png": "not an image",
        "sliver.png": "too few",
    }
    for name, reason in cases.items():
        assert main([str(tmp_path / name)]) == 2
        assert reason in one_sentence(capsys)


def test_a_folder_that_is_not_there(photograph, tmp_path, capsys):
    assert main([str(photograph), "--out", str(tmp_path / "nowhere" / "out.png")]) == 2
    assert "nowhere" in one_sentence(capsys)


@pytest.mark.parametrize("package", ["matplotlib", "skimage"])
def test_a_missing_package(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "mlx_deform._demo")
    monkeypatch.delattr(mlx_deform, "_demo")  # where `from . import _demo` looks first
    assert main([]) == 2
    assert 'pip install "mlx-deform[demo]"' in one_sentence(capsys)


@pytest.mark.parametrize(
    "arguments", [["--size", "5"], ["--strength", "2"], ["--repeats", "0"], ["--size", "big"]]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    for word in ("PICTURE", "--out", "--size", "--strength", "--repeats", "exit status"):
        assert word in printed
