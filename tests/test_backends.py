"""The same tests on the code that this machine would not choose by itself.

The baseline instruction set, and the GPU's route over its stand-in kernels on the CPU: with a
column budget so small that every convolution takes many chunks.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from numerics import test_device

TESTS = Path(__file__).parent
FORWARD = "test_deform_conv2d_forward.py"
GRADIENTS = "test_deform_conv2d_gradients.py"
HALF = "test_deform_conv2d_half.py"
IM2COL = "test_deform_im2col.py"
SPECIAL = "test_deform_conv2d_special.py"
STAND_IN = {"MLX_DEFORM_STAND_IN": "1", "MLX_DEFORM_TEST_DEVICE": "cpu"}

without_a_gpu = pytest.mark.skipif(
    test_device() != mx.cpu, reason="a build with a GPU has no stand-in for it"
)


def run_tests(environment, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this machine"
)
def test_baseline_instruction_set():
    done = run_tests({"MLX_DEFORM_ISA": "baseline", "MLX_DEFORM_TEST_DEVICE": "cpu"}, FORWARD, HALF)
    assert done.returncode == 0, done.stdout


@without_a_gpu
@pytest.mark.parametrize(
    ("kind", "budget", "files"),
    [
        # As on Metal, where kernels write in place.
        ("1", "64", [FORWARD, HALF, IM2COL]),
        ("1", "0.002", [FORWARD, GRADIENTS, SPECIAL]),
        # As on CUDA, where each has outputs of its own.
        ("own", "64", [IM2COL]),
        ("own", "0.002", [GRADIENTS]),
    ],
)
def test_the_route_of_the_gpu(kind, budget, files):
    environment = {
        **STAND_IN,
        "MLX_DEFORM_STAND_IN": kind,
        "MLX_DEFORM_COLUMN_BUDGET_MB": budget,
    }
    done = run_tests(environment, *files)
    assert done.returncode == 0, done.stdout


@without_a_gpu
def test_the_stand_in_takes_the_route_of_the_gpu():
    """Only that route reads the budget, so nonsense there shows that it runs."""
    code = """
import mlx.core as mx, mlx_deform
x = mx.ones((1, 4, 4, 2))
mx.eval(mlx_deform.deform_conv2d(x, mx.zeros((1, 2, 2, 18)), mx.ones((3, 3, 3, 2)), stream=mx.cpu))
"""
    environment = {**os.environ, "MLX_DEFORM_COLUMN_BUDGET_MB": "nonsense"}
    environment.pop("MLX_DEFORM_STAND_IN", None)
    command = [sys.executable, "-c", code]
    usual = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert usual.returncode == 0, usual.stderr
    done = subprocess.run(command, env={**environment, **STAND_IN}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MLX_DEFORM_COLUMN_BUDGET_MB" in done.stderr
