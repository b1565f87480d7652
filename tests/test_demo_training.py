"""`python -m mlx_deform.demo`: its data, its training, its picture and what it prints."""

import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

import mlx_deform.demo
from mlx_deform.demo import digits, networks, picture, training
from mlx_deform.demo.__main__ import main
from numerics import relative_error, to_numpy

ONE_PROCESS = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.fixture(scope="module")
def data():
    return digits.Digits(training=320, test=64)


# ---------------------------------------------------------------------------
# Data


def test_digits_to_test_on_are_not_trained_on():
    whole = digits.Digits()
    assert len(whole) == 1347
    assert len(whole.test_labels) == 4 * 450
    assert whole.test_images.shape == (1800, 20, 20, 1)
    identity = np.tile(np.eye(2), (2, 1, 1))
    left, right = np.array(digits.warp(whole.digits[:2], identity))
    np.testing.assert_array_equal(left[6:14, 6:14, 0], whole.digits[0])
    assert right.sum() == whole.digits[1].sum()
    # 1797 digits of which the test keeps what training leaves.
    assert whole.labels.sum() + whole.test_labels[:450].sum() == 8070


def test_a_warp_turns_as_it_says():
    """A quarter turn of the digit, of the size it has."""
    digit = np.random.default_rng(0).random((1, 8, 8)).astype(np.float32)
    turn = np.array([[[0.0, 1.0], [-1.0, 0.0]]])
    turned = np.array(digits.warp(digit, turn))[0, 6:14, 6:14, 0]
    np.testing.assert_allclose(turned, np.rot90(digit[0]), atol=1e-6)


def test_random_warps_stay_within_their_ranges():
    rng = np.random.default_rng(0)
    ranges = digits.Ranges(rotation=30, smallest=0.5, largest=1, shear=0)
    forward = np.linalg.inv(digits.random_warps(rng, 1000, ranges)) / digits.MAGNIFICATION
    sizes = np.linalg.norm(forward, axis=1)
    assert 0.5 <= sizes.min() < 0.51
    assert 0.99 < sizes.max() <= 1
    angles = np.degrees(np.arctan2(forward[:, 1, 0], forward[:, 0, 0]))
    assert 29 < np.abs(angles).max() <= 30


def test_processes_share_each_batch(data):
    whole = list(data.batches(np.random.default_rng(7), 48))
    shares = [list(data.batches(np.random.default_rng(7), 48, rank, 3)) for rank in range(3)]
    assert len(whole) == len(data) // 48
    for batch, *parts in zip(whole, *shares, strict=True):
        for values, *pieces in zip(batch, *parts, strict=True):
            assert mx.array_equal(values, mx.concatenate(pieces))


# ---------------------------------------------------------------------------
# Networks


def test_the_networks_have_about_equal_parameters():
    ordinary, deformable = (networks.Network(kind) for kind in networks.WIDTHS)
    assert abs(networks.count(deformable) / networks.count(ordinary) - 1) < 0.02
    assert networks.predictor_count(ordinary) == 0
    assert networks.predictor_count(deformable) > 10000


def test_ordinary_convolutions_are_ordinary():
    layer = networks.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2))
    x = mx.random.normal((2, 9, 8, 3))
    want = nn.Conv2d.__call__(layer, x)
    assert relative_error(to_numpy(layer(x)), to_numpy(want)) < 1e-5


def test_a_deformable_network_starts_as_an_ordinary_one():
    network = networks.Network("deformable")
    for layer in network.layers:
        x = mx.random.normal((2, 10, 10, layer.in_channels))
        plain = mx.conv2d(x, layer.weight, layer.stride, layer.padding) + layer.bias
        assert relative_error(to_numpy(layer(x)), to_numpy(plain)) < 1e-5


@pytest.mark.parametrize("kind", ["ordinary", "deformable"])
def test_both_networks_learn(data, kind):
    mx.random.seed(0)
    network = networks.Network(kind)
    before = training.accuracy(network, data, ONE_PROCESS)
    losses = []
    options = SimpleNamespace(epochs=6, batch_size=32, learning_rate=3e-3)
    training.train(network, data, options, 0, ONE_PROCESS, losses.append)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert training.accuracy(network, data, ONE_PROCESS) > max(0.3, before + 0.15)
    if kind == "deformable":
        assert all(mx.any(layer.offset_conv.weight != 0) for layer in network.layers)


# ---------------------------------------------------------------------------
# Picture


def test_samples_of_the_ordinary_network_are_a_grid(data):
    points, weights = picture.samples(networks.Network("ordinary"), data.test_images[:1], (2, 3))
    # From the middle, (2 * 2 * 2, 2 * 2 * 3), every second pixel up to 4 away.
    want = {(y, x) for y in range(4, 13, 2) for x in range(8, 17, 2)}
    assert set(map(tuple, points)) == want
    assert len(points) == 81
    assert set(weights) == {1}


def test_samples_follow_the_offsets(data):
    network = networks.Network("deformable")
    still, _ = picture.samples(network, data.test_images[:1], (2, 3))
    for layer, (dy, dx) in zip(network.layers, ((0.5, 0), (0.25, -1)), strict=True):
        layer.offset_conv.bias = mx.array([dy, dx] * 9 + [0.0] * 9)
    # The offsets add up, in positions of the stem's output, of which one is two pixels.
    moved, weights = picture.samples(network, data.test_images[:1], (2, 3))
    np.testing.assert_allclose(moved - still, np.tile([1.5, -2], (81, 1)))
    np.testing.assert_allclose(weights, 1)


# ---------------------------------------------------------------------------
# The command

QUICK = ["--seeds", "2", "--epochs", "1", "--digits", "64", "--batch-size", "32"]


def test_the_command_as_users_call_it(tmp_path):
    command = [sys.executable, "-m", "mlx_deform.demo", *QUICK, "--out", "here.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    for kind in ("ordinary", "deformable"):
        values = list(map(float, rows[kind]))
        assert len(values) == 3
        assert all(0 <= value <= 100 for value in values)
        assert values[2] == pytest.approx(np.mean(values[:2]), abs=0.1)
    assert "step" in done.stderr
    assert "deformable, seed 1" in done.stderr
    with Image.open(tmp_path / "here.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        assert np.ptp(np.asarray(image.convert("L"))) > 200


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "sklearn"])
def test_a_missing_package(package, capsys, monkeypatch):
    for name in ("experiment", "picture"):
        monkeypatch.delitem(sys.modules, f"mlx_deform.demo.{name}", raising=False)
        monkeypatch.delattr(mlx_deform.demo, name, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(QUICK) == 2
    error = capsys.readouterr().err
    assert package in error
    assert 'pip install "mlx-deform[demo]"' in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--epochs", "many"],
        ["--digits", "9999"],
        ["--batch-size", "65", "--digits", "64"],
        ["--out", "nowhere/picture.png"],
    ],
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    for word in ("--seeds", "--epochs", "--out", "mlx.launch", "exit status"):
        assert word in printed
