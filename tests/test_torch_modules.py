"""The bridge's layers take the checkpoints, and draw the weights, of those they replace."""

# ruff: noqa: E402  (torch may not be installed)

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

import mlx_deform.torch as bridge
from torch_cases import DEVICE, DTYPE, relative_error


def drawn(layer, *arguments, **settings):
    torch.manual_seed(5)
    return layer(*arguments, **settings)


@pytest.mark.parametrize(
    "arguments",
    [
        (6, 4, 3),
        (6, 4, (3, 2), (1, 2), (2, 0), (2, 1), 2, False),  # torchvision's bias is the eighth
        (6, 4, 3, 1, 0, 1, 2, True),
    ],
)
def test_torchvisions_layer(arguments):
    theirs = drawn(torchvision.ops.DeformConv2d, *arguments)
    ours = drawn(bridge.DeformConv2d, *arguments)
    assert ours.offset_groups == 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.double(), ours.to(DEVICE, DTYPE)
    kH, kW = theirs.kernel_size
    x = torch.randn(2, 6, 9, 8)
    out = torch.nn.functional.conv2d(
        x, torch.ones(1, 6, kH, kW), None, theirs.stride, theirs.padding, theirs.dilation
    ).shape[2:]
    offset, mask = torch.randn(2, 2 * kH * kW, *out), torch.rand(2, kH * kW, *out)
    for plans in ((offset,), (offset, mask)):
        want = theirs(*(tensor.double() for tensor in (x, *plans)))
        got = ours(*(tensor.to(DEVICE, DTYPE) for tensor in (x, *plans)))
        assert relative_error(got, want) <= (1e-12 if torch.float64 == DTYPE else 1e-5)


# Names and shapes as mps-deform-conv 0.2.2 writes them, for (6, 4, 3, groups 2, offset groups 3).
CHECKPOINT = {
    "weight": (4, 3, 3, 3),
    "bias": (4,),
    "offset_conv.weight": (81, 6, 3, 3),
    "offset_conv.bias": (81,),
}


def test_mps_deform_convs_layers():
    modulated = bridge.ModulatedDeformConv2d(6, 4, 3, 1, 1, 1, 2, 3, True)
    assert {n: tuple(t.shape) for n, t in modulated.state_dict().items()} == CHECKPOINT
    checkpoint = {name: torch.randn(shape) / 4 for name, shape in CHECKPOINT.items()}
    modulated.load_state_dict(checkpoint)
    plain = bridge.DeformConv2d(6, 4, 3, 1, 1, 1, 2, 3, bias=True)
    plain.load_state_dict({name: checkpoint[name] for name in ("weight", "bias")})
    assert "bias" not in bridge.DeformConv2d(6, 4, 3, bias=False).state_dict()

    x = torch.randn(2, 6, 7, 8)
    predicted = torch.nn.functional.conv2d(
        x, checkpoint["offset_conv.weight"], checkpoint["offset_conv.bias"], padding=1
    )
    plans = predicted[:, :54], predicted[:, 54:].sigmoid()
    want = torchvision.ops.deform_conv2d(
        x.double(),
        plans[0].double(),
        checkpoint["weight"].double(),
        checkpoint["bias"].double(),
        padding=1,
        mask=plans[1].double(),
    )
    assert relative_error(modulated.to(DEVICE)(x.to(DEVICE)), want) <= 1e-5
    got = plain.to(DEVICE)(*(tensor.to(DEVICE) for tensor in (x, *plans)))
    assert relative_error(got, want) <= 1e-5


def test_initialisation():
    layer = drawn(bridge.ModulatedDeformConv2d, 6, 4, (3, 2), groups=2)
    bound = 1 / math.sqrt(3 * 3 * 2)
    for tensor in (layer.weight, layer.bias):
        assert 0.3 * bound < tensor.abs().max() <= bound
    assert not layer.offset_conv.weight.any()
    assert not layer.offset_conv.bias.any()


@pytest.mark.parametrize("layer", [bridge.DeformConv2d, bridge.ModulatedDeformConv2d])
@pytest.mark.parametrize(("channels", "name"), [((5, 4), "in_channels"), ((4, 5), "out_channels")])
def test_groups_must_divide_the_channels(layer, channels, name):
    with pytest.raises(ValueError, match=rf"{name} must be divisible by groups = 2; got 5"):
        layer(*channels, 3, groups=2)


def test_printed():
    text = str(bridge.DeformConv2d(6, 4, 3, padding=1, offset_groups=2, bias=False))
    assert "6, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)" in text
    assert "offset_groups=2, bias=False" in text


# ---------------------------------------------------------------------------
# TorchScript


def convolve_pair(input: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return bridge.deform_conv2d(input, offset, weight, stride=(2, 1), padding=(1, 2))


def convolve_int(
    input: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    return bridge.deform_conv2d(input, offset, weight, None, 2, padding=1, mask=mask)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
def test_scripted_functions(tmp_path):
    x = torch.randn(2, 6, 9, 8, dtype=DTYPE, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=DTYPE, device=DEVICE)
    offset = torch.randn(2, 18, 5, 10, dtype=DTYPE, device=DEVICE)
    scripted = torch.jit.script(convolve_pair)
    want = torchvision.ops.deform_conv2d(
        x.cpu(), offset.cpu(), weight.cpu(), stride=(2, 1), padding=(1, 2)
    )
    scripted.save(str(tmp_path / "function.pt"))
    for function in (scripted, torch.jit.load(str(tmp_path / "function.pt"))):
        got = function(x, offset, weight)
        assert relative_error(got, want) <= (1e-12 if torch.float64 == DTYPE else 1e-5)
    (gradient,) = torch.autograd.grad(scripted(x, offset, weight).square().sum(), x)
    (wanted,) = torch.autograd.grad(want.square().sum(), x)
    assert relative_error(gradient, wanted) <= (1e-12 if torch.float64 == DTYPE else 1e-5)
    with pytest.raises(RuntimeError, match="offset must have shape"):
        scripted(x, offset[..., 1:], weight)

    offset, mask = offset[..., ::3].contiguous(), torch.rand_like(offset[:, :9, :, ::3])
    scripted = torch.jit.script(convolve_int)
    for modulation in (None, mask):
        got = scripted(x, offset, weight, modulation)
        assert torch.equal(got, convolve_int(x, offset, weight, modulation))


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
def test_scripted_layers():
    x = torch.randn(2, 6, 9, 8, dtype=DTYPE, device=DEVICE)
    layer = bridge.ModulatedDeformConv2d(6, 4, 3, padding=1).to(DEVICE, DTYPE)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))
    layer = bridge.DeformConv2d(6, 4, (3, 2)).to(DEVICE, DTYPE)
    offset = torch.randn(2, 12, 7, 7, dtype=DTYPE, device=DEVICE)
    assert torch.equal(torch.jit.script(layer)(x, offset), layer(x, offset))
