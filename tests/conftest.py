"""Every test runs on one device: the GPU where MLX has one, else the CPU.

MLX_DEFORM_TEST_DEVICE=cpu or gpu chooses another. float64 is tested on the CPU everywhere.
"""

import os

import mlx.core as mx
import pytest

from gpu_cases import kernels_of, types  # noqa: F401, fixtures
from numerics import test_device

# The tolerances are float32's, and MLX's products on a GPU default to TF32, whose numbers
# have 11 bits. MLX reads this at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


def pytest_report_header():
    return f"mlx {mx.__version__}, default device {test_device()}"


@pytest.fixture(autouse=True)
def device():
    """The device under test, MLX's default for the length of the test."""
    previous = mx.default_device()
    mx.set_default_device(test_device())
    yield test_device()
    mx.set_default_device(previous)
