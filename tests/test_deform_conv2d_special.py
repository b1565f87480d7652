"""Coordinates that are NaN, infinite, huge or exactly on the border; tiny images; Inf pixels."""

import numpy as np
import pytest

from cases import Config, random_arrays, random_config
from numerics import (
    assert_all_close,
    check_against_oracle,
    check_im2col_against_oracle,
    rounded,
    run_library,
    run_library_im2col,
    run_oracle,
    run_oracle_im2col,
    tolerances,
)

HUGE = {
    "float64": [1e30, 1e38, 1e300, np.inf, 2.0**31, 2.0**32 + 1, 2.0**63, 1e19],
    "float32": [1e30, 1e38, np.inf, 2.0**31, 2.0**32, 2.0**63, 3e9],
    "bfloat16": [1e30, 1e38, np.inf, 2.0**31, 2.0**63],
    "float16": [6e4, np.inf],
}
CASES = [(dtype, value) for dtype, values in HUGE.items() for value in values]


def scattered(array, value, every, seed=0):
    """`array` with one element in `every` replaced, at random places."""
    array = array.copy()
    array[np.random.default_rng(seed).random(array.shape) < 1 / every] = value
    return array


@pytest.mark.parametrize(("dtype", "value"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_offsets_sample_zero(dtype, value, sign):
    config = Config()
    arrays = random_arrays(config, 0)
    arrays["offset"] = scattered(arrays["offset"], sign * value, every=5)
    check_against_oracle(config, arrays, dtype)
    check_im2col_against_oracle(config, arrays, dtype)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e38, 50000.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_image_out_of_sight(dtype, value):
    """Every sample beyond the image: the output is the bias, and all gradients but its own 0."""
    config = Config(C=24)
    arrays = random_arrays(config, 0)
    arrays["offset"] = np.full_like(arrays["offset"], value)
    got = run_library(config, arrays, dtype)
    arrays = rounded(arrays, dtype)
    np.testing.assert_array_equal(
        got["output"], np.broadcast_to(arrays["bias"], config.output_shape)
    )
    for name in ("input", "offset", "mask", "weight"):
        assert (got[name] == 0).all(), name
    assert (got["bias"] != 0).all()


def test_one_infinite_coordinate_zeroes_the_gradient_of_the_other():
    """Where torchvision gives NaN."""
    config = Config()
    arrays = random_arrays(config, 0)
    offset = arrays["offset"].reshape(-1, 2)
    offset[::3, 0] = np.inf
    offset[1::3, 1] = -np.inf
    got = run_library(config, arrays, "float32")["offset"].reshape(-1, 2)
    assert (got[::3] == 0).all()
    assert (got[1::3] == 0).all()
    assert (got[2::3] != 0).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_nan_offsets(dtype):
    config = Config(C=24)
    arrays = random_arrays(config, 0)
    arrays["offset"] = scattered(arrays["offset"], np.nan, every=200)
    check_against_oracle(config, arrays, dtype)
    check_im2col_against_oracle(config, arrays, dtype)


def test_one_nan_offset_stays_where_it_is():
    """NaN in one output pixel, for the channels whose weight group reads that offset group."""
    config = Config(C=12, O=10, G=2, DG=2)
    clean = rounded(random_arrays(config, 0), "float32")
    arrays = dict(clean, offset=clean["offset"].copy())
    taps = config.kH * config.kW
    # Batch 1, pixel (2, 3), offset group 1, tap 4, dx: weight group 1 alone reads it.
    arrays["offset"][1, 2, 3, 2 * (taps + 4) + 1] = np.nan
    got, want = (run_library(config, a, "float32") for a in (arrays, clean))

    nan = np.zeros(config.output_shape, bool)
    nan[1, 2, 3, 5:] = True
    np.testing.assert_array_equal(np.isnan(got["output"]), nan)
    np.testing.assert_array_equal(got["output"][~nan], want["output"][~nan])

    nan = np.zeros(config.shapes["offset"], bool)
    nan[1, 2, 3, 2 * (taps + 4) : 2 * (taps + 4) + 2] = True
    np.testing.assert_array_equal(np.isnan(got["offset"]), nan)
    np.testing.assert_array_equal(got["offset"][~nan], want["offset"][~nan])

    nan = np.zeros(config.shapes["mask"], bool)
    nan[1, 2, 3, taps + 4] = True
    np.testing.assert_array_equal(np.isnan(got["mask"]), nan)

    nan = np.zeros((config.O, taps, config.C // 2), bool)
    nan[5:, 4] = True
    np.testing.assert_array_equal(np.isnan(got["weight"]).reshape(nan.shape), nan)
    assert np.isfinite(got["input"]).all()
    assert np.isfinite(got["bias"]).all()


def test_nothing_but_nan():
    config = Config()
    arrays = random_arrays(config, 0)
    arrays["offset"] = np.full_like(arrays["offset"], np.nan)
    got = run_library(config, arrays, "float32")
    for name in ("output", "offset", "mask", "weight"):
        assert np.isnan(got[name]).all(), name
    assert (got["input"] == 0).all()


def test_nan_wins_over_infinity():
    config = Config()
    arrays = random_arrays(config, 0)
    offset = arrays["offset"].reshape(-1, 2)
    offset[::40] = np.nan, np.inf
    offset[1::40] = -np.inf, np.nan
    check_against_oracle(config, arrays, "float32")
    gradient = run_library(config, arrays, "float32")["offset"].reshape(-1, 2)
    assert np.isnan(gradient[::40]).all()
    assert np.isnan(gradient[1::40]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_around_the_borders(dtype):
    """Samples on, just inside and just outside -1, 0, size - 1 and size."""
    # One output pixel an image, its only tap on (0, 0): the coordinate is the offset itself,
    # without rounding.
    config = Config(H=6, W=8, C=4, O=3, kH=1, kW=1, G=1, DG=1, stride=(6, 8), padding=(0, 0))
    real = np.dtype(dtype).type

    def around(size):
        exact = np.array([-1, 0, size - 1, size], real)
        below, above = np.nextafter(exact, real(-100)), np.nextafter(exact, real(100))
        below[1], above[1] = -1e-30, 1e-30  # no subnormals, which some GPUs flush to 0
        halves = np.array([-0.5, size - 0.5, -1.5, size + 0.5], real)
        return np.concatenate([exact, below, above, halves]).astype(np.float64)

    y, x = np.meshgrid(around(config.H), around(config.W), indexing="ij")
    config = config.but(N=y.size)
    assert (config.Ho, config.Wo) == (1, 1)
    arrays = random_arrays(config, 0)
    arrays["offset"][:, 0, 0] = np.stack([y.ravel(), x.ravel()], axis=-1)
    check_against_oracle(config, arrays, dtype)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 1)])
@pytest.mark.parametrize("offsets", [0, 0.7, "integer"])
def test_tiny_images(size, offsets):
    config = Config(H=size[0], W=size[1], padding=(2, 2), offsets=offsets)
    check_against_oracle(config, random_arrays(config, 0), "float32")
    check_im2col_against_oracle(config, random_arrays(config, 0), "float32")


def test_kernel_larger_than_the_image():
    config = Config(H=2, W=3, kH=5, kW=7, dilation=(1, 1), padding=(2, 3), stride=(1, 1))
    check_against_oracle(config, random_arrays(config, 0), "float32")


def test_padding_larger_than_the_image():
    config = Config(H=3, W=2, padding=(9, 11))
    check_against_oracle(config, random_arrays(config, 0), "float32")


@pytest.mark.parametrize("pixel", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("offsets", [0.7, 4, "integer"])
def test_special_pixels_reach_their_neighbours_alone(pixel, offsets):
    """A corner outside the image is never read, whatever stands in its place in memory."""
    for seed in range(5):
        config = random_config(6000 + seed, N=2, H=9, W=8, C=12, O=10, G=2, DG=3, offsets=offsets)
        arrays = rounded(random_arrays(config, seed), "float32")
        # In every image corner, and at the ends of rows, where a wrong index wraps around.
        for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1), (4, -1)):
            arrays["input"][0, y, x, seed] = pixel
        want = run_oracle(config, arrays, coordinate_dtype=np.float32)
        got = run_library(config, arrays, "float32")
        assert not np.isfinite(want["output"]).all()
        assert np.isfinite(want["output"][1]).all()
        clean = dict(arrays, input=np.where(np.isfinite(arrays["input"]), arrays["input"], 0))
        scale = tolerances(config, clean, "float32")
        # Infinite terms of both signs meet in these sums in any order: NaN or infinite,
        # an element is not finite on both sides.
        for results in (got, want):
            for name in results:
                broken = ~np.isfinite(results[name])
                results[name] = np.where(broken, np.nan, results[name])
        assert_all_close(got, want, scale)


@pytest.mark.parametrize("name", ["weight", "bias", "mask"])
def test_nan_elsewhere_spreads_as_in_any_product(name):
    config = Config(padding=(0, 0), offsets=0, dilation=(1, 1))
    arrays = rounded(random_arrays(config, 0), "float32")
    arrays[name] = arrays[name].copy()
    arrays[name].flat[1] = np.nan
    want = run_oracle(config, arrays)["output"]
    got = run_library(config, arrays, "float32")["output"]
    assert np.isnan(want).any()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


def test_mask_of_zero_silences_all_but_nan():
    config = Config()
    arrays = rounded(random_arrays(config, 0), "float32")
    arrays["mask"] = np.zeros_like(arrays["mask"])
    got = run_library(config, arrays, "float32")
    np.testing.assert_array_equal(
        got["output"], np.broadcast_to(arrays["bias"], config.output_shape)
    )
    check_against_oracle(config, arrays, "float32")


@pytest.mark.parametrize("mask", [np.inf, -np.inf])
@pytest.mark.parametrize("offsets", [0.7, "integer"])
def test_infinite_masks(mask, offsets):
    """Infinite times the sample: corners that weigh nothing do not make it NaN."""
    config = Config(C=24, offsets=offsets)
    arrays = rounded(random_arrays(config, 0), "float32")
    arrays["mask"] = scattered(arrays["mask"], mask, every=5)
    with np.errstate(invalid="ignore"):  # infinity times a sample of 0, beyond the image
        want = run_oracle_im2col(config, arrays, coordinate_dtype=np.float32)["columns"]
    got = run_library_im2col(config, arrays, "float32")["columns"]
    special = ~np.isfinite(want)
    assert np.isinf(want).any()
    np.testing.assert_array_equal(got[special], want[special])
    assert np.isfinite(got[~special]).all()


@pytest.mark.parametrize("mask", [np.inf, -np.inf, np.nan])
def test_special_masks_reach_the_gradients_of_their_corners_alone(mask):
    config = Config(C=24, offsets=0.7)
    arrays = rounded(random_arrays(config, 0), "float32")
    arrays["mask"] = scattered(arrays["mask"], mask, every=200)
    with np.errstate(invalid="ignore"):  # infinities of both signs meet
        want = run_oracle(config, arrays, coordinate_dtype=np.float32)["input"]
    got = run_library(config, arrays, "float32")["input"]
    assert 0 < np.isfinite(want).sum() < want.size
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
