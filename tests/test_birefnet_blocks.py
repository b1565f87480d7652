"""Each block of the BiRefNet port beside its twin in PyTorch, with the same random weights."""

import mlx.core as mx
import numpy as np
import pytest
import torch

import birefnet_twin as twin
from mlx_deform.models import layers as shared
from mlx_deform.models.birefnet import SwinConfig, decoder, layers, swin
from mlx_deform.nn import load_torch_weights
from numerics import to_numpy

# The tolerance of float32, relative to the largest magnitude.
TOLERANCE = 1e-4


def tensor(*shape, seed=1):
    """Of PyTorch's layout, channels first where there are four axes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_mlx(x):
    return mx.array((x.permute(0, 2, 3, 1) if x.ndim == 4 else x).detach().numpy())


def assert_close(got, want, tolerance=TOLERANCE):
    """got: MLX, channels last; want: torch, channels first where there are four axes."""
    want = (want.permute(0, 2, 3, 1) if want.ndim == 4 else want).detach().double().numpy()
    assert got.shape == want.shape
    error = np.abs(to_numpy(got) - want).max() / np.abs(want).max()
    assert error <= tolerance, error


def assert_same(module, reference, *inputs):
    """Both give the same with the reference's weights, in inference."""
    twin.randomize(reference).eval()
    load_torch_weights(module, reference.state_dict()).eval()
    with torch.no_grad():
        want = reference(*inputs)
    got = module(*(to_mlx(x) for x in inputs))
    assert_close(got, want)
    return got


@pytest.fixture
def small_pieces(monkeypatch):
    """Work is cut in as many pieces as can be."""
    for module in (layers, decoder):
        monkeypatch.setattr(module, "piece", lambda: 1)


# ---------------------------------------------------------------------------
# Layers

SIZES = [
    ((5, 7), (9, 12)),
    ((9, 12), (5, 7)),
    ((1, 3), (4, 8)),
    ((6, 1), (3, 5)),
    ((4, 6), (1, 1)),
    ((3, 1), (3, 2)),
    ((16, 24), (32, 48)),
    ((64, 96), (32, 48)),
    ((7, 7), (7, 7)),
    ((10, 11), (37, 53)),
]


@pytest.mark.parametrize(("given", "wanted"), SIZES)
def test_resize(given, wanted):
    x = tensor(2, 3, *given)
    assert_close(layers.resize(to_mlx(x), wanted), twin.interpolate(x, wanted), 1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_resize_keeps_the_type(dtype):
    assert layers.resize(mx.ones((1, 3, 4, 2), dtype), (5, 7)).dtype == dtype


def test_laplacian():
    x = tensor(2, 1, 7, 9)
    assert_close(layers.laplacian(to_mlx(x)), twin.laplacian(x), 1e-6)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(9, 11), (2, 13), (1, 3)])
def test_convolution_by_rows(kernel, bias, size, small_pieces):
    reference = torch.nn.Conv2d(3, 5, kernel, padding=kernel // 2, bias=bias)
    with mx.stream(mx.cpu):
        assert_same(layers.Conv2d(3, 5, kernel, bias=bias), reference, tensor(2, 3, *size))


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_deformable_convolution(kernel):
    reference = twin.DeformableConv2d(6, 10, kernel)
    module = layers.DeformableConv2d(6, 10, kernel)
    x = tensor(2, 6, 7, 9)
    assert_same(module, reference, x)
    scale, shift = tensor(10, seed=2), tensor(10, seed=3)
    want = reference(x) * scale[:, None, None] + shift[:, None, None]
    assert_close(module.scaled(to_mlx(x), to_mlx(scale), to_mlx(shift)), want)


def test_batch_norm_in_training():
    reference, module = twin.randomize(torch.nn.BatchNorm2d(5)), shared.BatchNorm(5)
    load_torch_weights(module, reference.state_dict()).train()
    for seed in range(3):
        x = 2 * tensor(3, 5, 4, 6, seed=seed) + 1
        assert_close(module(to_mlx(x)), reference.train()(x), 1e-5)
    assert_close(module.running_mean, reference.running_mean, 1e-6)
    assert_close(module.running_var, reference.running_var, 1e-6)
    assert_close(module.eval()(to_mlx(x)), reference.eval()(x), 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_half(training):
    """Statistics beyond float16's range are no harm, and the type is kept."""
    module = shared.BatchNorm(2)
    module.running_var = mx.array([1e6, 1e-7])
    module.train(training)
    x = mx.array([[300.0, 0.1], [-300.0, 0.3]], mx.float16)
    y = module(x)
    assert y.dtype == mx.float16
    assert module.running_var.dtype == mx.float32
    if not training:
        np.testing.assert_allclose(to_numpy(y)[:, 0], [0.3, -0.3], rtol=1e-2)


def test_drop_path():
    module = layers.DropPath(0.25)
    x = mx.random.normal((4000, 2, 3), key=mx.random.key(0))
    mx.random.seed(0)
    y = to_numpy(module(x))
    kept = (y != 0).all((1, 2))
    assert np.array_equal(kept, (y != 0).any((1, 2)))  # whole pictures
    np.testing.assert_allclose(y[kept], to_numpy(x)[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
    assert module.eval()(x) is x


# ---------------------------------------------------------------------------
# Swin


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 3)])
def test_patch_merging(size):
    x = tensor(2, *size, 6)
    reference = twin.randomize(twin.PatchMerging(6))
    module = load_torch_weights(swin.PatchMerging(6), reference.state_dict())
    assert_close(module(mx.array(x.numpy())), reference(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(16, 20), (13, 21), (3, 5)])
@pytest.mark.parametrize("shift", [0, 2])
def test_block(size, shift):
    x = tensor(2, *size, 12)
    reference = twin.randomize(twin.SwinTransformerBlock(12, 3, 5, shift))
    module = load_torch_weights(swin.SwinBlock(12, 3, 5, shift, 0.0), reference.state_dict())
    mask = mx.array(swin.shift_mask(*size, 5))
    assert_close(module(mx.array(x.numpy()), mask), reference(x).permute(0, 3, 1, 2))


SMALL = SwinConfig(channels=8, depths=(2, 1, 3, 2), heads=(1, 2, 4, 8), window=5)


def assert_same_maps(size):
    reference = twin.randomize(
        twin.SwinTransformer(SMALL.channels, SMALL.depths, SMALL.heads, SMALL.window)
    )
    module = load_torch_weights(swin.SwinTransformer(SMALL), reference.state_dict())
    x = tensor(2, 3, *size)
    maps = module(to_mlx(x))
    assert len(maps) == 4
    for got, want in zip(maps, reference(x), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("size", [(64, 96), (46, 33)])
def test_backbone(size):
    assert_same_maps(size)


def test_backbone_in_pieces(small_pieces):
    assert_same_maps((32, 48))


def test_drop_path_grows_with_depth():
    module = swin.SwinTransformer(SMALL, drop_path=0.35)
    chances = [1 - block.drop_path._keep for stage in module.layers for block in stage.blocks]
    np.testing.assert_allclose(chances, np.linspace(0, 0.35, 8), atol=1e-12)


# ---------------------------------------------------------------------------
# Decoder


@pytest.mark.parametrize("order", ["channels", "columns"])
def test_image_patches(order):
    x = tensor(2, 3, 20, 42)
    got = decoder.image_patches(to_mlx(x), (4, 6), order)
    assert_close(got, twin.image_patches(x, (4, 6), order), 0)


def test_aspp():
    assert_same(decoder.ASPPDeformable(6, 0.5), twin.ASPPDeformable(6), tensor(2, 6, 5, 7))


def test_decoder_block(small_pieces):
    assert_same(decoder.BasicDecBlk(10, 6, 0.5), twin.BasicDecBlk(10, 6), tensor(2, 10, 5, 7))


def test_dropout_is_of_training_alone():
    module = decoder.ASPPDeformable(6, 0.9)
    x = to_mlx(tensor(2, 6, 5, 7))
    assert mx.array_equal(module.eval()(x), module(x))
    zeros = to_numpy(module.train()(x) == 0).mean()
    assert 0.8 < zeros < 1


@pytest.mark.parametrize("size", [(9, 12), (1, 3), (2, 2)])
@pytest.mark.parametrize("pieces", [1, 1 << 20])
def test_projected_image_convolutions(size, pieces, monkeypatch):
    monkeypatch.setattr(decoder, "piece", lambda: pieces)
    reference = twin.randomize(twin.SimpleConvs(3, 5))
    module = load_torch_weights(decoder.SimpleConvs(3, 5), reference.state_dict())
    x, weight = tensor(2, 3, *size), tensor(1, 5)
    want = torch.einsum("oc,nchw->nohw", weight, reference(x))
    assert_close(module.projected(to_mlx(x), to_mlx(weight)), want)
    assert_close(module(to_mlx(x)), reference(x))


CHANNELS = [128, 64, 32, 16]


@pytest.mark.parametrize("order", ["channels", "columns"])
def test_decoder(order):
    reference = twin.Decoder(CHANNELS, order, 0.0)
    twin.randomize(reference).eval()
    module = load_torch_weights(decoder.Decoder(CHANNELS, order, 0.0), reference.state_dict())
    image, gradient = tensor(1, 3, 64, 32), tensor(1, 1, 64, 32, seed=2)
    maps = [
        tensor(1, count, 64 >> level, 32 >> level, seed=level)
        for count, level in zip(CHANNELS[::-1], (2, 3, 4, 5), strict=True)
    ]
    with torch.no_grad():
        want = reference(image, maps, gradient)
    module.eval()
    got = shared.last(module.steps(to_mlx(image), [to_mlx(m) for m in maps]))
    assert_close(got, want[0][3])
    # Training's outputs, with the statistics of inference.
    module._training = True
    got = shared.last(module.steps(to_mlx(image), [to_mlx(m) for m in maps], to_mlx(gradient)))
    for arrays, tensors, count in zip(got, want, (4, 3, 3), strict=True):
        assert len(arrays) == len(tensors) == count
        for array, t in zip(arrays, tensors, strict=True):
            assert_close(array, t)
