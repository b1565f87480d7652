"""float16 and bfloat16: within twice the error of rounding the exact result.

The arguments are rounded to the half type first; the exact result is the float64 oracle's
for those values. Offsets are such that float32 holds every coordinate exactly, so that no
sample changes its cell. Coordinates must not be computed in halves: at a width of 2048 their
spacing is a whole pixel or more.
"""

import mlx.core as mx
import numpy as np
import pytest

from cases import Config, random_arrays
from numerics import (
    HALF_DTYPES,
    check_against_oracle,
    rms,
    rounded,
    rounds_columns,
    run_library,
    run_oracle,
    to_mx,
    to_numpy,
)

WIDTHS = [17, 256, 1024, 2048]


def wide(W, **changes):
    config = Config(N=1, H=5, W=W, C=24, O=16, kH=3, kW=3, stride=(1, 1), padding=(1, 1))
    return config.but(dilation=(1, 1), G=1, DG=2, **changes)


def check_rounding(config, dtype, **dtypes):
    arrays = rounded(random_arrays(config, config.W), dtype, **dtypes)
    want = run_oracle(config, arrays)
    got = run_library(config, arrays, dtype, **dtypes)
    assert got.keys() == want.keys()
    for name, exact in want.items():
        stored = to_numpy(to_mx(exact, dtype))
        error, ideal = got[name] - exact, stored - exact
        # On a GPU the columns and their cotangents are rounded too, before they are summed.
        times = 4 if rounds_columns() and name != "output" else 2
        assert rms(error) <= times * rms(ideal), name
        assert np.abs(error).max() <= times * np.abs(ideal).max(), name


@pytest.mark.parametrize("W", WIDTHS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_within_twice_the_ideal_rounding(dtype, W):
    check_rounding(wide(W), dtype)


@pytest.mark.parametrize("W", WIDTHS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_within_twice_the_ideal_rounding_with_float32_offsets(dtype, W):
    check_rounding(wide(W), dtype, offset="float32", mask="float32")


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_offsets_far_across_a_wide_image(dtype):
    config = wide(2048, offsets=50).but(C=4, O=2, kH=1, kW=3, padding=(0, 1))
    check_rounding(config.but(H=60, W=130), dtype, offset="float32")
    check_rounding(config.but(H=5, padding=(40, 1)), dtype, offset="float32")


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_long_sums(dtype):
    """Sums of thousands of terms are kept in float32 and rounded once."""
    check_rounding(Config(N=2, H=21, W=23, C=150, O=144, kH=5, kW=3, G=1, DG=3), dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("offset", ["float32", "half"])
@pytest.mark.parametrize("mask", ["float32", "half"])
def test_offset_and_mask_types(dtype, offset, mask):
    dtypes = {
        "offset": dtype if offset == "half" else offset,
        "mask": dtype if mask == "half" else mask,
    }
    config = Config()
    check_against_oracle(config, random_arrays(config, 1, grid=None), dtype, **dtypes)


@pytest.mark.skipif(rounds_columns(), reason="a product of halves may overflow on its way")
def test_float16_overflows_to_infinity_as_rounding_does():
    config = Config(has_bias=False)
    arrays = random_arrays(config, 0)
    arrays["input"] = 1e4 * arrays["input"]
    arrays = rounded(arrays, "float16")
    exact = run_oracle(config, arrays)["output"]
    got = run_library(config, arrays, "float16")["output"]
    far = np.abs(exact) > 66000
    assert far.any()
    np.testing.assert_array_equal(got[far], np.sign(exact[far]) * np.inf)
    assert np.isfinite(got[np.abs(exact) < 65000]).all()
    assert mx.finfo(mx.float16).max == 65504
