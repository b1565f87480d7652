"""`python -m mlx_deform.demo`: its data, its training, its picture and what it prints."""

import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage")

import mlx_deform.demo
from mlx_deform.demo import frames, networks, picture, training
from mlx_deform.demo.__main__ import main
from numerics import relative_error, to_numpy

ONE_PROCESS = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
EXAMPLES = max(picture.EXAMPLES) + 1


@pytest.fixture(scope="module")
def data():
    return frames.Frames(test_pairs=EXAMPLES)


# ---------------------------------------------------------------------------
# Data


def test_pictures_to_test_on_are_not_trained_on():
    assert not set(frames.TRAINING) & set(frames.TEST)
    for name in frames.TRAINING + frames.TEST:
        picture = frames.load_picture(name)
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= frames.SIDE + 2 * frames.MARGIN
        assert picture.min() >= 0
        assert 0.5 < picture.max() <= 1


def test_a_warp_fetches_from_where_the_motion_says():
    patches = np.random.default_rng(0).random((1, 7, 9, 3)).astype(np.float32)
    motions = np.zeros((1, 7, 9, 2), np.float32)
    motions[0, 2, 3] = 1.5, -2
    warped = np.array(frames.warp(patches, motions))
    patches[0, 2, 3] = (patches[0, 3, 1] + patches[0, 4, 1]) / 2
    np.testing.assert_allclose(warped, patches, atol=1e-6)


def test_motions_stay_within_their_range():
    motions = frames.random_motions(np.random.default_rng(0), 200)
    inner = slice(frames.MARGIN, frames.MARGIN + frames.SIDE)
    assert motions.shape == (200, *2 * (frames.SIDE + 2 * frames.MARGIN,), 2)
    farthest = np.abs(motions[:, inner, inner]).max()
    assert 0.8 * (frames.SHIFT + frames.BEND) < farthest <= frames.SHIFT + frames.BEND
    assert farthest < frames.MARGIN


def test_a_vector_says_where_its_block_is_found(data, monkeypatch):
    """Within the error of one vector per block: the middles of blocks, without noise."""
    monkeypatch.setattr(frames, "NOISE", 0)
    monkeypatch.setattr(frames, "NEIGHBOUR_NOISE", 0)
    batch = frames.random_batch(np.random.default_rng(0), frames.TEST, 16)
    np.testing.assert_array_equal(np.array(batch.noisy), np.array(batch.truth))
    middle = frames.SIDE // 2
    errors = {}
    for sign in (0, 1, -1):
        found = [
            np.array(neighbour)[tuple(np.round(middle + sign * vector).astype(int))]
            for neighbour, vector in zip(
                batch.neighbour, np.array(batch.vectors[:, 1, 1]), strict=True
            )
        ]
        errors[sign] = np.abs(np.array(found) - np.array(batch.truth)[:, middle, middle]).mean()
    assert errors[1] < 0.5 * min(errors[0], errors[-1])


def test_noise_is_as_strong_as_it_says(data):
    noise = np.array(data.test.noisy - data.test.truth)
    assert noise.std() == pytest.approx(frames.NOISE, rel=0.01)
    assert abs(noise.mean()) < 0.01 * frames.NOISE


def test_processes_share_each_batch(data):
    def batches(*share):
        return list(data.batches(np.random.default_rng(7), 2, 6, *share))

    shares = [batches(rank, 3) for rank in range(3)]
    for whole, *parts in zip(batches(), *shares, strict=True):
        for name, values in vars(whole).items():
            pieces = mx.concatenate([getattr(part, name) for part in parts])
            assert mx.array_equal(values, pieces), name


# ---------------------------------------------------------------------------
# Networks


def test_the_networks_have_about_equal_parameters():
    ordinary, deformable = (networks.Network(kind) for kind in networks.WIDTHS)
    assert abs(networks.count(deformable) / networks.count(ordinary) - 1) < 0.01
    assert networks.predictor_count(ordinary) == 0
    assert networks.predictor_count(deformable) > 5000


def test_folding_keeps_the_pixels_of_a_position():
    image = mx.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    folded = networks.fold(image)
    assert folded.shape == (2, 2, 3, 12)
    assert mx.array_equal(folded[1, 1, 2], image[1, 2:4, 4:6].flatten())
    assert mx.array_equal(networks.unfold(folded), image)


@pytest.mark.parametrize("kind", ["ordinary", "deformable"])
def test_a_network_starts_with_about_the_neighbour(data, kind):
    mx.random.seed(0)
    batch = data.test[:4]
    network = networks.Network(kind)
    network.align.weight = mx.where(network.align.weight > 0.5, 1.0, 0.0)
    network.align.bias = mx.zeros_like(network.align.bias)
    assert relative_error(to_numpy(network(batch)), to_numpy(batch.neighbour)) < 1e-5


def test_offsets_move_what_is_aligned(data):
    """By whole positions of the map, which are two pixels."""
    network = networks.Network("deformable")
    network.align.weight = mx.where(network.align.weight > 0.5, 1.0, 0.0)
    network.align.bias = mx.zeros_like(network.align.bias)
    network.offset_conv.bias = mx.array([1.0, -2.0] * networks.TAPS)
    batch = data.test[:2]
    moved = to_numpy(network(batch))[:, :-2, 4:]
    assert relative_error(moved, to_numpy(batch.neighbour)[:, 2:, :-4]) < 1e-5


@pytest.mark.parametrize("kind", ["ordinary", "deformable"])
def test_both_networks_learn(data, kind):
    mx.random.seed(0)
    network = networks.Network(kind)
    losses = []
    options = SimpleNamespace(steps=30, batch_size=4, learning_rate=3e-3)
    training.train(network, data, options, 0, ONE_PROCESS, losses.append)
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    noisy = np.mean(training.psnr(data.test.noisy, data.test.truth))
    assert training.score(network, data, ONE_PROCESS) > noisy + 2
    if kind == "deformable":
        assert mx.any(network.offset_conv.weight != 0)


def test_the_score_is_the_mean_psnr(data):
    got = training.score(lambda batch: batch.noisy, data, ONE_PROCESS)
    error = np.clip(to_numpy(data.test.noisy), 0, 1) - to_numpy(data.test.truth)
    want = -10 * np.log10((error**2).mean((1, 2, 3)))
    assert got == pytest.approx(want.mean(), abs=1e-4)


# ---------------------------------------------------------------------------
# Picture


def test_samples_of_the_ordinary_network_are_a_grid(data):
    points, grid = picture.samples(networks.Network("ordinary"), data.test[:2])
    np.testing.assert_array_equal(points, grid)
    # Position (2, 3) holds the pixels from (4, 6) to (5, 7), of which the middle is in between.
    want = {(y, x) for y in (2.5, 4.5, 6.5) for x in (4.5, 6.5, 8.5)}
    assert set(map(tuple, points[1, 2, 3])) == want
    assert points.shape == (2, 24, 24, 9, 2)


def test_samples_follow_the_offsets(data):
    network = networks.Network("deformable")
    network.offset_conv.bias = mx.array([0.5, -1.0] * networks.TAPS)
    points, grid = picture.samples(network, data.test[:1])
    np.testing.assert_allclose(points - grid, np.broadcast_to([1.0, -2.0], grid.shape))


# ---------------------------------------------------------------------------
# The command

QUICK = ["--seeds", "2", "--steps", "2", "--batch-size", "2"]


def test_the_command_as_users_call_it(tmp_path):
    command = [sys.executable, "-m", "mlx_deform.demo", *QUICK, "--out", "here.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    for kind in ("ordinary", "deformable"):
        values = list(map(float, rows[kind]))
        assert len(values) == 3
        assert all(5 < value < 40 for value in values)
        assert values[2] == pytest.approx(np.mean(values[:2]), abs=0.011)
    assert "step" in done.stderr
    assert "deformable, seed 1" in done.stderr
    with Image.open(tmp_path / "here.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert np.ptp(np.asarray(image.convert("L"))) > 200


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "skimage"])
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
        ["--steps", "many"],
        ["--batch-size", "0"],
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
    for word in ("--seeds", "--steps", "--out", "mlx.launch", "exit status"):
        assert word in printed
