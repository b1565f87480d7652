"""The bridge computes what torchvision computes: values, gradients, types, layouts, errors."""

# ruff: noqa: E402  (torch may not be installed)
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

import mlx.core as mx

import mlx_deform.torch as bridge
from cases import random_config
from mlx_deform.torch import _bridge, _layout
from numerics import EPS
from torch_cases import (
    CONFIG,
    DEVICE,
    DTYPE,
    assert_same,
    convolve,
    given,
    one_thread,  # noqa: F401
    relative_error,
    results,
    tensors,
)

oracle = torchvision.ops.deform_conv2d
TOLERANCE = 1e-9 if torch.float64 == DTYPE else 1e-4
CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("seed", range(200))
def test_random_configurations_in_float64(seed):
    config = random_config(seed)
    arguments = tensors(config, seed, torch.float64, "cpu", requires_grad=True, grid=None)
    want = results(oracle, config, arguments)
    got = results(bridge.deform_conv2d, config, arguments)
    assert_same(got, want, 1e-9)
    for name, result in got.items():
        assert result.stride() == want[name].stride()


@pytest.mark.skipif(DEVICE != "mps", reason="needs a Mac: torch and MLX with a Metal device")
@pytest.mark.parametrize("seed", range(40))
def test_random_configurations_on_mps(seed):
    config = random_config(seed)
    on_cpu = tensors(config, seed, torch.float64, "cpu", requires_grad=True)
    on_mps = tensors(config, seed, torch.float32, "mps", requires_grad=True)
    got = results(bridge.deform_conv2d, config, on_mps)
    assert all(result.device.type == "mps" for result in got.values())
    assert_same(got, results(oracle, config, on_cpu), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plans", ["same", "float32"])
def test_types(dtype, plans):
    """Against torchvision in float64 of the same rounded values; one rounding of the result."""
    arguments = tensors(CONFIG, 1, dtype)
    wide = tensors(CONFIG, 1, torch.float64, "cpu")
    for name, tensor in arguments.items():
        if plans == "float32" and name in ("offset", "mask"):
            tensor = arguments[name] = wide[name].to(DEVICE, torch.float32)
        wide[name] = tensor.cpu().double().requires_grad_(name != "cotangent")
        tensor.requires_grad_(name != "cotangent")
    got = results(bridge.deform_conv2d, CONFIG, arguments)
    assert got["output"].dtype == dtype
    for tensor in given(arguments):
        assert tensor.dtype in (dtype, torch.float32)
    # Rounded columns on a GPU, rounded results: half an eps each, of the largest element.
    tolerance = max(2 * EPS[str(dtype).split(".")[1]], 1e-5)
    assert_same(got, results(oracle, CONFIG, wide), tolerance)


# ---------------------------------------------------------------------------
# Memory


def variants(tensor):
    """The same values with other strides."""
    if tensor.dim() == 1:
        return [tensor, torch.stack([tensor, -tensor], dim=1)[:, 0]]
    wide = torch.cat([tensor, -tensor], dim=3)
    return [
        tensor,
        tensor.contiguous(memory_format=CHANNELS_LAST),
        wide[..., : tensor.shape[3]],
        tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.conj(torch.complex(tensor, -tensor)).imag,  # a view with the negative bit
        torch.cat([torch.zeros_like(tensor[:1]), tensor])[1:],  # an offset
    ]


@pytest.mark.parametrize("which", range(6))
def test_views(which):
    plain = tensors(CONFIG, 2)
    arguments = {
        name: variants(tensor)[min(which, len(variants(tensor)) - 1)].detach()
        for name, tensor in plain.items()
    }
    if which == 4:
        assert arguments["input"].is_neg()
    for name in arguments:
        assert torch.equal(arguments[name], plain[name])
        arguments[name].requires_grad_(name != "cotangent")
        plain[name].requires_grad_(name != "cotangent")
    want = results(bridge.deform_conv2d, CONFIG, plain)
    assert_same(results(bridge.deform_conv2d, CONFIG, arguments), want, 1e-12)


def test_conjugate_views():
    plain = tensors(CONFIG, 2)
    view = torch.conj(torch.complex(plain["input"], -plain["input"]))
    got = convolve(bridge.deform_conv2d, CONFIG, {**plain, "input": view.real})
    assert torch.equal(got, convolve(bridge.deform_conv2d, CONFIG, plain))
    with pytest.raises(RuntimeError, match="input must be float16"):
        convolve(bridge.deform_conv2d, CONFIG, {**plain, "input": view})


@pytest.mark.parametrize("size", [7, 150])  # copied by elements, and as matrices
@pytest.mark.parametrize("last", [False, True])
def test_the_memory_format_is_that_of_the_input(size, last):
    config = CONFIG.but(H=size, W=size + 2)
    arguments = tensors(config, 3)
    wanted = CHANNELS_LAST if last else torch.contiguous_format
    for name, tensor in arguments.items():
        if tensor.dim() == 4:
            arguments[name] = tensor.contiguous(memory_format=wanted)
        arguments[name].requires_grad_(name != "cotangent")
    for name, result in results(bridge.deform_conv2d, config, arguments).items():
        assert result.dim() == 1 or result.is_contiguous(memory_format=wanted), name


@pytest.mark.parametrize("dtype", [torch.float16, DTYPE, torch.float32])
@pytest.mark.parametrize("shape", [(3, 130, 77), (1, 1, 700), (2, 1030, 65), (1, 33, 32)])
def test_images_as_matrices(shape, dtype):
    images = torch.randn(shape, device=DEVICE).to(dtype)
    assert torch.equal(_layout._transposed(images), images.transpose(1, 2))


def test_channels_last_is_not_copied(monkeypatch):
    arguments = tensors(CONFIG, 3)
    arguments = {
        name: tensor.contiguous(memory_format=CHANNELS_LAST) if tensor.dim() == 4 else tensor
        for name, tensor in arguments.items()
    }
    pointers = []
    call = _bridge.call

    def recording(function, rows):
        assert all(tensor.is_contiguous() for tensor in rows)
        pointers.extend(tensor.data_ptr() for tensor in rows)
        return call(function, rows)

    monkeypatch.setattr(_bridge, "call", recording)
    convolve(bridge.deform_conv2d, CONFIG, arguments)
    assert pointers == [tensor.data_ptr() for tensor in given(arguments)]


def test_expanded_arguments_and_cotangents():
    arguments = tensors(CONFIG, 4)
    for name in ("input", "offset", "mask"):
        arguments[name] = arguments[name][:1].expand(CONFIG.N, -1, -1, -1)
    dense = {name: tensor.contiguous().requires_grad_() for name, tensor in arguments.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    convolve(bridge.deform_conv2d, CONFIG, leaves).sum().backward()  # strides 0 everywhere
    convolve(oracle, CONFIG, dense).sum().backward()
    for name, tensor in leaves.items():
        if name != "cotangent":
            assert relative_error(tensor.grad, dense[name].grad) <= TOLERANCE, name


def test_results_are_not_their_arguments():
    """A sum over one pixel is that pixel: MLX hands it on."""
    config = CONFIG.but(N=1, H=1, W=1, kH=1, kW=1, padding=(0, 0), has_mask=False)
    arguments = tensors(config, 5, requires_grad=True)
    for name, gradient in results(bridge.deform_conv2d, config, arguments).items():
        assert gradient.data_ptr() != arguments["cotangent"].data_ptr(), name
    want = results(oracle, config, arguments)
    assert_same(results(bridge.deform_conv2d, config, arguments), want, TOLERANCE)


def test_results_outlive_their_arguments():
    def make():
        arguments = tensors(CONFIG.but(H=40, W=50), 6)
        output = convolve(bridge.deform_conv2d, CONFIG, arguments)
        return output, output.clone()

    output, copy = make()
    for seed in range(20):  # freed memory would be taken again by these
        torch.randn(2, 12, 41, 50 + seed, device=DEVICE).sum().item()
        mx.eval(mx.random.normal((2, 41, 50, 10 + seed)))
    assert torch.equal(output, copy)
    output.add_(1)  # writable, and nobody else's
    assert torch.equal(output, copy + 1)


def test_arguments_are_not_written():
    arguments = tensors(CONFIG, 7, requires_grad=True)
    before = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    results(bridge.deform_conv2d, CONFIG, arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_gradients_of_single_arguments(name, monkeypatch):
    """Only that one is computed."""
    arguments = tensors(CONFIG, 8)
    arguments[name].requires_grad_()
    counts = []
    call = _bridge.call

    def counting(function, rows):
        out = call(function, rows)
        counts.append(len(out))
        return out

    monkeypatch.setattr(_bridge, "call", counting)
    convolve(bridge.deform_conv2d, CONFIG, arguments).backward(arguments["cotangent"])
    assert counts == [1, 1]
    full = results(oracle, CONFIG, tensors(CONFIG, 8, requires_grad=True))
    assert relative_error(arguments[name].grad, full[name]) <= TOLERANCE
    others = [t for n, t in arguments.items() if n != name]
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("has_mask", [False, True])
def test_empty_batches(has_mask):
    config = CONFIG.but(N=0, has_mask=has_mask)
    arguments = tensors(config, 9, requires_grad=True)
    got = results(bridge.deform_conv2d, config, arguments)
    assert got["output"].shape == (0, config.O, config.Ho, config.Wo)
    assert not got["weight"].any()
    assert got["weight"].shape == arguments["weight"].shape


# ---------------------------------------------------------------------------
# Errors

# What torchvision raises for each is a RuntimeError, or a ValueError where it unpacks.
WRONG = {
    "input-3d": (lambda a: a.update(input=a["input"][0]), "input must have 4 axes"),
    "offset-3d": (lambda a: a.update(offset=a["offset"][0]), "offset must have 4 axes"),
    "weight-3d": (lambda a: a.update(weight=a["weight"][0]), "weight must have 4 axes"),
    "offset-channels": (lambda a: a.update(offset=a["offset"][:, 1:]), "multiple of 2 . kH . kW"),
    "offset-none": (lambda a: a.update(offset=a["offset"][:, :0]), "multiple of 2 . kH . kW"),
    "offset-size": (lambda a: a.update(offset=a["offset"][..., 1:]), "offset must have shape"),
    "offset-batch": (lambda a: a.update(offset=a["offset"][:1]), "offset must have shape"),
    "offset-groups": (
        lambda a: a.update(offset=torch.cat([a["offset"], a["offset"][:, :24]], 1)),
        "divides C_in = 12",
    ),
    "mask-channels": (lambda a: a.update(mask=a["mask"][:, 1:]), "mask must have shape"),
    "mask-size": (lambda a: a.update(mask=a["mask"][..., 1:]), "mask must have shape"),
    "weight-channels": (lambda a: a.update(weight=a["weight"][:, 1:]), "weight must have shape"),
    "weight-outputs": (lambda a: a.update(weight=a["weight"][1:]), "weight must have shape"),
    "weight-none": (lambda a: a.update(weight=a["weight"][:, :0]), "weight must have no empty"),
    "input-none": (lambda a: a.update(input=a["input"][:, :0]), "input must have no empty"),
    "bias-size": (lambda a: a.update(bias=a["bias"][1:]), "bias must have shape"),
    "bias-2d": (lambda a: a.update(bias=a["bias"][None]), "bias must have shape"),
    "integers": (lambda a: a.update(input=a["input"].int()), "input must be float16"),
    "weight-type": (lambda a: a.update(weight=a["weight"].half()), "weight must have the type"),
    "offset-type": (lambda a: a.update(offset=a["offset"].half()), "offset must have the type"),
    "shape-before-types": (
        lambda a: a.update(weight=a["weight"].half(), offset=a["offset"][:, 2:]),
        "offset must have a multiple of",
    ),
    "devices": (lambda a: a.update(weight=a["weight"].to("meta")), "weight must be on the device"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors(name):
    arguments = tensors(CONFIG)
    change, message = WRONG[name]
    change(arguments)
    for error in (RuntimeError, ValueError):  # torchvision's, and this library's
        with pytest.raises(error, match=rf"\[deform_conv2d\] .*{message}.*; got "):
            convolve(bridge.deform_conv2d, CONFIG, arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", 0),
        ("stride", (1, -1)),
        ("padding", -1),
        ("dilation", 0),
        ("stride", 1.5),
        ("stride", "a"),
        ("padding", (1, 1, 1)),
        ("dilation", None),
    ],
)
def test_wrong_geometry(name, value):
    arguments = tensors(CONFIG)
    settings = {**CONFIG.settings, name: value}
    with pytest.raises(bridge.InvalidArgument, match=rf"\[deform_conv2d\] {name} must be"):
        bridge.deform_conv2d(
            *(arguments[n] for n in ("input", "offset", "weight", "bias")),
            mask=arguments["mask"],
            **settings,
        )


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_what_is_no_tensor(name):
    arguments = {**tensors(CONFIG), name: [1.0]}
    with pytest.raises(TypeError, match=rf"{name} must be a tensor.*got list"):
        convolve(bridge.deform_conv2d, CONFIG, arguments)


def test_a_kernel_larger_than_the_image():
    arguments = tensors(CONFIG)
    with pytest.raises(bridge.InvalidArgument, match="as long as the dilated kernel"):
        convolve(bridge.deform_conv2d, CONFIG.but(dilation=(9, 1)), arguments)


@pytest.mark.skipif(DEVICE != "mps", reason="needs a Mac: torch and MLX with a Metal device")
@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_mixed_devices(name):
    arguments = tensors(CONFIG)
    arguments[name] = arguments[name].cpu()
    with pytest.raises(RuntimeError, match="must be on the device of input"):
        convolve(bridge.deform_conv2d, CONFIG, arguments)
