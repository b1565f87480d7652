"""500 random configurations against torchvision: output and every gradient."""

import numpy as np
import pytest

from cases import random_arrays, random_config
from numerics import (
    TORCHVISION_TOLERANCE,
    relative_error,
    rounded,
    run_library,
    run_oracle,
    run_torchvision,
)

pytest.importorskip("torchvision", reason="torchvision is not installed")

SEEDS = range(500)


def check(config, arrays, dtype):
    # In float64 on both sides: only the library's own rounding is judged.
    want = run_torchvision(config, arrays, "float64")
    got = run_library(config, arrays, dtype)
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert all(error <= TORCHVISION_TOLERANCE[dtype] for error in errors.values()), (
        f"{errors} in {config}"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_float64(seed):
    config = random_config(seed)
    check(config, random_arrays(config, seed, grid=None), "float64")


@pytest.mark.parametrize("seed", SEEDS)
def test_float32(seed):
    config = random_config(seed)
    check(config, rounded(random_arrays(config, seed), "float32"), "float32")


def test_the_draws_cover_what_they_should():
    configs = [random_config(seed) for seed in SEEDS]
    assert {config.N for config in configs} == {0, 1, 3, 33}
    assert {config.offsets for config in configs} == {0, 0.7, 4, 50, "integer"}
    groups = {(config.G, config.DG) for config in configs}
    assert {(2, 3), (3, 2), (4, 3), (1, 1), (4, 4)} <= groups
    for pair in ("stride", "padding", "dilation", "kernel"):
        unequal = sum(len(set(getattr(config, pair))) == 2 for config in configs)
        assert unequal > len(configs) / 2, pair
    assert any(config.dilation[0] * (config.kH - 1) >= config.H for config in configs)
    assert {(c.has_mask, c.has_bias) for c in configs} == {
        (mask, bias) for mask in (False, True) for bias in (False, True)
    }


@pytest.mark.parametrize("seed", range(40))
def test_the_oracle_agrees_with_torchvision(seed):
    """The references confirm each other, so that a wrong one cannot approve the library."""
    config = random_config(1000 + seed)
    arrays = random_arrays(config, seed, grid=None)
    want = run_torchvision(config, arrays, "float64")
    got = run_oracle(config, arrays)
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-12, name


def test_right_hand_slope_where_the_value_is_zero():
    """At -1 exactly the sample is 0 and its slope is not; at H both are 0."""
    config = random_config(7, N=1, H=5, W=7, kH=1, kW=1, stride=(1, 1), padding=(0, 0))
    config = config.but(has_mask=False, offsets=0)
    arrays = random_arrays(config, 7)
    rows = np.arange(config.Ho)[:, None, None]
    for row, flat in ((-1.0, False), (float(config.H), True)):
        arrays["offset"][0, ..., 0::2] = row - rows
        want = run_torchvision(config, arrays, "float64")
        got = run_library(config, arrays, "float64")
        bias = 0.0 if arrays["bias"] is None else arrays["bias"]
        assert (got["output"] == np.broadcast_to(bias, got["output"].shape)).all()
        assert (got["offset"][..., 0::2] == 0).all() == flat
        assert relative_error(got["offset"], want["offset"]) <= 1e-9
