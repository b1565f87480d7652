"""What the tests of mlx_deform.torch share. Tensors are on MPS where MLX and torch both have it."""

# ruff: noqa: E402  (torch may not be installed)
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mlx_deform.torch as bridge
from cases import Config, random_arrays
from numerics import ARGUMENTS

DEVICE = "mps" if bridge.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "mps" else torch.float64  # MPS has no float64

CONFIG = Config(N=2, H=7, W=9, C=12, O=10, G=2, DG=3)  # no two sizes alike
SMALL = Config(
    N=2, H=4, W=5, C=4, O=6, kH=2, kW=1, stride=(1, 2), padding=(1, 0), dilation=(2, 1), G=2, DG=2
)


@pytest.fixture(autouse=True)
def one_thread():
    """The arrays are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def channels_first(array):
    array = np.asarray(array)
    return array if array.ndim == 1 else np.ascontiguousarray(np.moveaxis(array, -1, 1))


def tensors(config, seed=0, dtype=DTYPE, device=DEVICE, requires_grad=False, grid=2.0**-10):
    """Arguments by name (None for an absent one) and the cotangent, torch's layout."""
    arrays = random_arrays(config, seed, grid)
    made = {name: None for name in ARGUMENTS}
    for name in (*ARGUMENTS, "cotangent"):
        if arrays[name] is not None:
            tensor = torch.tensor(channels_first(arrays[name]), dtype=dtype, device=device)
            made[name] = tensor.requires_grad_(requires_grad and name != "cotangent")
    return made


def convolve(function, config, arguments):
    return function(
        *(arguments[name] for name in ("input", "offset", "weight", "bias")),
        mask=arguments["mask"],
        **config.settings,
    )


def given(arguments):
    return [arguments[name] for name in ARGUMENTS if arguments[name] is not None]


def as_function(config, function=bridge.deform_conv2d):
    """A function of the tensors in the order of ARGUMENTS, all of them given."""

    def convolution(*values):
        return convolve(function, config, dict(zip(ARGUMENTS, values, strict=True)))

    return convolution


def results(function, config, arguments):
    """Output and gradients by name; the arguments require them."""
    output = convolve(function, config, arguments)
    names = [name for name in ARGUMENTS if arguments[name] is not None]
    values = [arguments[name] for name in names]
    gradients = torch.autograd.grad(output, values, arguments["cotangent"])
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def relative_error(got, want):
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    scale = want.abs().max().item()
    return (got - want).abs().max().item() / (scale or 1.0)


def assert_same(got, want, tolerance):
    for name in want:
        error = relative_error(got[name], want[name])
        assert error <= tolerance, f"{name}: {error}"  # false for NaN
