"""multi_scale_deformable_attention and its gradients against the oracle."""

import mlx.core as mx
import numpy as np
import pytest

from msda_cases import (
    ARGUMENTS,
    Config,
    call,
    check_against_oracle,
    mx_arguments,
    random_arrays,
    random_config,
    run_library,
    run_oracle,
    tolerances,
)
from numerics import DTYPES, HALF_DTYPES, assert_all_close, assert_close, rounded, to_mx, to_numpy


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(40))
def test_random_configurations(seed, dtype, method):
    config = random_config(seed, method=method)
    check_against_oracle(config, random_arrays(config, seed), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("D", [*range(1, 64, 2), 16, 32, 64, 96, 100, 160])
def test_channel_counts(D, dtype):
    config = Config(N=1, D=D, Q=5)
    check_against_oracle(config, random_arrays(config, D), dtype)


@pytest.mark.parametrize("points", [(1,), (2,), (3, 6, 3), (6, 6), (1, 70, 2), (130,), (64, 65)])
def test_points_per_level(points):
    shapes = ((6, 5), (3, 4), (2, 2))[: len(points)]
    config = Config(shapes=shapes, points=points, ragged=True)
    check_against_oracle(config, random_arrays(config, 1), "float32")


def test_equal_points_in_both_forms():
    config = Config()
    arrays = random_arrays(config, 2)
    plain, ragged = (run_library(c, arrays, "float32") for c in (config, config.but(ragged=True)))
    for name in plain:
        np.testing.assert_array_equal(plain[name], ragged[name], name)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize(
    "changes",
    [
        {"N": 0},
        {"Q": 0},
        {"N": 0, "Q": 0},
        {"shapes": ((1, 1), (1, 1))},
        {"shapes": ((1, 9), (9, 1))},
        {"shapes": ((4, 3),), "points": (5,)},
        {"Q": 1, "M": 1, "D": 1},
        {"Q": 1300, "D": 3, "shapes": ((40, 30), (20, 15))},
        {"M": 16, "D": 16, "shapes": ((9, 8),), "points": (2,), "Q": 33},
    ],
    ids=str,
)
def test_sizes(changes, method):
    config = Config(method=method, **changes)
    check_against_oracle(config, random_arrays(config, 3), "float32")


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_float32_locations_and_weights_beside_half(dtype):
    config = Config(D=32)
    check_against_oracle(
        config, random_arrays(config, 4), dtype, locations="float32", weights="float32"
    )


def test_float64_locations_beside_float32():
    config = Config()
    with mx.stream(mx.cpu):
        value, locations, weights = mx_arguments(
            random_arrays(config, 5, grid=None), "float32", locations="float64"
        )
        out = call(config, value, locations, weights)
        wide = call(config, *(x.astype(mx.float64) for x in (value, locations, weights)))
        assert out.dtype == mx.float32
        assert mx.array_equal(out, wide.astype(mx.float32))


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, 3e9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_locations_that_are_no_place(dtype, bad, method):
    config = Config(method=method, D=9)
    arrays = rounded(random_arrays(config, 6), dtype)
    arrays["locations"].reshape(-1)[::7] = bad
    check_against_oracle(config, arrays, dtype)
    output = run_library(config, arrays, dtype)["output"]
    assert np.isnan(output).any() == np.isnan(bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_or_value_that_is_not_finite(bad):
    """NaN and infinities stand where the oracle has them, in the output at least."""
    config = Config(D=9)
    for name in ("weights", "value"):
        arrays = random_arrays(config, 7)
        arrays[name].reshape(-1)[::31] = bad
        got = run_library(config, arrays, "float32")["output"]
        want = run_oracle(config, arrays)["output"]
        assert not np.isfinite(want).all()
        allowed = np.where(np.isfinite(want), 1e-4, 0)
        assert_close(got, want, allowed, "output")


def test_a_corner_off_the_map_is_not_read():
    """Values of infinity in the neighbouring rows of memory must not come in."""
    config = Config(N=1, shapes=((3, 4), (2, 2)), points=(1, 1), ragged=True)
    arrays = random_arrays(config, 8)
    arrays["locations"][...] = (0.02, 0.98)  # the lower left edge of both maps
    arrays["value"][:, [5, 9, 13]] = np.inf  # none of the pixels there
    arrays["value"][:, [0, 3, 4, 7, 11, 12, 15]] = np.nan
    got = run_library(config, arrays, "float32")
    assert np.isfinite(got["output"]).all()
    assert np.isfinite(got["weights"]).all()
    assert np.isfinite(got["locations"]).all()


def test_slopes_on_pixel_centres_are_right_hand():
    config = Config(N=1, shapes=((4, 8),), points=(1,), Q=1, M=1, D=1)
    value = np.arange(32.0).reshape(4, 8) ** 2
    for y, x in ((1, 2), (0, 0), (3, 7), (-1, 4), (2, -1)):
        arrays = {
            "value": value.reshape(1, 32, 1, 1),
            "locations": np.array([(x + 0.5) / 8, (y + 0.5) / 4]).reshape(1, 1, 1, 1, 2),
            "weights": np.ones((1, 1, 1, 1)),
            "cotangent": np.ones((1, 1, 1)),
        }
        padded = np.pad(value, 1)
        here = padded[y + 1, x + 1]
        want = (8 * (padded[y + 1, x + 2] - here), 4 * (padded[y + 2, x + 1] - here))
        got = run_library(config, arrays, "float64")
        np.testing.assert_allclose(got["locations"].ravel(), want, rtol=1e-12)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_finite_differences(name):
    config = Config(N=1, Q=3)
    arrays = random_arrays(config, 9, grid=None)
    rng = np.random.default_rng(10)
    direction = rng.standard_normal(arrays[name].shape)
    step = 1e-7 if name == "locations" else 1e-4
    loss = [
        (run_library(config, {**arrays, name: arrays[name] + t * direction}, "float64")["output"]
         * arrays["cotangent"]).sum()
        for t in (-step, step)
    ]  # fmt: skip
    got = (run_library(config, arrays, "float64")[name] * direction).sum()
    np.testing.assert_allclose(got, (loss[1] - loss[0]) / (2 * step), rtol=1e-6)


def permuted(array, rng):
    """The same values with strides of another order of axes."""
    order = rng.permutation(array.ndim)
    return mx.contiguous(array.transpose(*order.tolist())).transpose(*np.argsort(order).tolist())


def test_strided_arguments():
    config = Config()
    rng = np.random.default_rng(11)
    arrays = rounded(random_arrays(config, 12), "float32")
    want, allowed = run_oracle(config, arrays), tolerances(config, arrays, "float32")
    for _ in range(4):
        arguments = [permuted(x, rng) for x in mx_arguments(arrays, "float32")]
        cotangent = permuted(to_mx(arrays["cotangent"], "float32"), rng)
        outputs, gradients = mx.vjp(lambda *x: call(config, *x), arguments, [cotangent])
        got = dict(zip(("output", *ARGUMENTS), map(to_numpy, outputs + gradients), strict=True))
        assert_all_close(got, want, allowed)


def test_broadcast_and_sliced_arguments():
    config = Config()
    arrays = rounded(random_arrays(config, 13), "float32")
    value, locations, weights = mx_arguments(arrays, "float32")
    locations = mx.broadcast_to(locations[:1, :, :1], locations.shape)
    weights = mx.concatenate([weights, weights], axis=-1)[..., ::2]
    got = call(config, value, locations, weights)
    want = call(config, value, *(mx.array(np.array(x)) for x in (locations, weights)))
    assert mx.array_equal(got, want)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_of_some_arguments(wanted):
    config = Config()
    arrays = rounded(random_arrays(config, 14), "float32")
    arguments = mx_arguments(arrays, "float32")
    cotangent = to_mx(arrays["cotangent"], "float32")
    loss = mx.value_and_grad(lambda *x: (call(config, *x) * cotangent).sum(), wanted)
    _, gradients = loss(*arguments)
    gradients = [gradients] if len(wanted) == 1 else gradients
    want, allowed = run_oracle(config, arrays), tolerances(config, arrays, "float32")
    for index, gradient in zip(wanted, gradients, strict=True):
        name = ARGUMENTS[index]
        assert_close(to_numpy(gradient), want[name], allowed[name], name)
