"""load_torch_weights: PyTorch's modules and ours give the same output from the same weights."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torchvision
from mlx.utils import tree_flatten

from mlx_deform.nn import DeformConv2d, ModulatedDeformConv2d, load_torch_weights
from numerics import TORCHVISION_TOLERANCE, relative_error, to_numpy

# ---------------------------------------------------------------------------
# What PyTorch users have, from the published definitions, on torchvision's op


class MpsModulatedDeformConv2d(torch.nn.Module):
    """ModulatedDeformConv2d of the package mps-deform-conv 0.2.2."""

    def __init__(self, inputs, outputs, kernel, stride, padding, dilation, groups, offset_groups):
        super().__init__()
        self.geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        self.offset_channels = 2 * offset_groups * kernel[0] * kernel[1]
        self.weight = torch.nn.Parameter(torch.zeros(outputs, inputs // groups, *kernel))
        self.bias = torch.nn.Parameter(torch.zeros(outputs))
        channels = self.offset_channels // 2 * 3
        self.offset_conv = torch.nn.Conv2d(inputs, channels, kernel, **self.geometry)

    def forward(self, x):
        predicted = self.offset_conv(x)
        offset = predicted[:, : self.offset_channels]
        mask = torch.sigmoid(predicted[:, self.offset_channels :])
        return torchvision.ops.deform_conv2d(
            x, offset, self.weight, self.bias, mask=mask, **self.geometry
        )


class MmcvModulatedDeformConv2dPack(torchvision.ops.DeformConv2d):
    """mmcv.ops.ModulatedDeformConv2dPack."""

    def __init__(self, inputs, outputs, kernel, stride, padding, dilation, groups, deform_groups):
        super().__init__(inputs, outputs, kernel, stride, padding, dilation, groups)
        channels = deform_groups * 3 * kernel[0] * kernel[1]
        self.conv_offset = torch.nn.Conv2d(inputs, channels, kernel, stride, padding, dilation)

    def forward(self, x):
        o1, o2, mask = torch.chunk(self.conv_offset(x), 3, dim=1)
        return super().forward(x, torch.cat((o1, o2), dim=1), torch.sigmoid(mask))


class MmcvDeformConv2dPack(torchvision.ops.DeformConv2d):
    """mmcv.ops.DeformConv2dPack, which is DCNv1 and has no bias."""

    def __init__(self, inputs, outputs, kernel, stride, padding, dilation, groups, deform_groups):
        super().__init__(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        channels = deform_groups * 2 * kernel[0] * kernel[1]
        self.conv_offset = torch.nn.Conv2d(inputs, channels, kernel, stride, padding, dilation)

    def forward(self, x):
        return super().forward(x, self.conv_offset(x))


class BiRefNetDeformableConv2d(torch.nn.Module):
    """DeformableConv2d of BiRefNet, and of RMBG-2.0."""

    def __init__(self, inputs, outputs, kernel, stride, padding, bias):
        super().__init__()
        self.geometry = {"stride": stride, "padding": padding}
        taps = kernel[0] * kernel[1]
        self.offset_conv = torch.nn.Conv2d(inputs, 2 * taps, kernel, stride, padding)
        self.modulator_conv = torch.nn.Conv2d(inputs, taps, kernel, stride, padding)
        self.regular_conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias)

    def forward(self, x):
        return torchvision.ops.deform_conv2d(
            x,
            self.offset_conv(x),
            self.regular_conv.weight,
            self.regular_conv.bias,
            mask=2.0 * torch.sigmoid(self.modulator_conv(x)),
            **self.geometry,
        )


# ---------------------------------------------------------------------------
# Helpers


def randomized(module, seed=0):
    """Every weight drawn such that offsets spread over several pixels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in module.parameters():
            fan_in = values[0].numel() if values.ndim > 1 else 1
            values.copy_(torch.randn(values.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return module.eval()


def image(channels, height=9, width=11):
    return np.random.default_rng(1).standard_normal((2, channels, height, width)).astype(np.float32)


def assert_same_output(layer, module, *arrays):
    with torch.no_grad():
        want = module(*map(torch.from_numpy, arrays)).numpy()
    got = to_numpy(layer(*(mx.array(array.transpose(0, 2, 3, 1)) for array in arrays)))
    assert want.std() > 0.1
    tolerance = TORCHVISION_TOLERANCE["float32"]
    assert relative_error(got.transpose(0, 3, 1, 2), want) <= tolerance


def state_of(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


# ---------------------------------------------------------------------------
# The same output


GEOMETRY = ((3, 2), (1, 2), (2, 1), (2, 1), 2, 3)  # kernel, stride, padding, dilation, G, DG


@pytest.mark.parametrize("bias", [True, False])
def test_torchvision_deform_conv2d(bias):
    module = randomized(torchvision.ops.DeformConv2d(12, 8, *GEOMETRY[:-1], bias=bias))
    layer = DeformConv2d(12, 8, *GEOMETRY, bias=bias)
    assert load_torch_weights(layer, module.state_dict()) is layer
    rng = np.random.default_rng(2)
    offset = rng.standard_normal((2, 36, 9, 6)).astype(np.float32)
    mask = rng.random((2, 18, 9, 6), np.float32)
    assert_same_output(layer, module, image(12), offset, mask)
    assert_same_output(layer, module, image(12), offset)


@pytest.mark.parametrize("twin", [MmcvModulatedDeformConv2dPack, MpsModulatedDeformConv2d])
def test_packs_that_predict_offset_and_mask_together(twin):
    module = randomized(twin(12, 8, *GEOMETRY))
    layer = load_torch_weights(ModulatedDeformConv2d(12, 8, *GEOMETRY), module.state_dict())
    assert_same_output(layer, module, image(12))


def test_mmcv_deform_conv2d_pack():
    module = randomized(MmcvDeformConv2dPack(12, 8, *GEOMETRY))
    layer = ModulatedDeformConv2d(12, 8, *GEOMETRY, bias=False, mask=False)
    load_torch_weights(layer, module.state_dict())
    assert_same_output(layer, module, image(12))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (7, 7)])
def test_birefnet_deformable_conv2d(kernel, bias):
    padding = (kernel[0] // 2, kernel[1] // 2)
    module = randomized(BiRefNetDeformableConv2d(6, 8, kernel, 1, padding, bias))
    layer = ModulatedDeformConv2d(6, 8, kernel, 1, padding, bias=bias, mask_scale=2)
    load_torch_weights(layer, module.state_dict())
    assert_same_output(layer, module, image(6))


def test_the_older_name_of_mmcvs_convolution():
    module = randomized(MmcvModulatedDeformConv2dPack(12, 8, *GEOMETRY))
    state = {n.replace("conv_offset", "conv_offset_mask"): a for n, a in state_of(module).items()}
    layer = load_torch_weights(ModulatedDeformConv2d(12, 8, *GEOMETRY), state)
    assert_same_output(layer, module, image(12))


def test_the_offset_convolution_beside_the_layer():
    """detectron2's names, and those of detectors before mmcv: conv2_offset.weight for conv2."""
    module = randomized(MmcvModulatedDeformConv2dPack(12, 8, *GEOMETRY))
    beside = {
        f"conv2.{name}".replace("conv2.conv_offset", "conv2_offset"): array
        for name, array in state_of(module).items()
    }
    block = nn.Module()
    block.conv2 = ModulatedDeformConv2d(12, 8, *GEOMETRY)
    load_torch_weights(block, beside)
    assert_same_output(block.conv2, module, image(12))
    under = {f"layer4.{name}": array for name, array in beside.items()}
    alone = load_torch_weights(ModulatedDeformConv2d(12, 8, *GEOMETRY), under, "layer4.conv2")
    assert_same_output(alone, module, image(12))


class Decoder(nn.Module):
    """A model with what stands around deformable layers; `twin` is PyTorch's of the same names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm(8), nn.ReLU())
        self.branches = [
            ModulatedDeformConv2d(8, 8, k, padding=k // 2, mask_scale=2) for k in (1, 3)
        ]
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.head = nn.Linear(5, 7)
        self.scales = [mx.zeros((7,)), mx.zeros((1,))]

    def __call__(self, x):
        x = self.stem(x)
        x = self.up(self.branches[0](x) + self.branches[1](x))
        return self.head(x) * self.scales[0] + self.scales[1]

    @staticmethod
    def twin():
        class Twin(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = torch.nn.Sequential(
                    torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
                )
                self.branches = torch.nn.ModuleList(
                    BiRefNetDeformableConv2d(8, 8, (k, k), 1, k // 2, True) for k in (1, 3)
                )
                self.up = torch.nn.ConvTranspose2d(8, 5, 2, stride=2)
                self.head = torch.nn.Linear(5, 7)
                self.scales = torch.nn.ParameterList([torch.zeros(7), torch.zeros(1)])

            def forward(self, x):
                x = self.stem(x)
                x = self.up(self.branches[0](x) + self.branches[1](x)).movedim(1, -1)
                return (self.head(x) * self.scales[0] + self.scales[1]).movedim(-1, 1)

        module = randomized(Twin())
        module.stem[1].running_mean.uniform_(-1, 1)
        module.stem[1].running_var.uniform_(0.5, 2)
        return module


def test_a_whole_model():
    module = Decoder.twin()
    model = load_torch_weights(Decoder(), module.state_dict())
    model.eval()
    assert_same_output(model, module, image(3))


# ---------------------------------------------------------------------------
# Where the arrays come from


def test_a_safetensors_file(tmp_path):
    module = randomized(MmcvModulatedDeformConv2dPack(12, 8, *GEOMETRY))
    state = {f"backbone.conv2.{name}": mx.array(a) for name, a in state_of(module).items()}
    state["backbone.conv20.weight"] = mx.zeros((2,))  # another layer's
    for path in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        mx.save_safetensors(str(path), state)
        layer = ModulatedDeformConv2d(12, 8, *GEOMETRY)
        load_torch_weights(layer, path, prefix="backbone.conv2")
        assert_same_output(layer, module, image(12))


@pytest.mark.parametrize("prefix", ["net.dcn", "net.dcn."])
def test_a_prefix(prefix):
    module = randomized(torchvision.ops.DeformConv2d(4, 6, 3))
    state = {f"net.dcn.{name}": value for name, value in module.state_dict().items()}
    layer = load_torch_weights(DeformConv2d(4, 6, 3), {**state, "net.fc.weight": 0}, prefix)
    assert np.array_equal(layer.weight, module.weight.detach().permute(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_are_kept(dtype):
    module = randomized(torchvision.ops.DeformConv2d(4, 6, 3)).to(getattr(torch, dtype))
    layer = load_torch_weights(DeformConv2d(4, 6, 3), module.state_dict())
    assert layer.weight.dtype == getattr(mx, "float32" if dtype == "float64" else dtype)
    want = module.weight.detach().permute(0, 2, 3, 1).float().numpy()
    assert np.array_equal(to_numpy(layer.weight), want)


@pytest.mark.parametrize("convert", [np.asarray, mx.array, lambda a: torch.from_numpy(a.copy())])
def test_any_array(convert):
    rng = np.random.default_rng(0)
    state = {"weight": rng.random((6, 4, 3, 3), np.float32), "bias": rng.random(6, np.float32)}
    layer = DeformConv2d(4, 6, 3)
    load_torch_weights(layer, {name: convert(array) for name, array in state.items()})
    assert np.array_equal(layer.weight, state["weight"].transpose(0, 2, 3, 1))
    assert np.array_equal(layer.bias, state["bias"])


# ---------------------------------------------------------------------------
# What doesn't fit


def birefnet_state(**changes):
    state = state_of(randomized(BiRefNetDeformableConv2d(4, 6, (3, 3), 1, 1, True)))
    state.update({name.replace("__", "."): value for name, value in changes.items()})
    return {name: value for name, value in state.items() if value is not None}


WRONG = [
    ({"regular_conv__bias": None}, r"missing: 'bias'; unexpected: none"),
    ({"offset_conv__weight": None}, r"missing: 'offset_conv.weight'; unexpected: none"),
    ({"modulator_conv__bias": None}, r"missing: 'modulator_conv.bias'; unexpected: none"),
    ({"extra__weight": np.zeros(3)}, r"missing: none; unexpected: 'extra.weight'"),
    (
        {"modulator_conv__weight": None},
        r"'offset_conv.weight' must have shape \(27, 4, 3, 3\); got \(18, 4, 3, 3\)",
    ),
    (
        {"regular_conv__weight": np.zeros((6, 3, 3, 4))},
        r"'regular_conv.weight' must have shape \(6, 4, 3, 3\); got \(6, 3, 3, 4\)",
    ),
    (
        {"weight": np.zeros((6, 4, 3, 3))},
        r"must have one name; got weight and regular_conv.weight",
    ),
    ({"regular_conv__bias": [0] * 6}, r"'regular_conv.bias' must be an array .* got list"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_does_not_fit_is_refused_and_nothing_loaded(changes, message):
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, mask_scale=2)
    before = dict(tree_flatten(layer.parameters()))
    with pytest.raises(ValueError, match=rf"^\[load_torch_weights\] .*{message}"):
        load_torch_weights(layer, birefnet_state(**changes))
    after = dict(tree_flatten(layer.parameters()))
    assert all(mx.array_equal(after[name], before[name]) for name in before)


def test_birefnet_without_its_mask_is_refused():
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, mask=False)
    with pytest.raises(ValueError, match=r"unexpected: 'modulator_conv.weight'"):
        load_torch_weights(layer, birefnet_state())


def test_not_strict():
    module = randomized(torchvision.ops.DeformConv2d(4, 6, 3))
    layer = DeformConv2d(4, 6, 3)
    bias = layer.bias
    state = {"weight": module.weight, "other": torch.zeros(2)}
    load_torch_weights(layer, state, strict=False)
    assert np.array_equal(layer.weight, module.weight.detach().permute(0, 2, 3, 1))
    assert layer.bias is bias
    with pytest.raises(ValueError, match="shape"):
        load_torch_weights(layer, {"weight": torch.zeros(1, 4, 3, 3)}, strict=False)


def test_a_mask_of_another_scale_is_warned_of():
    with pytest.warns(UserWarning, match=r"modulator_conv .* 2 \* sigmoid.* mask_scale=1"):
        load_torch_weights(ModulatedDeformConv2d(4, 6, 3, padding=1), birefnet_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = ModulatedDeformConv2d(4, 6, 3, padding=1, mask_scale=2)
        load_torch_weights(layer, birefnet_state())


def test_wrong_files(tmp_path):
    layer = DeformConv2d(4, 6, 3)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_torch_weights(layer, tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth.* file; got '.*model\.onnx'"):
        load_torch_weights(layer, str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match=r"state dict or the path .* got list"):
        load_torch_weights(layer, [("weight", np.zeros((6, 4, 3, 3)))])
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        load_torch_weights(layer, tmp_path / "broken.safetensors")
