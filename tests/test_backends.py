"""The same tests on the code that this machine would not choose by itself.

The baseline instruction set, and the GPU's route over its stand-in kernels on the CPU: with a
column budget so small that every convolution takes many chunks.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
TRANSFORMS = "test_deform_conv2d_transforms.py"
ATTENTION = "test_multi_scale_deformable_attention.py"
STAND_IN = {"MLX_DEFORM_STAND_IN": "1"}
OWN_OUTPUTS = {"MLX_DEFORM_STAND_IN": "own"}
SMALL_CHUNKS = {"MLX_DEFORM_COLUMN_BUDGET_MB": "0.01"}
SMALL_PIECES = {"MLX_DEFORM_PIECE_GFLOP": "1e-5"}

without_a_gpu = pytest.mark.skipif(
    test_device() != mx.cpu, reason="a build with a GPU has no stand-in for it"
)


# What to run, by name: the environment and the files; the longest first.
RUNS = {
    # As on CUDA, where kernels have outputs of their own.
    "own-outputs-chunks": (OWN_OUTPUTS | SMALL_CHUNKS, [GRADIENTS]),
    # As on Metal, where they write in place.
    "in-place-chunks": (STAND_IN | SMALL_CHUNKS, [GRADIENTS, SPECIAL]),
    # Each call a chain of primitives.
    "in-place-pieces": (
        STAND_IN | SMALL_CHUNKS | SMALL_PIECES,
        [FORWARD, GRADIENTS, TRANSFORMS, ATTENTION],
    ),
    "in-place": (STAND_IN, [FORWARD, HALF, IM2COL, ATTENTION]),
    "baseline": ({"MLX_DEFORM_ISA": "baseline"}, [FORWARD, HALF, ATTENTION]),
    "own-outputs": (OWN_OUTPUTS, [IM2COL, ATTENTION]),
}


def run_tests(environment, files):
    # Several run side by side, each with one thread.
    common = {"MLX_DEFORM_TEST_DEVICE": "cpu", "MLX_DEFORM_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *files],
        cwd=TESTS,
        env={**os.environ, **common, **environment},
        capture_output=True,
        text=True,
    )


def run_of(item):
    """The name of the run that a test of this file wants, if it isn't skipped, else None."""
    if item.path != Path(__file__) or "run" not in item.fixturenames:
        return None
    run = item.callspec.params["run"]
    return run if run == "baseline" or test_device() == mx.cpu else None


@pytest.fixture(scope="module")
def runs(request):
    wanted = {run_of(item) for item in request.session.items}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run_tests, *RUNS[name]) for name in RUNS if name in wanted}


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this machine"
)
@pytest.mark.parametrize("run", ["baseline"])
def test_baseline_instruction_set(run, runs):
    done = runs[run].result()
    assert done.returncode == 0, done.stdout


@without_a_gpu
@pytest.mark.parametrize("run", [name for name in RUNS if name != "baseline"])
def test_the_route_of_the_gpu(run, runs):
    done = runs[run].result()
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
