"""Arrays of more than 2**31 elements: what lies beyond is indexed in 64 bits."""

import gc
import os

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform

LIMIT = 2**31


def available_memory():
    try:
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":") for line in lines)
        return 1024 * int(sizes["MemAvailable"].split()[0])
    except OSError:  # not Linux: half of what is there
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


needs_memory = pytest.mark.skipif(available_memory() < 10 << 30, reason="needs 10 GB of memory")


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    gc.collect()
    mx.clear_cache()


@needs_memory
def test_input_beyond_2_31_elements():
    """The four corner pixels of a high image, half a row off: the last row ends beyond 2**31."""
    H, W, C, O = 65544, 64, 512, 3  # noqa: E741
    assert H * W * C > LIMIT
    rng = np.random.default_rng(0)
    ends = rng.standard_normal((4, W, C)).astype(np.float16)
    image = np.zeros((1, H, W, C), np.float16)
    image[0, [0, 1, -2, -1]] = ends
    weight = rng.standard_normal((O, 1, 1, C)).astype(np.float16)
    cotangent = rng.standard_normal((1, 2, 2, O)).astype(np.float16)
    offset = np.zeros((1, 2, 2, 2), np.float32)
    offset[0, 0, :, 0], offset[0, 1, :, 0] = 0.5, -0.5

    input = mx.array(image)
    del image
    outputs, gradients = mx.vjp(
        lambda offset, weight: mlx_deform.deform_conv2d(
            input, offset, weight, stride=(H - 1, W - 1)
        ),
        [mx.array(offset), mx.array(weight)],
        [mx.array(cotangent)],
    )
    output, (grad_offset, grad_weight) = np.array(outputs[0]), map(np.array, gradients)

    ends = ends[:, [0, -1]].astype(np.float64)  # (row, column, C)
    samples = np.stack([ends[0] + ends[1], ends[2] + ends[3]]) / 2
    slopes = np.stack([ends[1] - ends[0], ends[3] - ends[2]])
    weight, cotangent = weight[:, 0, 0].astype(np.float64), cotangent[0].astype(np.float64)
    # Sums of 512 products of standard normal numbers: about 20, rounded to halves.
    np.testing.assert_allclose(output[0], samples @ weight.T, rtol=2**-10, atol=0.02)
    wanted = ((cotangent @ weight) * slopes).sum(axis=-1)
    np.testing.assert_allclose(grad_offset[0, ..., 0], wanted, rtol=2**-10, atol=0.1)
    wanted = np.einsum("yxo,yxc->oc", cotangent, samples)
    np.testing.assert_allclose(grad_weight[:, 0, 0], wanted, rtol=2**-10, atol=0.01)


@needs_memory
def test_output_beyond_2_31_elements():
    """An outer product of a row of pixels and many output channels."""
    W, O = 2**19 + 129, 4096  # noqa: E741
    assert W * O > LIMIT
    rng = np.random.default_rng(0)
    pixels = rng.integers(-9, 10, W).astype(np.float16)
    weight = rng.integers(-9, 10, O).astype(np.float16)
    output = mlx_deform.deform_conv2d(
        mx.array(pixels.reshape(1, 1, W, 1)),
        mx.zeros((1, 1, W, 2)),
        mx.array(weight.reshape(O, 1, 1, 1)),
    )
    for at in (0, 1, LIMIT // O - 1, LIMIT // O, W - 2, W - 1):
        np.testing.assert_array_equal(np.array(output[0, 0, at]), pixels[at] * weight)
