"""deform_im2col and its gradients against the oracle, and the op built from it."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform
from cases import TILINGS, Config, random_arrays, random_config
from numerics import (
    DTYPES,
    assert_close,
    check_im2col_against_oracle,
    device_for,
    forward_mx,
    im2col_arguments,
    im2col_mx,
    im2col_vjp_mx,
    mx_arguments,
    output_tolerance,
    rounded,
    run_library_im2col,
    run_oracle_im2col,
    to_mx,
    to_numpy,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(40))
def test_random_configurations(seed, dtype):
    config = random_config(5000 + seed)
    check_im2col_against_oracle(config, random_arrays(config, seed, grid=None), dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", TILINGS)
def test_tilings(name, dtype):
    check_im2col_against_oracle(TILINGS[name], random_arrays(TILINGS[name], 0), dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100])
def test_channel_counts(C, dtype):
    config = Config(C=C, G=1, DG=1)
    check_im2col_against_oracle(config, random_arrays(config, C), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_shapes(dtype):
    config = Config()
    arrays = random_arrays(config, 0)
    with mx.stream(device_for(dtype)):
        arguments = mx_arguments(arrays, dtype)
        cotangent = to_mx(arrays["column_cotangent"], dtype)
        columns, gradients = im2col_vjp_mx(config, arguments, cotangent)
        mx.eval(columns, gradients)
    assert columns.dtype == getattr(mx, dtype)
    assert columns.shape == config.columns_shape
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
        assert gradient.shape == arguments[name].shape, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_offset_and_mask_beside_half(dtype):
    config = Config()
    arrays = random_arrays(config, 0, grid=None)
    check_im2col_against_oracle(config, arrays, dtype, offset="float32", mask="float32")


def test_defaults():
    config = Config(stride=(1, 1), padding=(0, 0), dilation=(1, 1), has_mask=False)
    arrays = rounded(random_arrays(config, 0), "float32")
    input, offset = to_mx(arrays["input"], "float32"), to_mx(arrays["offset"], "float32")
    want = im2col_mx(config, mx_arguments(arrays, "float32"))
    assert mx.array_equal(mlx_deform.deform_im2col(input, offset, config.kernel), want)
    assert mx.array_equal(mlx_deform.deform_im2col(input, offset, config.kernel, 1, 0, 1), want)


def test_integer_kernel_size_and_settings():
    config = Config(kH=3, kW=3, stride=(2, 2), padding=(2, 2), dilation=(2, 2))
    arguments = im2col_arguments(mx_arguments(random_arrays(config, 0), "float32"))
    mask = arguments["mask"]
    want = im2col_mx(config, arguments)
    got = mlx_deform.deform_im2col(arguments["input"], arguments["offset"], 3, 2, 2, 2, mask)
    assert mx.array_equal(got, want)


def test_zero_offset_gathers_patches_in_kernel_order():
    """[kH][kW][C]: tap (i, j) of channel c stands at (i * kW + j) * C + c."""
    config = Config(offsets=0, stride=(1, 1), padding=(0, 0), has_mask=False)
    arrays = rounded(random_arrays(config, 0), "float32")
    columns = run_library_im2col(config, arrays, "float32")["columns"]
    columns = columns.reshape(config.N, config.Ho, config.Wo, config.kH, config.kW, config.C)
    for i in range(config.kH):
        for j in range(config.kW):
            top, left = i * config.dilation[0], j * config.dilation[1]
            patch = arrays["input"][:, top : top + config.Ho, left : left + config.Wo]
            np.testing.assert_array_equal(columns[..., i, j, :], patch)


def test_columns_times_weight_is_the_convolution():
    config = Config(G=1, has_bias=False)
    arrays = rounded(random_arrays(config, 0), "float32")
    arguments = mx_arguments(arrays, "float32")
    weight = arguments["weight"].reshape(config.O, -1)
    product = im2col_mx(config, arguments) @ weight.T
    output = forward_mx(config, arguments)
    tolerance = output_tolerance(config, arrays, "float32")
    assert_close(to_numpy(product), to_numpy(output), 2 * tolerance, "output")


def test_mask_gradient_is_exact_for_a_zero_mask():
    """d column / d mask is the sample itself, also where the mask is 0."""
    config = Config()
    arrays = rounded(random_arrays(config, 0), "float64")
    arrays["mask"] = np.zeros_like(arrays["mask"])
    want = run_oracle_im2col(config, arrays)
    got = run_library_im2col(config, arrays, "float64")
    assert np.abs(want["mask"]).max() > 0
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-12, err_msg=name)


def test_nan_offset():
    config = Config(has_mask=True)
    arrays = rounded(random_arrays(config, 0), "float32")
    arrays["offset"].flat[::17] = np.nan
    check_im2col_against_oracle(config, arrays, "float32")
    want = run_oracle_im2col(config, arrays)
    assert np.isnan(want["columns"]).any()
    assert np.isfinite(want["input"]).all()
