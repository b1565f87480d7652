"""patch_torchvision(): models written for torchvision, computed by MLX."""

# ruff: noqa: E402  (torch may not be installed)
import functools
import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

from torchvision.ops import deform_conv2d as imported_before

import mlx_deform.torch as bridge
from mlx_deform.torch import _bridge
from torch_cases import (
    CONFIG,
    DEVICE,
    DTYPE,
    assert_same,
    convolve,
    one_thread,  # noqa: F401
    relative_error,
    results,
    tensors,
)

TOLERANCE = 1e-9 if torch.float64 == DTYPE else 1e-4


@pytest.fixture
def calls(monkeypatch):
    """What went to MLX."""
    made = []
    call = _bridge.call

    def recording(function, rows):
        made.append(len(rows))
        return call(function, rows)

    monkeypatch.setattr(_bridge, "call", recording)
    return made


def ways():
    def closure(*arguments, **settings):
        return imported_before(*arguments, **settings)

    def default(*arguments, function=torchvision.ops.deform_conv2d, **settings):
        return function(*arguments, **settings)

    return {
        "attribute": lambda *a, **s: torchvision.ops.deform_conv2d(*a, **s),
        "imported before": imported_before,
        "closure": closure,
        "default argument": default,
        "partial": functools.partial(torchvision.ops.deform_conv2d),
    }


@pytest.mark.parametrize("way", ways())
def test_every_way_to_torchvision_is_patched(way, calls):
    function = ways()[way]
    arguments = tensors(CONFIG, requires_grad=True)
    want = results(bridge.deform_conv2d, CONFIG, arguments)
    before = len(calls)
    with bridge.patch_torchvision():
        got = results(function, CONFIG, arguments)
    assert len(calls) == before + 2  # forward and backward
    assert_same(got, want, 0)
    if DEVICE == "cpu":
        assert_same(results(function, CONFIG, arguments), want, TOLERANCE)
        assert len(calls) == before + 2  # torchvision's own again


def test_layers_scripts_and_inference(calls):
    layer = torchvision.ops.DeformConv2d(CONFIG.C, CONFIG.O, CONFIG.kernel, groups=CONFIG.G)
    layer = layer.to(DEVICE, DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(layer)
    config = CONFIG.but(stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    arguments = tensors(config)
    inputs = (arguments["input"], arguments["offset"], arguments["mask"])
    with bridge.patch_torchvision():
        got = layer(*inputs)
        assert torch.equal(scripted(*inputs), got)
        with torch.inference_mode():
            assert torch.equal(layer(*inputs), got)
            assert torch.equal(layer(*(tensor.clone() for tensor in inputs)), got)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), got)
    torch.compiler.reset()
    assert len(calls) == 5


@pytest.mark.parametrize("has_mask", [False, True])
def test_models_compiled_before(calls, has_mask):
    """Their graphs call torchvision's operators, also its backward, and know its strides."""
    config = CONFIG.but(has_mask=has_mask)
    torch.compiler.reset()

    def function(*arguments, **settings):
        return imported_before(*arguments, **settings)

    compiled = torch.compile(function, backend="aot_eager")
    arguments = tensors(config, device="cpu", dtype=torch.float64)
    if has_mask:
        last = torch.channels_last
        arguments["input"] = arguments["input"].contiguous(memory_format=last)
    for name, tensor in arguments.items():
        if tensor is not None:
            tensor.requires_grad_(name != "cotangent")
    want = results(compiled, config, arguments)
    assert not calls
    with bridge.patch_torchvision():
        assert_same(results(compiled, config, arguments), want, TOLERANCE)
    assert len(calls) == 2
    torch.compiler.reset()


def test_patches_nest_and_end_once(calls):
    arguments = tensors(CONFIG, device="cpu")
    first = bridge.patch_torchvision()
    with bridge.patch_torchvision() as second:
        convolve(imported_before, CONFIG, arguments)
    second.undo()
    convolve(imported_before, CONFIG, arguments)
    assert len(calls) == 2
    first.undo()
    first.undo()
    convolve(imported_before, CONFIG, arguments)
    assert len(calls) == 2
    with bridge.patch_torchvision():
        convolve(imported_before, CONFIG, arguments)
    assert len(calls) == 3


def test_a_plain_call_holds_without_being_kept(calls):
    import gc

    patch = bridge.patch_torchvision()
    undo = patch.undo
    del patch
    gc.collect()
    convolve(imported_before, CONFIG, tensors(CONFIG))
    undo()
    assert len(calls) == 1


def test_errors_end_the_patch_too():
    arguments = tensors(CONFIG, device="cpu")
    with pytest.raises(RuntimeError), bridge.patch_torchvision():
        convolve(imported_before, CONFIG, {**arguments, "mask": arguments["offset"]})
    arguments["bias"] = arguments["bias"][None]  # which torchvision takes, the bridge doesn't
    convolve(imported_before, CONFIG, arguments)


class Model(torch.nn.Module):
    """As BiRefNet's DeformableConv2d, with a head."""

    def __init__(self):
        super().__init__()
        self.offset = torch.nn.Conv2d(3, 18, 3, padding=1)
        self.modulator = torch.nn.Conv2d(3, 9, 3, padding=1)
        self.layer = torchvision.ops.DeformConv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        y = self.layer(x, 2 * self.offset(x), 2 * torch.sigmoid(self.modulator(x)))
        return self.head(torch.relu(y).mean((2, 3)))


def losses(steps=50):
    torch.manual_seed(0)
    model = Model().to(DEVICE, DTYPE)
    x = torch.randn(8, 3, 7, 8).to(DEVICE, DTYPE)
    y = torch.randint(4, (8,)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.skipif(DEVICE == "mps", reason="torchvision does not train on MPS")
def test_training_follows_the_curve_of_torchvision(calls):
    want = losses()
    assert not calls
    with bridge.patch_torchvision():
        got = losses()
    assert len(calls) == 100
    assert want[-1] < 0.5 * want[0]  # it learns
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1e-6


@pytest.mark.skipif(DEVICE != "mps", reason="needs a Mac: torch and MLX with a Metal device")
def test_training_on_mps():
    with bridge.patch_torchvision():
        curve = losses()
    assert curve[-1] < 0.5 * curve[0]


def test_without_torchvision(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.extension", None)
    with pytest.raises(RuntimeError, match="torchvision is not installed"):
        bridge.patch_torchvision()


def test_birefnet(calls):
    """BiRefNet's own architecture, with torchvision's operator in its decoder."""
    import birefnet_twin
    from test_birefnet_model import SMALL

    model = birefnet_twin.randomize(birefnet_twin.BiRefNet(SMALL)).to(DTYPE).eval()
    images = torch.randn(2, 3, 64, 96, dtype=DTYPE)
    with torch.no_grad():
        want = model(images)[0]  # the predictions; on the CPU, where torchvision has all it needs
        with bridge.patch_torchvision():
            got = model.to(DEVICE)(images.to(DEVICE))[0]
    assert len(calls) == 20  # five blocks of four branches
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= TOLERANCE
