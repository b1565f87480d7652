"""`python -m mlx_deform.models.birefnet`: pictures in, masks and cut-outs out, errors."""

import functools
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import birefnet_twin as twin
from mlx_deform.models.birefnet import BiRefNet, BiRefNetConfig, SwinConfig, config, load_weights
from mlx_deform.models.birefnet.__main__ import main
from mlx_deform.models.birefnet.inference import (
    CutOut,
    cut_out,
    read_picture,
    to_input,
    to_mask,
    to_rgb,
)

SMALL = BiRefNetConfig(SwinConfig(8, (1, 1, 1, 1), (1, 2, 4, 8), 4), size=(32, 64))


@pytest.fixture(autouse=True)
def published(monkeypatch):
    monkeypatch.setitem(config.CONFIGS, "small", SMALL)


@functools.cache
def reference():
    return twin.randomize(twin.BiRefNet(SMALL)).eval()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height=50, width=70):
    """A picture whose colours change gently, so that filters' roundings don't show."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 90 * np.sin(x / 11 + y / 17 + phase) for phase in range(3)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@pytest.fixture
def photograph(tmp_path):
    smooth().save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture
def weights(tmp_path):
    torch.save(reference().state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


# ---------------------------------------------------------------------------
# As the official inference does


def official_inference(picture, size):
    """The model card's: torchvision's transforms, and Pillow's resize with its default filter."""
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    x = transform(picture.convert("RGB"))[None]
    with torch.no_grad():
        opacity = reference()(x)[0][-1].sigmoid()[0].squeeze()
    mask = transforms.ToPILImage()(opacity).resize(picture.size)
    picture = picture.convert("RGB")
    picture.putalpha(mask)
    return x, CutOut(mask, picture)


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_the_official_inference(size):
    picture = smooth()
    x, want = official_inference(picture, size)
    got = to_input(picture, size)
    np.testing.assert_allclose(got, x.permute(0, 2, 3, 1), rtol=0, atol=1e-6)
    model = load_weights(BiRefNet(SMALL), reference().state_dict()).eval()
    got = cut_out(model, picture, size)
    assert [image.mode for image in got] == ["L", "RGBA"]
    for image, other in zip(got, want, strict=True):
        assert image.size == picture.size
        difference = np.asarray(image, int) - np.asarray(other, int)
        assert np.abs(difference).max() <= 1  # 1e-6 may change what the 8 bits are cut off to
        assert (difference == 0).mean() > 0.99
    assert np.ptp(np.asarray(got.mask)) > 10


def test_a_mask_is_cut_off_to_8_bits():
    logits = np.array([[-40, 40, 0.0, 1.0]], np.float32)
    opacity = torch.from_numpy(logits).sigmoid()
    want = np.asarray(transforms.ToPILImage()(opacity))
    assert np.array_equal(to_mask(mx.array(logits)[None, ..., None], (4, 1)), want)
    assert to_mask(mx.zeros((1, 2, 2, 1), mx.bfloat16), (9, 5)).size == (9, 5)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"evaluation mode"):
        cut_out(BiRefNet(SMALL), smooth())


# ---------------------------------------------------------------------------
# Pictures


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "La", "RGBX"]


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    direct = {"PA": "P", "La": "LA", "RGBa": "RGBA"}  # by way of which Pillow converts
    picture = smooth().convert(direct.get(mode, mode)).convert(mode)
    assert picture.mode == mode
    got = to_rgb(picture)
    assert got.mode == "RGB"
    assert got.size == picture.size
    if mode not in ("1", "P", "PA", "L", "LA", "La"):  # others keep the colours
        assert np.abs(np.asarray(got, int) - np.asarray(smooth(), int)).mean() < 4


def test_lab():
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    picture = ImageCms.profileToProfile(smooth(), *profiles, outputMode="LAB")
    assert np.abs(np.asarray(to_rgb(picture), int) - np.asarray(smooth(), int)).mean() < 4


DEEP = [
    ("F", np.float32, 1, 1),
    ("F", np.float32, 255, 255),
    ("F", np.float32, 65535, 65535),
    ("F", np.float32, 1e6, 1e6),
    ("I", np.int32, 255, 255),
    ("I", np.int32, 65535, 65535),
    ("I", np.int32, 1e6, 1e6),
    ("I;16", np.uint16, 255, 65535),
    ("I;16", np.uint16, 65535, 65535),
]


@pytest.mark.parametrize(("mode", "dtype", "top", "scale"), DEEP)
def test_more_than_8_bits(mode, dtype, top, scale):
    grey = np.asarray(smooth().convert("L"), np.float64)
    values = grey / grey.max() * top
    picture = Image.fromarray((values if mode == "F" else values.round()).astype(dtype))
    assert picture.mode == mode
    got = np.asarray(to_rgb(picture), float)
    np.testing.assert_allclose(got[..., 1], values * (255 / scale), rtol=0, atol=1.01)


def test_a_16_bit_file(tmp_path):
    values = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "deep.png")
    got = np.asarray(to_rgb(read_picture(tmp_path / "deep.png")))[..., 0]
    np.testing.assert_allclose(got, values / 257, atol=0.51)


def test_not_a_number_is_dark():
    picture = Image.fromarray(np.array([[np.nan, 0.5, -3, 1]], np.float32))
    assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == [0, 128, 0, 255]


ROTATIONS = {1: 0, 3: 2, 6: -1, 8: 1}  # EXIF's orientation, quarter turns to the left


@pytest.mark.parametrize("orientation", ROTATIONS)
def test_exif_orientation(orientation, tmp_path):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    got = np.asarray(read_picture(tmp_path / "turned.png"))
    assert np.array_equal(got, np.rot90(pixels, ROTATIONS[orientation]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_stay_transparent(mode):
    picture = smooth().convert("RGBA")
    alpha = np.full((50, 70), 255, np.uint8)
    alpha[:, :30] = 0
    picture.putalpha(Image.fromarray(alpha))
    if mode == "P":
        picture = smooth().convert("P")
        picture.info["transparency"] = picture.getpixel((0, 0))
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        assert np.ptp(alpha) == 255
    picture = picture.convert(mode)
    model = load_weights(BiRefNet(SMALL), reference().state_dict()).eval()
    mask, cut = cut_out(model, picture)
    got = np.asarray(cut.getchannel("A"))
    assert np.array_equal(got, np.where(alpha == 0, 0, np.asarray(mask)))
    assert np.asarray(mask)[alpha == 0].max() > 0


# ---------------------------------------------------------------------------
# The command


def test_the_command(photograph, weights, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = [str(photograph), "--weights", str(weights), "--model", "small"]
    assert main([*arguments, "--out", str(out)]) == 0
    _, want = official_inference(smooth(), SMALL.size)
    with Image.open(out / "photograph_mask.png") as mask:
        assert (mask.format, mask.mode) == ("PNG", "L")
        assert np.abs(np.asarray(mask, int) - np.asarray(want.mask, int)).max() <= 1
    with Image.open(out / "photograph_cutout.png") as cut:
        assert (cut.format, cut.mode, cut.size) == ("PNG", "RGBA", (70, 50))
        assert np.array_equal(np.asarray(cut)[..., :3], smooth())
    printed = capsys.readouterr().out
    for word in ("photograph_mask.png", "photograph_cutout.png", "64x32", "MB at the peak"):
        assert word in printed
    assert "random" not in printed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_types_sizes_and_saved_weights(dtype, photograph, weights, tmp_path, capsys):
    saved = tmp_path / "mlx.safetensors"
    common = [str(photograph), "--dtype", dtype, "--size", "96x32"]
    first = ["--weights", str(weights), "--model", "small", "--save-weights", str(saved)]
    assert main([*common, *first, "--patch-order", "columns", "--out", str(tmp_path / "a")]) == 0
    assert main([*common, "--weights", str(saved), "--out", str(tmp_path / "b")]) == 0
    assert f"96x32, {dtype}" in capsys.readouterr().out
    names = [tmp_path / folder / "photograph_mask.png" for folder in "ab"]
    masks = [np.asarray(Image.open(name)) for name in names]
    assert np.array_equal(*masks)
    _, want = official_inference(smooth(), (32, 96))
    assert np.abs(masks[0].astype(int) - np.asarray(want.mask, int)).max() > 1  # another order


def test_random_weights_are_told(photograph, tmp_path, capsys):
    arguments = [str(photograph), "--random-weights", "--model", "small", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "the weights are random" in printed.out
    assert "the weights are random" in printed.err
    assert (tmp_path / "photograph_mask.png").is_file()


def test_an_unreadable_picture_does_not_stop_the_others(photograph, weights, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photograph.read_bytes()[:200])
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    files = [text, broken, tmp_path / "nowhere.png", tmp_path, photograph]
    arguments = ["--weights", str(weights), "--model", "small", "--out", str(tmp_path)]
    assert main([*map(str, files), *arguments]) == 1
    errors = capsys.readouterr().err
    assert f"{text}: it is no picture" in errors
    assert f"{broken}: it can't be read" in errors
    assert f"{tmp_path / 'nowhere.png'}: there is no such file" in errors
    assert f"{tmp_path}: it can't be read" in errors
    assert (tmp_path / "photograph_cutout.png").is_file()
    assert not (tmp_path / "broken_mask.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.pth"], r"there is no file 'nowhere.pth'"),
        (["--weights", "{photograph}"], r"a file must be a .safetensors, .pth"),
        (["--weights", "{weights}", "--model", "swin_s"], "must have shape"),
        (["--weights", "{weights}", "--model", "U2Net"], "a model must be one of BiRefNet, "),
        (["--random-weights", "--model", "U2Net"], "a model must be one of BiRefNet, "),
        (["{photograph}", "--random-weights"], "names of their own; got photograph.png"),
        (["--random-weights", "--model", "small", "--out", "{photograph}"], "--out can't be made"),
        (
            ["--random-weights", "--model", "small", "--save-weights", "a.npz"],
            "path must end in .safetensors",
        ),
    ],
)
def test_what_cannot_run(arguments, message, photograph, weights, capsys):
    arguments = [a.format(photograph=photograph, weights=weights) for a in arguments]
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
        (["a.png", "--random-weights", "--size", "100"], "100 is not a multiple of 32"),
        (["a.png", "--random-weights", "--size", "64x0"], "64x0 is not a multiple of 32"),
        (["a.png", "--random-weights", "--size", "64x"], "64x is not a multiple of 32"),
        (["a.png", "--random-weights", "--size", "big"], "big is not a multiple of 32"),
        (["a.png", "--random-weights", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package(photograph, monkeypatch, capsys):
    for name in ("command", "inference"):
        monkeypatch.delitem(sys.modules, f"mlx_deform.models.birefnet.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main([str(photograph), "--random-weights"]) == 2
    assert 'PIL is not installed; pip install "mlx-deform[birefnet]"' in capsys.readouterr().err


def test_as_users_call_it(photograph, tmp_path):
    """The published lite model in a process of its own; nothing of it imports torch."""
    command = [sys.executable, "-X", "importtime", "-m", "mlx_deform.models.birefnet"]
    arguments = [str(photograph), "--random-weights", "--model", "lite", "--size", "32"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the weights are random" in done.stdout
    assert Image.open(tmp_path / "photograph_cutout.png").size == (70, 50)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "mlx_deform.models.birefnet.model" in imported
    assert not {"torch", "torchvision", "matplotlib"} & imported


def test_the_op_does_not_import_the_models():
    script = "import sys, mlx_deform, mlx_deform.nn; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    modules = done.stdout.split()
    assert "mlx_deform.nn" in modules
    assert not [m for m in modules if m.startswith("mlx_deform.models") or m in ("PIL", "numpy")]
