"""The self-test passes here on every route, and finds what is broken."""

import os
import re
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_deform import _ext, selftest
from numerics import test_device


def run_selftest(**environment):
    return subprocess.run(
        [sys.executable, "-m", "mlx_deform.selftest"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("stand_in", ["0", "1", "own"])
def test_all_rows_pass(stand_in):
    if stand_in != "0" and test_device() != mx.cpu:
        pytest.skip("a build with a GPU has no stand-in for it")
    done = run_selftest(MLX_DEFORM_STAND_IN=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    passed, rows = map(int, re.search(r"(\d+) of (\d+) rows passed", done.stdout).groups())
    assert passed == rows > 60
    assert ("stand-ins" in done.stdout) == (stand_in != "0")
    assert "paste this into an issue" in done.stdout
    assert f"mlx {mx.__version__}" in done.stdout


def test_every_kernel_has_a_row():
    """Of the Metal library, by their stems."""
    source = _ext._metal_source("float32", 32)
    stems = set(re.findall(r"\[\[kernel\]\] void (\w+)\(", source))
    assert len(stems) > 12
    listed = {name for check in selftest.checks() for name in check.kernels.split()}
    assert listed == stems


def test_what_is_wrong_is_found_by_name(monkeypatch, capsys):
    right = selftest.deform_conv2d

    def wrong(input, offset, weight, *arguments):
        out = right(input, offset, weight, *arguments)
        if input.dtype == mx.float16 and weight.shape[-1] == 1:
            out = out + 0.3 * mx.stop_gradient(out)
        return out

    monkeypatch.setattr(selftest, "deform_conv2d", wrong)
    assert selftest.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "suspects: deform_depthwise_output (float16)\n" in said
    failed = [line.split()[:3] for line in said.splitlines() if line.endswith("FAILED")]
    assert failed == 2 * [["deform_conv2d,", "depthwise", "float16"]]  # in the table and the report


def test_an_exception_is_a_failed_row(monkeypatch, capsys):
    def broken(*arguments, **settings):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selftest, "multi_scale_deformable_attention", broken)
    assert selftest.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in said
    assert "msda_forward" in said


def test_not_a_number_fails():
    nan = mx.array([0.0, float("nan")], mx.float64)
    with mx.stream(mx.cpu):
        assert selftest.error_of(nan, mx.zeros(2, mx.float64), mx.float32) == float("inf")
        assert selftest.error_of(mx.zeros(2, mx.float64), nan, mx.float32) == float("inf")
        assert selftest.error_of(mx.zeros(3), mx.zeros(2), mx.float32) == float("inf")


def test_the_environment_is_put_back():
    os.environ.pop("MLX_DEFORM_INDEX_BITS", None)
    with selftest.environment({"MLX_DEFORM_INDEX_BITS": "64"}):
        assert os.environ["MLX_DEFORM_INDEX_BITS"] == "64"
    assert "MLX_DEFORM_INDEX_BITS" not in os.environ
