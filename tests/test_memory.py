"""A training step must not hold the columns: kernels of 3x3 and 7x7 need about the same memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from numerics import on_cuda

SIZE, CHANNELS, LAYERS = 112, 64, 2
MB = 2**20

# Two layers, so that anything kept from forward to backward is held twice. "columns" is the
# same convolution over deform_im2col, which does hold the columns: what the test must detect.
SCRIPT = textwrap.dedent(
    """
    import resource
    import sys

    import mlx.core as mx

    from mlx_deform import deform_im2col
    from mlx_deform.nn import DeformConv2d
    from numerics import test_device

    how, kernel, size, channels, count = sys.argv[1], *map(int, sys.argv[2:])
    mx.set_default_device(test_device())
    layers = [DeformConv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(count)]
    taps = kernel * kernel
    x = mx.random.normal((1, size, size, channels))
    offsets = [mx.random.normal((1, size, size, 2 * taps)) for _ in layers]
    masks = [mx.random.uniform(shape=(1, size, size, taps)) for _ in layers]
    parameters = [layer.parameters() for layer in layers]
    mx.eval(x, offsets, masks, parameters)

    def apply(layer, x, offset, mask):
        if how == "layer":
            return layer(x, offset, mask)
        columns = deform_im2col(x, offset, kernel, padding=kernel // 2, mask=mask)
        return columns @ layer.weight.reshape(channels, -1).T + layer.bias

    def loss(parameters, x, offsets, masks):
        for layer, values, offset, mask in zip(layers, parameters, offsets, masks):
            layer.update(values)
            x = apply(layer, x, offset, mask)
        return mx.mean(x * x)

    def resident():
        if sys.platform == "darwin":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Not ru_maxrss, which starts from that of the process that started this one.
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    step = mx.value_and_grad(loss, argnums=(0, 1, 2, 3))
    before = resident()
    mx.reset_peak_memory()
    mx.eval(step(parameters, x, offsets, masks))
    print(mx.get_peak_memory(), resident() - before)
    """
)


def measure(how, kernel, size=SIZE):
    """Bytes: the peak of MLX's memory, and what the process grew by, in one training step."""
    # Of the GPU's chunks: CUDA holds some at a time, as many for either kernel.
    environment = {**os.environ, "MLX_DEFORM_COLUMN_BUDGET_MB": "2"}
    sizes = map(str, (kernel, size, CHANNELS, LAYERS))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, *sizes],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    peak, grown = map(int, done.stdout.split())
    measured = {"get_peak_memory": peak, "resident size": grown}
    if on_cuda():  # whose memory is not the process's
        del measured["resident size"]
    return measured


def columns(kernel, size=SIZE):
    return size**2 * kernel**2 * CHANNELS * 4


def arguments(kernel, size=SIZE):
    """Offsets, masks and weights of all layers, which do grow with the kernel."""
    return LAYERS * kernel**2 * (3 * size**2 + CHANNELS**2) * 4


@pytest.fixture(scope="module")
def small():
    return measure("layer", 3)


# Twice: the arguments and their gradients, whatever else the library keeps must be small.
GROWTH_ALLOWED = 2 * (arguments(7) - arguments(3)) + 32 * MB


def test_the_bound_would_notice_the_columns():
    assert columns(7) - columns(3) > 1.2 * GROWTH_ALLOWED
    assert columns(7) > 140 * MB


def test_a_training_step_does_not_hold_the_columns(small):
    large = measure("layer", 7)
    for name in small:
        growth = large[name] - small[name]
        assert growth <= GROWTH_ALLOWED, f"{name}: {growth / MB:.0f} MB more"
        assert large[name] > arguments(7) / 2, f"{name}: nothing was measured"


def test_the_measurement_sees_columns_where_they_are(small):
    size = 56  # a quarter of the pixels
    large = measure("columns", 7, size)
    for name in small:
        assert large[name] > 0.9 * LAYERS * columns(7, size), name
