"""What is called: how a proper call is drawn, made, and judged."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import cases
import mlx_deform
import msda_cases
import numerics
from numerics import ARGUMENTS, EPS, assert_close, coordinate_dtype, rounded, to_numpy

from .malform import FLOATS, Arguments, Array

Results = dict[str, np.ndarray]  # float64 by name: "output" and gradients of arguments


class Target(NamedTuple):
    name: str
    draw: Callable[[np.random.Generator], Arguments]
    call: Callable[[Arguments, bool, np.random.Generator], Results]
    check: Callable[[Arguments, Results], None]


def to_mx(value: Any) -> Any:
    """An Array as an MLX array; other values as they are."""
    if not isinstance(value, Array):
        return value
    values = value.values
    if value.strided and values.ndim:
        values = np.stack([values, -values], axis=-1).reshape(*values.shape[:-1], -1)
    if value.dtype in FLOATS:
        array = numerics.to_mx(values, value.dtype)
    else:
        array = mx.array(np.nan_to_num(values, posinf=1, neginf=0).clip(0, 100))
        array = array.astype(getattr(mx, value.dtype))
    return array[..., ::2] if value.strided and values.ndim else array


def evaluated(function: Callable, arguments: Arguments, with_gradients: bool, rng) -> Results:
    """The output, and gradients for a random cotangent, by MLX."""
    double = any(isinstance(a, Array) and a.dtype == "float64" for a in arguments.values())
    with mx.stream(mx.cpu if double else numerics.test_device()):
        values = {name: to_mx(value) for name, value in arguments.items()}
        arrays = {name: value for name, value in values.items() if isinstance(value, mx.array)}
        settings = {name: value for name, value in values.items() if name not in arrays}
        output = function(**arrays, **settings)
        mx.eval(output)
        results = {"output": to_numpy(output)}
        if with_gradients:
            cotangent = rng.standard_normal(output.shape)
            cotangent = numerics.to_mx(cotangent, str(output.dtype).split(".")[-1])
            results["cotangent"] = to_numpy(cotangent)
            gradients = mx.vjp(
                lambda *primals: function(**dict(zip(arrays, primals, strict=True)), **settings),
                list(arrays.values()),
                [cotangent],
            )[1]
            mx.eval(gradients)
            results |= {n: to_numpy(g) for n, g in zip(arrays, gradients, strict=True)}
    return results


def float_arrays(arguments: Arguments, names) -> dict[str, Array | None]:
    """The array arguments of an accepted call: nothing but arrays of floats, or absent."""
    arrays = {name: arguments[name] for name in names}
    for name, array in arrays.items():
        if array is not None and not (isinstance(array, Array) and array.dtype in FLOATS):
            raise AssertionError(f"{name} must have been refused: {array}")
    return arrays


def types_of(arrays: dict[str, Array | None]) -> dict[str, str]:
    return {name: array.dtype for name, array in arrays.items() if array is not None}


def defined(arrays: dict[str, np.ndarray | None], names: Iterable[str]) -> bool:
    """Whether these hold numbers alone. Infinity times a sample beyond the image has no rule: the
    library leaves such samples out."""
    return all(arrays[name] is None or np.isfinite(arrays[name]).all() for name in names)


def within(got: Results, want: Results, allowed: Results) -> None:
    for name in got:
        if name != "cotangent":
            assert_close(got[name], want[name], allowed[name], name)


# ---------------------------------------------------------------------------
# Deformable convolution


def pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)  # True is an int, and passes for 1


def draw_convolution(rng: np.random.Generator) -> Arguments:
    config = cases.random_config(int(rng.integers(2**31)), N=int(rng.choice([0, 1, 2, 3])))
    arrays = cases.random_arrays(config, int(rng.integers(2**31)))
    dtype = str(rng.choice(FLOATS, p=[0.6, 0.1, 0.1, 0.2]))
    arguments: Arguments = {
        name: None
        if arrays[name] is None
        else Array(arrays[name], dtype, coordinates=name == "offset")
        for name in ARGUMENTS
    }
    return {**arguments, **config.settings}


def config_of(arrays: dict[str, np.ndarray | None], settings: Arguments) -> cases.Config:
    """The configuration of a call that was accepted."""
    N, H, W, C = arrays["input"].shape
    O, kH, kW, per_group = arrays["weight"].shape  # noqa: E741
    return cases.Config(
        N=N,
        H=H,
        W=W,
        C=C,
        O=O,
        kH=kH,
        kW=kW,
        G=C // per_group,
        DG=arrays["offset"].shape[-1] // (2 * kH * kW),
        has_mask=arrays["mask"] is not None,
        has_bias=arrays["bias"] is not None,
        **{name: pair(settings[name]) for name in ("stride", "padding", "dilation")},
    )


def check_convolution(arguments: Arguments, got: Results) -> None:
    with_gradients = "cotangent" in got
    given = float_arrays(arguments, ARGUMENTS)
    types = types_of(given)
    dtype, coarsest = types["input"], max(types.values(), key=EPS.get)
    arrays = {name: None if a is None else a.values for name, a in given.items()}
    arrays = rounded(arrays, dtype, **types)
    arrays["cotangent"] = got.get("cotangent")
    if not defined(arrays, ("weight", "bias", "mask")):
        return
    config = config_of(arrays, arguments)
    run = numerics.run_oracle if with_gradients else numerics.run_oracle_forward
    computed = "float64" if "float64" in types.values() else "float32"
    with np.errstate(all="ignore"):
        allowed = numerics._elementwise(config, arrays, coarsest, run)
        want = run(config, arrays, coordinate_dtype=coordinate_dtype(computed))
    within(got, want, allowed)
    # torchvision reads out of bounds at NaN, and has no rule for what overflows.
    ordinary = all(
        a is None or (np.isfinite(a).all() and abs(a).max(initial=0) < 1e6) for a in arrays.values()
    )
    if ordinary and got["output"].size and with_gradients:
        within(got, numerics.run_torchvision(config, arrays, "float64"), allowed)


def call_convolution(arguments: Arguments, with_gradients: bool, rng) -> Results:
    return evaluated(mlx_deform.deform_conv2d, arguments, with_gradients, rng)


# ---------------------------------------------------------------------------
# Its columns


def draw_im2col(rng: np.random.Generator) -> Arguments:
    arguments = draw_convolution(rng)
    weight, _ = arguments.pop("weight"), arguments.pop("bias")
    return {**arguments, "kernel_size": weight.values.shape[1:3]}


def call_im2col(arguments: Arguments, with_gradients: bool, rng) -> Results:
    return evaluated(mlx_deform.deform_im2col, arguments, with_gradients, rng)


def check_im2col(arguments: Arguments, got: Results) -> None:
    """As a convolution whose weight is the identity; gradients by the oracle's own."""
    given = float_arrays(arguments, ("input", "offset", "mask"))
    types = types_of(given)
    arrays = {name: None if a is None else a.values for name, a in given.items()}
    arrays = rounded(arrays, types["input"], **types)
    if not defined(arrays, ("mask",)):
        return
    kH, kW = pair(arguments["kernel_size"])
    channels = arrays["input"].shape[-1]
    arrays |= {"weight": np.empty((1, kH, kW, channels)), "bias": None}
    config = config_of(arrays, arguments)
    arrays["column_cotangent"] = got.get("cotangent", np.zeros(config.columns_shape))
    coarsest = max(types.values(), key=EPS.get)
    computed = "float64" if "float64" in types.values() else "float32"
    with np.errstate(all="ignore"):
        allowed = numerics.im2col_tolerances(config, arrays, coarsest)
        want = numerics.run_oracle_im2col(
            config, arrays, coordinate_dtype=coordinate_dtype(computed)
        )
    within({"columns": got.pop("output"), **got}, want, allowed)


# ---------------------------------------------------------------------------
# Multi-scale deformable attention

ATTENTION = {"value": "value", "sampling_locations": "locations", "attention_weights": "weights"}


def draw_attention(rng: np.random.Generator) -> Arguments:
    config = msda_cases.random_config(
        int(rng.integers(2**31)), method=str(rng.choice(["bilinear", "bilinear", "discrete"]))
    )
    arrays = msda_cases.random_arrays(config, int(rng.integers(2**31)))
    if not config.ragged:
        levels = (len(config.shapes), config.points[0])
        for name, axes in (("locations", 2), ("weights", 1)):
            array = arrays[name]
            arrays[name] = array.reshape(*array.shape[:3], *levels, *([2] if axes == 2 else []))
    dtype = str(rng.choice(FLOATS, p=[0.6, 0.1, 0.1, 0.2]))
    return {
        **{
            name: Array(arrays[key], dtype, coordinates=key == "locations")
            for name, key in ATTENTION.items()
        },
        "spatial_shapes": list(config.shapes),
        "points": list(config.points) if config.ragged else None,
        "method": config.method,
    }


def call_attention(arguments: Arguments, with_gradients: bool, rng) -> Results:
    def function(spatial_shapes, points, method, value, sampling_locations, attention_weights):
        return mlx_deform.multi_scale_deformable_attention(
            value,
            spatial_shapes,
            sampling_locations,
            attention_weights,
            points=points,
            method=method,
        )

    return evaluated(function, arguments, with_gradients, rng)


def check_attention(arguments: Arguments, got: Results) -> None:
    given = float_arrays(arguments, ATTENTION)
    types = {ATTENTION[name]: dtype for name, dtype in types_of(given).items()}
    arrays = {ATTENTION[name]: array.values for name, array in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    N, _, M, D = arrays["value"].shape
    points = arguments["points"]
    levels = [tuple(shape) for shape in arguments["spatial_shapes"]]
    if points is None:
        points = [shapes["weights"][-1]] * len(levels)
        flat = (*shapes["weights"][:3], sum(points))
        arrays["locations"] = arrays["locations"].reshape(*flat, 2)
        arrays["weights"] = arrays["weights"].reshape(flat)
    config = msda_cases.Config(
        N=N,
        shapes=tuple(levels),
        Q=shapes["weights"][1],
        M=M,
        D=D,
        points=tuple(points),
        method=arguments["method"],
    )
    arrays = rounded(arrays, types["value"], **types)
    if not defined(arrays, ("weights",)):
        return
    arrays["cotangent"] = got.get("cotangent", np.zeros(config.output_shape))
    coarsest = max(types.values(), key=EPS.get)
    computed = "float64" if "float64" in types.values() else "float32"
    with np.errstate(all="ignore"):
        allowed = msda_cases.tolerances(config, arrays, coarsest)
        want = msda_cases.run_oracle(config, arrays, coordinate_dtype=coordinate_dtype(computed))
    renamed = {ATTENTION.get(name, name): result for name, result in got.items()}
    flat = {n: r.reshape(want[n].shape) for n, r in renamed.items() if n != "cotangent"}
    within(flat, want, allowed)


# ---------------------------------------------------------------------------
# The bridge


def to_torch(value: Any) -> Any:
    """An Array with channels last as a tensor with channels first."""
    import torch

    if not isinstance(value, Array):
        return value
    values = value.values
    values = np.moveaxis(values, -1, 1) if values.ndim == 4 else values
    tensor = torch.tensor(np.array(values, order="C"))
    if value.dtype == "bool_":
        return tensor > 0
    if value.dtype not in FLOATS:
        tensor = tensor.nan_to_num(posinf=1, neginf=0).clamp(0, 100)
    tensor = tensor.to(getattr(torch, value.dtype))
    if value.strided and tensor.dim():
        wide = torch.stack([tensor, tensor], dim=-1)
        return wide[..., 0]
    return tensor


def call_bridge(arguments: Arguments, with_gradients: bool, rng) -> Results:
    import torch

    from mlx_deform.torch import deform_conv2d

    values = {name: to_torch(value) for name, value in arguments.items()}
    tensors = {n: t for n, t in values.items() if isinstance(t, torch.Tensor)}
    differentiable = {n: t for n, t in tensors.items() if with_gradients and t.is_floating_point()}
    for tensor in differentiable.values():
        tensor.requires_grad_()
    output = deform_conv2d(**values)

    def to_array(tensor):
        array = tensor.detach().double().numpy()
        return np.moveaxis(array, 1, -1) if array.ndim == 4 else array

    results = {"output": to_array(output)}
    if with_gradients:
        cotangent = torch.tensor(rng.standard_normal(output.shape)).to(output.dtype)
        gradients = torch.autograd.grad(output, list(differentiable.values()), cotangent)
        results["cotangent"] = to_array(cotangent)
        results |= {n: to_array(g) for n, g in zip(differentiable, gradients, strict=True)}
    return results


TARGETS = {
    target.name: target
    for target in (
        Target("deform_conv2d", draw_convolution, call_convolution, check_convolution),
        Target("deform_im2col", draw_im2col, call_im2col, check_im2col),
        Target("multi_scale_deformable_attention", draw_attention, call_attention, check_attention),
        Target("bridge", draw_convolution, call_bridge, check_convolution),
    )
}
