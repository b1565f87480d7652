"""A training step must not hold the columns: kernels of 3x3 and 7x7 need about the same memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import pytest

from numerics import on_cuda, test_device

SIZE, CHANNELS, LAYERS = 112, 64, 2
BUDGET_MB = 2
MB = 2**20

# Environments: what this machine does by itself, and, without a GPU, its routes.
ROUTES = {"itself": {}}
if test_device() == mx.cpu and not mx.metal.is_available():
    ROUTES["in place"] = {"MLX_DEFORM_STAND_IN": "1"}
    ROUTES["own outputs"] = {"MLX_DEFORM_STAND_IN": "own"}

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


def run_script(script, environment, *arguments):
    """What a script prints, with these additions to the environment: a list of numbers."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=Path(__file__).parent,
        env={**os.environ, "MLX_DEFORM_COLUMN_BUDGET_MB": str(BUDGET_MB), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


def measure(how, kernel, size=SIZE, environment=None):
    """Bytes: the peak of MLX's memory, and what the process grew by, in one training step."""
    # The budget is of the GPU's chunks: CUDA holds some at a time, as many for either kernel.
    peak, grown = run_script(SCRIPT, environment or {}, how, kernel, size, CHANNELS, LAYERS)
    measured = {"get_peak_memory": peak, "resident size": grown}
    if on_cuda():  # whose memory is not the process's
        del measured["resident size"]
    return measured


def columns(kernel, size=SIZE):
    return size**2 * kernel**2 * CHANNELS * 4


def arguments(kernel, size=SIZE):
    """Offsets, masks and weights of all layers, which do grow with the kernel."""
    return LAYERS * kernel**2 * (3 * size**2 + CHANNELS**2) * 4


@pytest.fixture(scope="module", params=ROUTES)
def route(request):
    return ROUTES[request.param]


@pytest.fixture(scope="module")
def small(route):
    return measure("layer", 3, environment=route)


# Twice: the arguments and their gradients, whatever else the library keeps must be small.
GROWTH_ALLOWED = 2 * (arguments(7) - arguments(3)) + 32 * MB


def test_the_bound_would_notice_the_columns():
    assert columns(7) - columns(3) > 1.2 * GROWTH_ALLOWED
    assert columns(7) > 140 * MB


def test_a_training_step_does_not_hold_the_columns(small, route):
    large = measure("layer", 7, environment=route)
    for name in small:
        growth = large[name] - small[name]
        assert growth <= GROWTH_ALLOWED, f"{name}: {growth / MB:.0f} MB more"
        assert large[name] > arguments(7) / 2, f"{name}: nothing was measured"


def test_the_measurement_sees_columns_where_they_are():
    size = 56  # a quarter of the pixels
    large = measure("columns", 7, size)
    for name in large:
        assert large[name] > 0.9 * LAYERS * columns(7, size), name


# ---- one backward

# BiRefNet's largest layer, its map and channels scaled down, and as a batch of 8: of the
# latter many chunks, whose products and sums must not pile up.
BACKWARDS = {
    "birefnet": {"batch": 1, "size": 64, "channels": 32, "outputs": 128, "kernel": 7},
    "birefnet, batch 8": {"batch": 8, "size": 40, "channels": 32, "outputs": 256, "kernel": 7},
    "groups": {"batch": 3, "size": 40, "channels": 96, "outputs": 288, "kernel": 5, "groups": 3},
}
ORDER = ("batch", "size", "channels", "outputs", "kernel", "groups")
BACKWARD = textwrap.dedent(
    """
    import sys

    import mlx.core as mx

    from mlx_deform import deform_conv2d
    from numerics import test_device

    batch, size, channels, outputs, kernel, groups = map(int, sys.argv[2:])
    dtype = getattr(mx, sys.argv[1])
    mx.set_default_device(test_device())
    taps = kernel * kernel
    arguments = [
        mx.random.normal((batch, size, size, channels)).astype(dtype),
        mx.random.normal((batch, size, size, 2 * taps)),
        mx.random.normal((outputs, kernel, kernel, channels // groups)).astype(dtype),
        mx.random.uniform(shape=(batch, size, size, taps)),
    ]
    cotangent = mx.random.normal((batch, size, size, outputs)).astype(dtype)
    mx.eval(arguments, cotangent)

    def op(input, offset, weight, mask):
        return deform_conv2d(input, offset, weight, padding=kernel // 2, mask=mask)

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, gradients = mx.vjp(op, arguments, [cotangent])
    mx.eval(gradients)
    # In float32 each before it becomes its argument's type.
    results = 4 * sum(x.size for x in arguments)
    weight, image = 4 * arguments[2].size, 4 * size * size * channels
    print(mx.get_peak_memory() - before, results, weight, image)
    """
)


def is_gpu_route(route):
    return bool(route) or test_device() != mx.cpu


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", BACKWARDS)
def test_a_backward_holds_the_column_budget_and_two_weights(route, case, dtype):
    if not is_gpu_route(route):
        pytest.skip("the CPU has no column buffers")
    sizes = {"groups": 1, **BACKWARDS[case]}
    peak, results, weight, image = run_script(BACKWARD, route, dtype, *map(sizes.get, ORDER))
    allowed = results + BUDGET_MB * MB + 2 * weight + MB
    if dtype == "float16":
        allowed += results / 2  # as their arguments' type
    if route.get("MLX_DEFORM_STAND_IN") == "own" or on_cuda():
        # A launch has outputs of its own: the image's gradient from each of two chunks,
        # which may lie in two images, besides that of the weight.
        allowed += 4 * image + 2 * weight
    taps = sizes["kernel"] ** 2
    columns = sizes["batch"] * sizes["size"] ** 2 * taps * sizes["channels"] * 4
    chunks = columns / (BUDGET_MB * MB)
    if sizes["batch"] > 1:  # the bound would notice a weight a chunk
        assert chunks * weight > 1.2 * allowed
    assert columns > 1.2 * allowed
    assert peak >= results / 2, "nothing was measured"
    assert peak <= allowed, f"{(peak - results) / MB:.1f} MB beside the results"
