"""The output against the float64 oracle, in every type, and what the defaults mean."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform
import oracle
from cases import TILINGS, Config, random_arrays, random_config
from numerics import (
    DTYPES,
    assert_close,
    coordinate_dtype,
    device_for,
    forward_mx,
    mx_arguments,
    output_tolerance,
    rounded,
    run_oracle_forward,
    to_mx,
    to_numpy,
)


def check(config, dtype, seed=0, grid=None):
    arrays = rounded(random_arrays(config, seed, grid), dtype)
    want = run_oracle_forward(config, arrays, coordinate_dtype=coordinate_dtype(dtype))["output"]
    with mx.stream(device_for(dtype)):
        output = forward_mx(config, mx_arguments(arrays, dtype))
        assert output.dtype == getattr(mx, dtype)
        assert output.shape == config.output_shape
        got = to_numpy(output)
    assert_close(got, want, output_tolerance(config, arrays, dtype), "output")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(30))
def test_random_configurations(seed, dtype):
    check(random_config(2000 + seed), dtype, seed)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", TILINGS)
def test_tilings(name, dtype):
    check(TILINGS[name], dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129])
def test_channel_counts(C, dtype):
    """Counts around every vector width, where tails are handled apart."""
    check(Config(C=C, O=C + 1 if C % 2 else C - 1, G=1, DG=1), dtype, seed=C)


@pytest.mark.parametrize(("G", "DG"), [(1, 4), (4, 1), (2, 3), (3, 2), (4, 3), (3, 4), (6, 12)])
def test_groups(G, DG):
    check(Config(C=24, O=18 if G != 4 else 20, G=G, DG=DG), "float32")


def test_depthwise():
    check(Config(C=10, O=20, G=10, DG=1), "float32")
    check(Config(C=10, O=10, G=10, DG=10), "float32")


@pytest.mark.parametrize("N", [0, 1, 33])
def test_batches(N):
    check(Config(N=N), "float32")


@pytest.mark.parametrize("kernel", [(1, 1), (1, 5), (5, 1), (7, 7)])
def test_kernels(kernel):
    check(Config(H=17, W=16, kH=kernel[0], kW=kernel[1], dilation=(2, 1)), "float32")


def test_zero_offset_is_an_ordinary_convolution():
    config = Config(offsets=0, has_mask=False)
    arguments = mx_arguments(random_arrays(config, 0), "float32")
    got = forward_mx(config, arguments)
    want = mx.conv2d(
        arguments["input"],
        arguments["weight"],
        config.stride,
        config.padding,
        config.dilation,
        groups=config.G,
    )
    want = want + arguments["bias"]
    scale = mx.abs(want).max().item()
    assert_close(to_numpy(got), to_numpy(want), 1e-5 * scale, "output")


def test_integer_offsets_move_pixels_exactly():
    """With a one-hot 1x1 kernel the op is a warp: every output pixel is one input pixel."""
    rng = np.random.default_rng(0)
    H, W, C = 5, 7, 3
    image = rng.standard_normal((1, H, W, C)).astype(np.float32)
    rows, columns = rng.integers(0, H, (H, W)), rng.integers(0, W, (H, W))
    offset = np.stack([rows - np.arange(H)[:, None], columns - np.arange(W)], axis=-1)
    output = mlx_deform.deform_conv2d(
        mx.array(image),
        mx.array(offset[None].astype(np.float32)),
        mx.eye(C).reshape(C, 1, 1, C),
    )
    np.testing.assert_array_equal(np.array(output), image[:, rows, columns])


def test_defaults_and_integer_settings():
    """No bias and mask, stride 1, padding 0, dilation 1; an int means the same on both axes."""
    config = Config(stride=(1, 1), padding=(0, 0), dilation=(1, 1), has_mask=False, has_bias=False)
    arrays = rounded(random_arrays(config, 3), "float32")
    input, offset, weight = (to_mx(arrays[n], "float32") for n in ("input", "offset", "weight"))
    tolerance = output_tolerance(config, arrays, "float32")
    want = run_oracle_forward(config, arrays)["output"]
    got = mlx_deform.deform_conv2d(input, offset, weight)
    assert_close(to_numpy(got), want, tolerance, "defaults")

    config = Config(stride=(2, 2), padding=(3, 3), dilation=(2, 2))
    arrays = rounded(random_arrays(config, 4), "float32")
    positional = [
        arrays["input"], arrays["offset"], arrays["weight"], arrays["bias"], 2, 3, 2, arrays["mask"]
    ]  # fmt: skip
    want = oracle.deform_conv2d(*positional)
    got = mlx_deform.deform_conv2d(
        *(a if np.isscalar(a) else to_mx(a, "float32") for a in positional)
    )
    tolerance = output_tolerance(config, arrays, "float32")
    assert_close(to_numpy(got), want, tolerance, "positional integers")
    listed = mlx_deform.deform_conv2d(
        **mx_arguments(arrays, "float32"), stride=[2, 2], padding=[3, 3], dilation=[2, 2]
    )
    assert mx.array_equal(got, listed)


def test_nothing_is_computed_before_it_is_asked_for():
    config = Config()
    arguments = mx_arguments(random_arrays(config, 0), "float32")
    output = forward_mx(config, arguments)
    assert output.shape == config.output_shape
    assert output.dtype == mx.float32


@pytest.mark.parametrize("form", ["device", "stream"])
def test_stream_argument(form):
    config = Config()
    arguments = mx_arguments(random_arrays(config, 0), "float64")
    stream = mx.cpu if form == "device" else mx.new_stream(mx.cpu)
    output = mlx_deform.deform_conv2d(**arguments, **config.settings, stream=stream)
    want = run_oracle_forward(config, random_arrays(config, 0))["output"]
    mx.eval(output)
    np.testing.assert_allclose(np.array(output), want, rtol=0, atol=1e-12)


def test_coordinates_are_single_precision():
    """Unrounded offsets: samples next to a border fall where float32 puts them."""
    config = Config(H=21, W=33, offsets=4)
    arrays = rounded(random_arrays(config, 9, grid=None), "float32")
    borders = np.round(arrays["offset"]) + np.float32(2.0**-23)
    arrays["offset"] = np.where(
        np.random.default_rng(0).random(borders.shape) < 0.5, borders, arrays["offset"]
    ).astype(np.float32)
    want = run_oracle_forward(config, arrays, coordinate_dtype=np.float32)["output"]
    got = to_numpy(forward_mx(config, mx_arguments(arrays, "float32")))
    assert_close(got, want, output_tolerance(config, arrays, "float32"), "output")
