"""The same tests on the code that this machine would not choose by itself.

Every other instruction set of the CPU, and the GPU's route over its stand-in kernels on the
CPU: with a column budget so small that every convolution takes many chunks.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_deform._ext
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

ISAS = ("avx512", "avx2", "baseline")

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
    "avx512": ({"MLX_DEFORM_ISA": "avx512"}, [FORWARD, GRADIENTS, HALF, ATTENTION]),
    "avx2": ({"MLX_DEFORM_ISA": "avx2"}, [FORWARD, GRADIENTS, HALF, ATTENTION]),
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


def why_not(run):
    """Why this machine doesn't do this run, or None."""
    if run not in ISAS:
        return None if test_device() == mx.cpu else "a build with a GPU has no stand-in for it"
    if run not in mlx_deform._ext._isas():
        return f"this machine has no {run}"
    if run == mlx_deform._ext._isa and test_device() == mx.cpu:
        return f"all other tests run {run} on this machine"
    return None


def run_of(item):
    """The name of the run that a test of this file wants, if it isn't skipped, else None."""
    if item.path != Path(__file__) or "run" not in item.fixturenames:
        return None
    run = item.callspec.params["run"]
    return None if why_not(run) else run


@pytest.fixture(scope="module")
def runs(request):
    wanted = {run_of(item) for item in request.session.items}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run_tests, *RUNS[name]) for name in RUNS if name in wanted}


@pytest.mark.parametrize("run", RUNS)
def test_the_other_code(run, runs):
    if why_not(run):
        pytest.skip(why_not(run))
    done = runs[run].result()
    assert done.returncode == 0, done.stdout


def test_an_instruction_set_of_another_machine_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import mlx_deform"],
        env={**os.environ, "MLX_DEFORM_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    names = ", ".join(mlx_deform._ext._isas())
    assert f"MLX_DEFORM_ISA must be an instruction set of this machine, one of {names}" in (
        done.stderr.replace("\n", " ")
    )
    assert "got sse9" in done.stderr


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
