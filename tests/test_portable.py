"""The ops built of MLX's own primitives: the same values, and graphs that leave the process."""

import io
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform
from cases import Config, random_arrays, random_config
from numerics import check_against_oracle, rounded, run_library, run_oracle

CONFIGS = [random_config(seed) for seed in range(700, 720)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_values_and_gradients(config):
    with mlx_deform.portable():
        check_against_oracle(config, random_arrays(config, 3), "float64")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types(dtype):
    config = Config()
    with mlx_deform.portable():
        results = run_library(config, random_arrays(config, 4), dtype)
    plain = run_library(config, random_arrays(config, 4), dtype)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}[dtype]
    for name, value in results.items():
        error = np.abs(value - plain[name]).max()
        assert error <= 2 * eps * np.abs(plain[name]).max(), (name, error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_offsets_that_are_no_place(bad):
    config = Config()
    arrays = rounded(random_arrays(config, 5), "float64")
    arrays["offset"].reshape(-1)[::7] = bad
    with mlx_deform.portable():
        got = run_library(config, arrays, "float64")
    want = run_oracle(config, arrays)
    np.testing.assert_allclose(got["output"], want["output"], rtol=1e-10, atol=1e-10)


def graph():
    columns = mlx_deform.deform_im2col(mx.ones((1, 4, 4, 2)), mx.zeros((1, 2, 2, 18)), 3)
    text = io.StringIO()
    mx.export_to_dot(text, columns)
    return text.getvalue()


def test_only_inside_the_block():
    assert "DeformIm2col" in graph()
    with mlx_deform.portable():
        with mlx_deform.portable():
            assert "DeformIm2col" not in graph()
        assert "DeformIm2col" not in graph()
    with pytest.raises(RuntimeError, match="left"), mlx_deform.portable():
        raise RuntimeError("left")
    assert "DeformIm2col" in graph()


IMPORTING = """
import sys
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
function = mx.import_function(sys.argv[1])
arrays = np.load(sys.argv[2])
out, gradient = function(*[mx.array(arrays[name]) for name in ("x", "offset", "weight", "mask")])
assert "mlx_deform" not in sys.modules
np.savez(sys.argv[3], out=np.array(out), gradient=np.array(gradient))
"""


FILES = ("step.mlxfn", "in.npz", "out.npz")


def test_export_and_import_in_a_fresh_process(tmp_path):
    rng = np.random.default_rng(6)
    arrays = {
        "x": rng.standard_normal((2, 9, 8, 6)).astype(np.float32),
        "offset": rng.standard_normal((2, 9, 8, 2 * 3 * 9)).astype(np.float32),
        "weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "mask": rng.random((2, 9, 8, 3 * 9)).astype(np.float32),
    }

    def step(x, offset, weight, mask):
        def loss(offset):
            return (mlx_deform.deform_conv2d(x, offset, weight, padding=1, mask=mask) ** 2).sum()

        out = mlx_deform.deform_conv2d(x, offset, weight, padding=1, mask=mask)
        return out, mx.grad(loss)(offset)

    with mx.stream(mx.cpu):
        values = [mx.array(a) for a in arrays.values()]
        with pytest.raises(ValueError, match="Unable to serialize"):
            mx.export_function(str(tmp_path / "refused.mlxfn"), step, *values)
        with mlx_deform.portable():
            mx.export_function(str(tmp_path / "step.mlxfn"), step, *values)
        want = step(*values)
    np.savez(tmp_path / "in.npz", **arrays)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, *(str(tmp_path / name) for name in FILES)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "out.npz")
    for name, expected in zip(("out", "gradient"), want, strict=True):
        expected = np.array(expected)
        assert np.abs(got[name] - expected).max() <= 1e-5 * np.abs(expected).max()
