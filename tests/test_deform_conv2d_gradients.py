"""Every gradient against the oracle, in every type, and against finite differences."""

import mlx.core as mx
import numpy as np
import pytest

from cases import TILINGS, Config, random_arrays, random_config
from numerics import (
    ARGUMENTS,
    DTYPES,
    check_against_oracle,
    forward_mx,
    mx_arguments,
    run_library,
    to_numpy,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(30))
def test_random_configurations(seed, dtype):
    config = random_config(3000 + seed)
    check_against_oracle(config, random_arrays(config, seed, grid=None), dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", TILINGS)
def test_tilings(name, dtype):
    check_against_oracle(TILINGS[name], random_arrays(TILINGS[name], 0), dtype)


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100])
def test_channel_counts(C):
    config = Config(C=C, O=C + 1 if C % 2 else C - 1, G=1, DG=1)
    check_against_oracle(config, random_arrays(config, C), "float32")


@pytest.mark.parametrize(("G", "DG"), [(1, 4), (4, 1), (2, 3), (3, 2), (4, 3), (3, 4), (6, 12)])
def test_groups(G, DG):
    config = Config(C=24, O=18 if G != 4 else 20, G=G, DG=DG)
    check_against_oracle(config, random_arrays(config, 0), "float32")


def test_depthwise():
    for config in (Config(C=10, O=20, G=10, DG=1), Config(C=10, O=10, G=10, DG=10)):
        check_against_oracle(config, random_arrays(config, 0), "float32")


@pytest.mark.parametrize("N", [0, 1, 33])
def test_batches(N):
    config = Config(N=N)
    check_against_oracle(config, random_arrays(config, 0), "float32")


def test_empty_batch_has_zero_weight_and_bias_gradients():
    config = Config(N=0)
    got = run_library(config, random_arrays(config, 0), "float32")
    assert got["weight"].shape == config.shapes["weight"]
    assert (got["weight"] == 0).all()
    assert (got["bias"] == 0).all()


def test_zero_offsets():
    """Where training starts: every sample on a cell border, with its right-hand slope."""
    config = Config(offsets=0)
    arrays = random_arrays(config, 0)
    check_against_oracle(config, arrays, "float32")
    assert np.abs(run_library(config, arrays, "float32")["offset"]).max() > 0


def test_many_samples_of_one_pixel():
    """All taps of all pixels read the same cell: the scatter has to add, not overwrite."""
    config = Config(N=2, H=11, W=13, C=6, O=8, G=2, DG=1, stride=(1, 1))
    arrays = random_arrays(config, 0)
    offset = arrays["offset"].reshape(2, config.Ho, config.Wo, config.kH, config.kW, 2)
    taps_y, taps_x = np.arange(config.kH), np.arange(config.kW)
    y = np.arange(config.Ho)[:, None, None, None] - config.padding[0]
    x = np.arange(config.Wo)[:, None, None] - config.padding[1]
    offset[..., 0] = 5.25 - (y + taps_y[:, None] * config.dilation[0])
    offset[..., 1] = 7.75 - (x + taps_x * config.dilation[1])
    check_against_oracle(config, arrays, "float32")
    check_against_oracle(config, arrays, "float64")


# ---------------------------------------------------------------------------
# Finite differences


def inside_cells(config, seed):
    """Arrays with every sample at least 0.1 from the borders of its cell."""
    arrays = random_arrays(config, seed)
    rng = np.random.default_rng([seed, 2])
    shape = arrays["offset"].shape
    arrays["offset"] = np.round(rng.normal(0, 2, shape)) + rng.uniform(0.1, 0.9, shape)
    return arrays


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("seed", range(10))
def test_central_differences(seed, name):
    """Along random directions, with a large step.

    Inside the cells the output is a polynomial of degree 2 in any one argument, so central
    differences are exact but for rounding.
    """
    config = random_config(4000 + seed, has_mask=True, has_bias=True)
    if config.N == 0:
        config = config.but(N=2)
    if config.N == 33:
        config = config.but(N=3)
    arrays = inside_cells(config, seed)
    gradient = run_library(config, arrays, "float64")[name]
    rng = np.random.default_rng([seed, 3])
    step = 2.0**-10

    def loss(value):
        with mx.stream(mx.cpu):
            output = to_numpy(forward_mx(config, mx_arguments({**arrays, name: value}, "float64")))
        return np.sum(output * arrays["cotangent"])

    for _ in range(3):
        direction = rng.uniform(-1, 1, arrays[name].shape)
        up = loss(arrays[name] + step * direction)
        down = loss(arrays[name] - step * direction)
        want = (up - down) / (2 * step)
        terms = np.abs(gradient * direction)
        error = abs(np.sum(gradient * direction) - want)
        scale = terms.sum() + abs(want) + 1
        assert error <= 1e-9 * scale, f"{error} for a scale of {scale} in {config}"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_central_differences_of_single_elements(name):
    config = Config(N=1, H=4, W=5, C=6, O=4, kH=2, kW=1)
    arrays = inside_cells(config, 0)
    gradient = run_library(config, arrays, "float64")[name]
    rng = np.random.default_rng(0)
    step = 2.0**-10
    for _ in range(20):
        at = tuple(rng.integers(size) for size in gradient.shape)
        losses = []
        for sign in (1, -1):
            value = arrays[name].copy()
            value[at] += sign * step
            output = run_library(config, {**arrays, name: value}, "float64")["output"]
            losses.append(np.sum(output * arrays["cotangent"]))
        want = (losses[0] - losses[1]) / (2 * step)
        assert abs(gradient[at] - want) <= 1e-9 * (1 + abs(want)), at
