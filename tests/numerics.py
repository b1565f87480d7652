"""Tolerances, comparisons that NaN cannot pass, and calls with NumPy arrays in and out.

A tolerance is k * eps * magnitude: k roundings in the longest chain of a sum, eps of the
type that computes it, and the sum of the magnitudes of the terms, which the oracle gives
for every element. Half types are computed in float32 and rounded where they are stored.
"""

import os

import mlx.core as mx
import numpy as np

import mlx_deform
import oracle

ARGUMENTS = ("input", "offset", "weight", "bias", "mask")
DTYPES = ("float16", "bfloat16", "float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

# torchvision agrees with the library to these, relative to the largest magnitude.
TORCHVISION_TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


def test_device():
    """The GPU where MLX has one, else the CPU; MLX_DEFORM_TEST_DEVICE=cpu or gpu decides."""
    gpu = mx.is_available(mx.gpu)
    wanted = os.environ.get("MLX_DEFORM_TEST_DEVICE", "gpu" if gpu else "cpu")
    if wanted not in ("cpu", "gpu"):
        raise ValueError(f"MLX_DEFORM_TEST_DEVICE must be cpu or gpu; got {wanted}")
    return mx.gpu if wanted == "gpu" else mx.cpu


test_device.__test__ = False  # not a test, whatever its name


def on_cuda():
    """Whether the tests run on an NVIDIA GPU."""
    return test_device() == mx.gpu and not mx.metal.is_available()


def rounds_columns():
    """Whether columns are stored in half types: on a GPU, and on its stand-in."""
    return test_device() == mx.gpu or os.environ.get("MLX_DEFORM_STAND_IN", "0") != "0"


def device_for(*dtypes):
    """float64 exists on the CPU alone."""
    return mx.cpu if "float64" in dtypes else test_device()


# ---------------------------------------------------------------------------
# Arrays


def to_mx(array, dtype):
    """A NumPy array as an MLX array of the named type."""
    if array is None:
        return None
    if dtype == "bfloat16":
        return mx.array(np.asarray(array, np.float32)).astype(mx.bfloat16)
    # Without a dtype MLX would make float32 of float64.
    return mx.array(np.asarray(array, getattr(np, dtype)), dtype=getattr(mx, dtype))


def to_numpy(array):
    """An MLX array as float64 NumPy."""
    if array is None:
        return None
    if array.dtype == mx.bfloat16:  # NumPy has no such type; float32 holds its values
        array = array.astype(mx.float32)
    return np.array(array).astype(np.float64)


def rounded(arrays, dtype, **dtypes):
    """Each array rounded to the values that `dtype` holds, or to that of `dtypes[name]`."""
    return {
        name: None if array is None else to_numpy(to_mx(array, dtypes.get(name, dtype)))
        for name, array in arrays.items()
    }


def mx_arguments(arrays, dtype, **dtypes):
    """The arguments of the op that are present, as MLX arrays by name."""
    return {
        name: to_mx(arrays[name], dtypes.get(name, dtype))
        for name in ARGUMENTS
        if arrays.get(name) is not None
    }


# ---------------------------------------------------------------------------
# The library


def forward_mx(config, arguments):
    return mlx_deform.deform_conv2d(**arguments, **config.settings)


def vjp_mx(config, arguments, cotangent):
    """The output, and the gradients by argument name."""
    names = list(arguments)

    def call(*values):
        return forward_mx(config, dict(zip(names, values, strict=True)))

    outputs, gradients = mx.vjp(call, [arguments[name] for name in names], [cotangent])
    return outputs[0], dict(zip(names, gradients, strict=True))


def im2col_arguments(arguments):
    return {name: arguments[name] for name in ("input", "offset", "mask") if name in arguments}


def im2col_mx(config, arguments):
    arguments = im2col_arguments(arguments)
    return mlx_deform.deform_im2col(**arguments, kernel_size=config.kernel, **config.settings)


def im2col_vjp_mx(config, arguments, cotangent):
    arguments = im2col_arguments(arguments)
    names = list(arguments)

    def call(*values):
        return im2col_mx(config, dict(zip(names, values, strict=True)))

    outputs, gradients = mx.vjp(call, list(arguments.values()), [cotangent])
    return outputs[0], dict(zip(names, gradients, strict=True))


def run_library(config, arrays, dtype, **dtypes):
    """Output and every gradient of the library, as float64 NumPy by name ("output", ...)."""
    with mx.stream(device_for(dtype, *dtypes.values())):
        arguments = mx_arguments(arrays, dtype, **dtypes)
        cotangent = to_mx(arrays["cotangent"], dtype)
        output, gradients = vjp_mx(config, arguments, cotangent)
        mx.eval(output, gradients)
        results = {"output": output, **gradients}
        return {name: to_numpy(result) for name, result in results.items()}


def run_library_im2col(config, arrays, dtype, **dtypes):
    with mx.stream(device_for(dtype, *dtypes.values())):
        arguments = mx_arguments(arrays, dtype, **dtypes)
        cotangent = to_mx(arrays["column_cotangent"], dtype)
        columns, gradients = im2col_vjp_mx(config, arguments, cotangent)
        mx.eval(columns, gradients)
        results = {"columns": columns, **gradients}
        return {name: to_numpy(result) for name, result in results.items()}


# ---------------------------------------------------------------------------
# The oracle, on the same dictionaries


def run_oracle_forward(config, arrays, **options):
    arguments = {name: arrays[name] for name in ARGUMENTS}
    return {"output": oracle.deform_conv2d(**arguments, **config.settings, **options)}


def run_oracle(config, arrays, **options):
    arguments = {name: arrays[name] for name in ARGUMENTS}
    output, gradients = oracle.deform_conv2d_vjp(
        arrays["cotangent"], **arguments, **config.settings, **options
    )
    results = {"output": output, **gradients._asdict()}
    return {name: result for name, result in results.items() if result is not None}


def run_oracle_im2col(config, arrays, **options):
    arguments = {name: arrays[name] for name in ("input", "offset", "mask")}
    settings = {"kernel_size": config.kernel, **config.settings, **options}
    columns, gradients = oracle.deform_im2col_vjp(
        arrays["column_cotangent"], **arguments, **settings
    )
    results = {"columns": columns, **gradients._asdict()}
    return {name: result for name, result in results.items() if result is not None}


# ---------------------------------------------------------------------------
# torchvision, on the same dictionaries


def _channels_first(array):
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def _channels_last(array):
    return np.moveaxis(array, 1, -1)


def run_torchvision(config, arrays, dtype):
    """torchvision's output and gradients in the library's layouts. No NaN offset: it crashes."""
    import torch
    import torchvision

    torch.set_num_threads(1)  # the arrays are too small to share
    assert np.isfinite(arrays["offset"]).all()
    tensors = {
        name: torch.tensor(
            arrays[name] if name == "bias" else _channels_first(arrays[name]),
            dtype=getattr(torch, dtype),
            requires_grad=True,
        )
        for name in ARGUMENTS
        if arrays[name] is not None
    }
    output = torchvision.ops.deform_conv2d(**tensors, **config.settings)
    cotangent = torch.tensor(_channels_first(arrays["cotangent"]), dtype=output.dtype)
    output.backward(cotangent)
    results = {"output": _channels_last(output.detach().numpy())}
    for name, tensor in tensors.items():
        gradient = tensor.grad.numpy()
        results[name] = gradient if name == "bias" else _channels_last(gradient)
    return {name: result.astype(np.float64) for name, result in results.items()}


# ---------------------------------------------------------------------------
# Tolerances and comparisons


def _roundings(config, name):
    """Roundings in the longest chain of operations that makes an element of `name`."""
    taps, pixels = config.kH * config.kW, config.N * config.Ho * config.Wo
    sample = 8  # coordinate, weights, the sum over four corners, mask
    chain = {
        "output": taps * config.C // config.G + 1,
        # Every tap of every output pixel of an image may sample the same input pixel.
        "input": config.O // config.G + config.Ho * config.Wo * taps,
        "offset": config.O // config.G + config.C // config.DG,
        "mask": config.O // config.G + config.C // config.DG,
        "weight": pixels,
        "bias": pixels,
        "columns": 1,
    }
    return chain[name] + sample


def _elementwise(config, arrays, dtype, run):
    arrays = {n: None if a is None else np.asarray(a, np.float64) for n, a in arrays.items()}
    magnitudes = run(config, arrays, absolute=True, coordinate_dtype=coordinate_dtype(dtype))
    computed = "float32" if dtype in HALF_DTYPES else dtype
    smallest = float(np.finfo(computed).tiny)  # below it products may vanish
    tolerances = {}
    for name, magnitude in magnitudes.items():
        tolerances[name] = _roundings(config, name) * EPS[computed] * magnitude + smallest
        if dtype in HALF_DTYPES:
            # One rounding of the result and one of stored columns, half an eps each; the
            # subnormal halves below 2**-14 are 2**-24 apart.
            tolerances[name] = tolerances[name] + EPS[dtype] * magnitude + 2.0**-24
    return tolerances


def tolerances(config, arrays, dtype):
    """The largest error that each element of the output and of the gradients may have."""
    return _elementwise(config, arrays, dtype, run_oracle)


def output_tolerance(config, arrays, dtype):
    return _elementwise(config, arrays, dtype, run_oracle_forward)["output"]


def im2col_tolerances(config, arrays, dtype):
    return _elementwise(config, arrays, dtype, run_oracle_im2col)


def coordinate_dtype(dtype):
    """The type in which the library computes coordinates."""
    return np.float64 if dtype == "float64" else np.float32


def assert_close(got, want, tolerance, name):
    """Every |got - want| <= tolerance; NaN and infinities must stand where `want` has them."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape} instead of {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isnan(got[~finite]), np.isnan(want[~finite]), f"{name}: NaN")
    np.testing.assert_array_equal(got[~finite], want[~finite], f"{name}: infinities")
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)[finite]
    allowed = np.broadcast_to(tolerance, want.shape)[finite]
    wrong = ~(error <= allowed)  # also where the error is NaN
    if wrong.any():
        at = tuple(axis[wrong][0] for axis in np.nonzero(finite))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements beyond tolerance, first at "
            f"{tuple(map(int, at))}: {got[at]!r} instead of {want[at]!r}, "
            f"allowed {np.broadcast_to(tolerance, want.shape)[at]:.3g}"
        )


def assert_all_close(got, want, tolerances):
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], tolerances[name], name)


def relative_error(got, want):
    """max |got - want| / max |want|; 0 where both are empty or zero, NaN where one is NaN."""
    assert got.shape == want.shape
    if want.size == 0:
        return 0.0
    error, scale = np.abs(got - want).max(), np.abs(want).max()
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return error / scale


def rms(array):
    return float(np.sqrt(np.mean(np.square(array))))


def check_against_oracle(config, arrays, dtype, **dtypes):
    """Output and every gradient of the library within tolerance of the oracle.

    `dtypes` are those of single arguments, where they differ. Gradients and output are
    then judged by the coarsest type among them.
    """
    arrays = rounded(arrays, dtype, **dtypes)
    coarsest = max((dtype, *dtypes.values()), key=EPS.get)
    want = run_oracle(config, arrays, coordinate_dtype=coordinate_dtype(dtype))
    got = run_library(config, arrays, dtype, **dtypes)
    assert_all_close(got, want, tolerances(config, arrays, coarsest))


def check_im2col_against_oracle(config, arrays, dtype, **dtypes):
    arrays = rounded(arrays, dtype, **dtypes)
    coarsest = max((dtype, *dtypes.values()), key=EPS.get)
    want = run_oracle_im2col(config, arrays, coordinate_dtype=coordinate_dtype(dtype))
    got = run_library_im2col(config, arrays, dtype, **dtypes)
    assert_all_close(got, want, im2col_tolerances(config, arrays, coarsest))
