"""The layers of mlx_deform.nn: what they compute, how they start, what they refuse."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from cases import Config, random_arrays
from mlx_deform.nn import DeformConv2d, ModulatedDeformConv2d
from numerics import (
    assert_close,
    mx_arguments,
    relative_error,
    rounded,
    run_oracle,
    to_mx,
    to_numpy,
    tolerances,
)

LAYERS = (DeformConv2d, ModulatedDeformConv2d)
SIZES = {"in_channels": 12, "out_channels": 8, "kernel_size": 3}


def layer_of(config):
    return DeformConv2d(
        config.C,
        config.O,
        config.kernel,
        config.stride,
        config.padding,
        config.dilation,
        config.G,
        config.DG,
        config.has_bias,
    )


def randomized(layer, scale):
    """The layer with offset_conv drawn at random, so that it bends."""
    weights = layer.offset_conv.parameters()
    layer.offset_conv.update(
        {name: scale * mx.random.normal(value.shape) for name, value in weights.items()}
    )
    return layer


# ---------------------------------------------------------------------------
# DeformConv2d


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"has_mask": False},
        {"has_bias": False},
        {"G": 1, "DG": 1, "kH": 1, "kW": 3, "stride": (2, 1), "dilation": (1, 3)},
    ],
)
def test_deform_conv2d_against_the_oracle(changes):
    config = Config(**changes)
    arrays = rounded(random_arrays(config, 0), "float32")
    arguments = mx_arguments(arrays, "float32")
    layer = layer_of(config)
    layer.load_weights([(n, arguments[n]) for n in ("weight", "bias") if n in arguments])
    output = layer(arguments["input"], arguments["offset"], arguments.get("mask"))
    allowed = tolerances(config, arrays, "float32")["output"]
    assert_close(to_numpy(output), run_oracle(config, arrays)["output"], allowed, "output")


@pytest.mark.parametrize("size", [5, (5, 5), [5, 5], np.int64(5)])
def test_an_int_stands_for_a_pair(size):
    layer = DeformConv2d(4, 6, size, stride=2, padding=2, dilation=1)
    assert layer.weight.shape == (6, 5, 5, 4)
    assert layer.stride == layer.padding == (2, 2)
    assert layer(mx.zeros((1, 9, 11, 4)), mx.zeros((1, 5, 6, 50))).shape == (1, 5, 6, 6)


# ---------------------------------------------------------------------------
# ModulatedDeformConv2d


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 0.5), ({"mask_scale": 2}, 1), ({"mask": False}, 1)]
)
def test_modulated_starts_as_a_scaled_convolution(options, scale):
    layer = ModulatedDeformConv2d(6, 8, (3, 2), (1, 2), (2, 1), (2, 1), groups=2, **options)
    x = mx.random.normal((2, 9, 11, 6))
    plain = mx.conv2d(x, layer.weight, (1, 2), (2, 1), (2, 1), 2)
    want = scale * plain + layer.bias
    assert relative_error(to_numpy(layer(x)), to_numpy(want)) < 1e-5


def test_the_first_channels_are_offsets_in_pixels():
    """Rows come first: 1 in every dy and -2 in every dx samples further down and to the left."""
    layer = ModulatedDeformConv2d(3, 5, (3, 2), padding=1, offset_groups=3, mask_scale=3)
    taps, groups = 6, 3
    bias = np.full(3 * taps * groups, 60.0)  # logits of a mask that is mask_scale
    bias[: 2 * taps * groups : 2] = 1
    bias[1 : 2 * taps * groups : 2] = -2
    layer.offset_conv.bias = mx.array(bias)
    x = mx.random.normal((2, 12, 13, 3))
    shifted = mx.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0)))[:, 1:, :-2]
    want = 3 * mx.conv2d(shifted, layer.weight, padding=1) + layer.bias
    inner = (slice(None), slice(3, 9), slice(4, 10))  # the shift lost rows and columns beyond
    assert relative_error(to_numpy(layer(x)[inner]), to_numpy(want[inner])) < 1e-5


@pytest.mark.parametrize("mask", [True, False])
def test_what_modulated_predicts_is_what_deform_conv2d_takes(mask):
    options = {"stride": 2, "padding": 1, "groups": 2, "offset_groups": 3}
    layer = randomized(ModulatedDeformConv2d(12, 8, 3, **options, mask=mask, mask_scale=2), 0.1)
    x = mx.random.normal((2, 9, 11, 12))
    offset, values = layer.offset_and_mask(x)
    assert offset.shape == (2, 5, 6, 2 * 3 * 9)
    assert mx.std(offset) > 0.3
    if mask:
        assert values.shape == (2, 5, 6, 3 * 9)
        assert 0 < values.min().item() < 0.8 < 1.2 < values.max().item() < 2
    else:
        assert values is None
    plain = DeformConv2d(12, 8, 3, **options)
    plain.load_weights([("weight", layer.weight), ("bias", layer.bias)])
    assert mx.array_equal(layer(x), plain(x, offset, values))


def test_modulated_learns_to_look_elsewhere():
    """The target is the input two rows further down: a 1x1 kernel reaches it by its offset."""
    mx.random.seed(0)
    y, x = np.mgrid[0:12, 0:14]
    waves = [np.sin(0.4 * y + 0.3 * x), np.cos(0.5 * y - 0.2 * x), np.sin(0.3 * y + 1)]
    image = mx.array(np.stack(waves, -1)[None].astype(np.float32))
    layer = ModulatedDeformConv2d(3, 3, 1, mask=False, bias=False)
    layer.weight = mx.eye(3)[:, None, None, :]
    layer.freeze(keys="weight", recurse=False)
    optimizer = optim.Adam(0.05)

    def loss(image):
        return mx.abs(layer(image)[:, :-3] - image[:, 2:-1]).mean()

    step = nn.value_and_grad(layer, loss)
    first = loss(image).item()
    for _ in range(150):
        value, gradients = step(image)
        assert set(dict(tree_flatten(gradients))) == {"offset_conv.weight", "offset_conv.bias"}
        optimizer.update(layer, gradients)
        mx.eval(layer.parameters(), optimizer.state)
    assert value.item() < 0.1 * first
    dy, dx = to_numpy(layer.offset_and_mask(image)[0])[0, 2:-4, 2:-2].reshape(-1, 2).T
    assert abs(np.median(dy) - 2) < 0.2
    assert abs(np.median(dx)) < 0.2


# ---------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layer_type", LAYERS)
def test_initialisation_is_torchvisions(layer_type, groups):
    mx.random.seed(1)
    layer = layer_type(24, 96, (5, 3), groups=groups)
    fan_in = 24 // groups * 15
    for values, spread in ((layer.weight, 0.05), (layer.bias, 0.25)):
        values = to_numpy(values) * math.sqrt(fan_in)
        assert np.abs(values).max() <= 1
        assert np.abs(values).max() > 0.95
        assert abs(values.mean()) < spread
        assert abs(values.std() * math.sqrt(3) - 1) < spread
    mx.random.seed(1)
    assert mx.array_equal(layer.weight, layer_type(24, 96, (5, 3), groups=groups).weight)


def test_the_predictor_starts_at_zero():
    layer = ModulatedDeformConv2d(**SIZES, offset_groups=2)
    assert layer.offset_conv.weight.shape == (54, 3, 3, 12)
    assert not mx.any(layer.offset_conv.weight)
    assert not mx.any(layer.offset_conv.bias)


def test_parameters():
    names = {"weight", "bias"}
    predictor = {"offset_conv.weight", "offset_conv.bias"}
    for layer, want in (
        (DeformConv2d(**SIZES), names),
        (DeformConv2d(**SIZES, bias=False), {"weight"}),
        (ModulatedDeformConv2d(**SIZES), names | predictor),
        (ModulatedDeformConv2d(**SIZES, bias=False), {"weight"} | predictor),
    ):
        assert set(dict(tree_flatten(layer.parameters()))) == want
        assert set(dict(tree_flatten(layer.trainable_parameters()))) == want


def test_repr():
    assert repr(DeformConv2d(12, 8, 3, padding=1, groups=2)) == (
        "DeformConv2d(12, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
        "dilation=(1, 1), groups=2, offset_groups=1, bias=True)"
    )
    model = nn.Sequential(
        ModulatedDeformConv2d(12, 8, (3, 2), bias=False, offset_groups=3, mask_scale=2)
    )
    assert repr(model) == (
        "Sequential(\n"
        "  (layers.0): ModulatedDeformConv2d(12, 8, kernel_size=(3, 2), stride=(1, 1), "
        "padding=(0, 0), dilation=(1, 1), groups=1, offset_groups=3, bias=False, mask_scale=2\n"
        "    (offset_conv): Conv2d(12, 54, kernel_size=(3, 2), stride=(1, 1), padding=(0, 0), "
        "dilation=(1, 1), groups=1, bias=True)\n"
        "  )\n"
        ")"
    )
    assert repr(ModulatedDeformConv2d(**SIZES, mask=False)).splitlines()[0].endswith("mask=False")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype):
    layer = randomized(ModulatedDeformConv2d(**SIZES, padding=1), 0.05)
    x = mx.random.normal((2, 9, 11, 12))
    want = to_numpy(layer(x))
    layer.set_dtype(getattr(mx, dtype))
    x = x.astype(getattr(mx, dtype))
    output = layer(x)
    assert output.dtype == x.dtype
    assert relative_error(to_numpy(output), want) < {"float16": 0.005, "bfloat16": 0.05}[dtype]

    layer.offset_conv.set_dtype(mx.float32)
    offset, mask = layer.offset_and_mask(x)
    assert offset.dtype == mask.dtype == mx.float32
    assert layer(x).dtype == x.dtype


def test_weights_survive_a_file(tmp_path):
    layer = randomized(ModulatedDeformConv2d(**SIZES), 0.1)
    layer.save_weights(str(tmp_path / "layer.safetensors"))
    other = ModulatedDeformConv2d(**SIZES)
    other.load_weights(str(tmp_path / "layer.safetensors"))
    x = mx.random.normal((1, 6, 7, 12))
    assert mx.array_equal(layer(x), other(x))


def test_a_compiled_training_step_is_the_same():
    layer = randomized(ModulatedDeformConv2d(**SIZES, padding=1), 0.1)
    x = mx.random.normal((2, 7, 9, 12))
    step = nn.value_and_grad(layer, lambda x: mx.mean(layer(x) ** 2))
    value, gradients = step(x)
    compiled = mx.compile(step, inputs=layer.state)
    compiled_value, compiled_gradients = compiled(x)
    assert mx.allclose(value, compiled_value, rtol=1e-5)
    for (name, got), (_, want) in zip(
        tree_flatten(compiled_gradients), tree_flatten(gradients), strict=True
    ):
        assert mx.any(want != 0), name
        assert relative_error(to_numpy(got), to_numpy(want)) < 1e-4, name


# ---------------------------------------------------------------------------
# Errors

WRONG_ARGUMENTS = [
    ({"in_channels": 0}, "in_channels must be an integer of at least 1; got 0"),
    ({"in_channels": 3.0}, "in_channels must be an integer of at least 1; got 3.0"),
    ({"out_channels": -1}, "out_channels must be an integer of at least 1; got -1"),
    ({"kernel_size": 0}, "kernel_size must be an integer of at least 1, or a pair of them; got 0"),
    ({"kernel_size": (3, 3, 3)}, "kernel_size must be .* got \\(3, 3, 3\\)"),
    ({"kernel_size": "33"}, "kernel_size must be .* got '33'"),
    ({"stride": (1, 0)}, "stride must be an integer of at least 1, .* got \\(1, 0\\)"),
    ({"padding": -1}, "padding must be an integer of at least 0, .* got -1"),
    ({"dilation": 1.5}, "dilation must be an integer of at least 1, .* got 1.5"),
    ({"groups": 0}, "groups must be an integer of at least 1; got 0"),
    ({"groups": 5}, "in_channels must be divisible by groups; got in_channels=12 and groups=5"),
    ({"groups": 3}, "out_channels must be divisible by groups; got out_channels=8 and groups=3"),
    (
        {"offset_groups": 5},
        "in_channels must be divisible by offset_groups; got in_channels=12 and offset_groups=5",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS)
@pytest.mark.parametrize("layer_type", LAYERS)
def test_wrong_arguments(layer_type, arguments, message):
    with pytest.raises(ValueError, match=rf"^\[{layer_type.__name__}\] {message}$"):
        layer_type(**{**SIZES, **arguments})


@pytest.mark.parametrize("scale", [0, -1, math.inf, math.nan, "2", None])
def test_wrong_mask_scale(scale):
    with pytest.raises(ValueError, match=r"mask_scale must be a positive number; got"):
        ModulatedDeformConv2d(**SIZES, mask_scale=scale)


def test_wrong_arrays():
    x, offset, mask = mx.zeros((1, 7, 9, 12)), mx.zeros((1, 5, 7, 36)), mx.zeros((1, 5, 7, 18))
    layer = DeformConv2d(**SIZES, offset_groups=2)
    assert layer(x, offset, mask).shape == (1, 5, 7, 8)
    # Of twice as many channels the op alone would make two groups.
    doubled = mx.concatenate([x, x], axis=-1)
    for arguments, message in (
        (
            (doubled, offset, mask),
            r"x must .* in_channels = 12 .*; got shape \(1, 7, 9, 24\)",
        ),
        ((x[0], offset, mask), r"x must have 4 axes.* got shape \(7, 9, 12\)"),
        ((x, offset[..., :18], mask), r"offset must .* 36 channels; got shape \(1, 5, 7, 18\)"),
        ((x, offset, mask[..., :9]), r"mask must .* 18 channels; got shape \(1, 5, 7, 9\)"),
        ((x, offset[:, 1:], mask), r"offset"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    modulated = ModulatedDeformConv2d(**SIZES)
    for wrong in (doubled, x[0]):
        with pytest.raises(ValueError, match=r"^\[ModulatedDeformConv2d\] x must have 4 axes"):
            modulated(wrong)


def test_offsets_of_another_type_are_taken():
    config = Config()
    arrays = random_arrays(config, 0)
    layer = layer_of(config)
    layer.set_dtype(mx.float16)
    arguments = [to_mx(arrays[n], d) for n, d in (("input", "float16"), ("offset", "float32"))]
    assert layer(*arguments).dtype == mx.float16
