"""Arrays that are not row-contiguous, and arrays of different types in one call."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform
from cases import Config, random_arrays
from numerics import (
    assert_all_close,
    check_against_oracle,
    forward_mx,
    im2col_tolerances,
    im2col_vjp_mx,
    mx_arguments,
    rounded,
    run_oracle,
    run_oracle_im2col,
    to_mx,
    to_numpy,
    tolerances,
    vjp_mx,
)

# Each takes a NumPy array and gives an MLX array of the same values in another layout.


def reversed_axes(array):
    return mx.array(array.T.copy()).transpose(*reversed(range(array.ndim)))


def channels_first(array):
    if array.ndim < 3:
        return reversed_axes(array)
    return mx.moveaxis(mx.array(np.moveaxis(array, -1, 1).copy()), 1, -1)


def cut_out(array):
    """The middle of a larger array whose border is NaN."""
    padded = mx.array(np.pad(array, 2, constant_values=np.nan))
    return padded[tuple(slice(2, 2 + size) for size in array.shape)]


def every_other(array):
    wide = np.full([2 * size for size in array.shape], np.nan, array.dtype)
    wide[(slice(None, None, 2),) * array.ndim] = array
    return mx.array(wide)[(slice(None, None, 2),) * array.ndim]


def backwards(array):
    flip = (slice(None, None, -1),) * array.ndim
    return mx.array(array[flip].copy())[flip]


def last_axis_backwards(array):
    return mx.array(array[..., ::-1].copy())[..., ::-1]


def with_offset(array):
    """Contiguous, but not at the start of its buffer."""
    return mx.array(np.concatenate([np.full(5, np.nan, array.dtype), array.ravel()]))[5:].reshape(
        array.shape
    )


LAYOUTS = [
    reversed_axes,
    channels_first,
    cut_out,
    every_other,
    backwards,
    last_axis_backwards,
    with_offset,
]


def run(config, arguments, cotangent):
    output, gradients = vjp_mx(config, arguments, cotangent)
    mx.eval(output, gradients)
    return {n: to_numpy(a) for n, a in {"output": output, **gradients}.items()}


def check(config, arrays, arguments, cotangent):
    got = run(config, arguments, cotangent)
    assert_all_close(got, run_oracle(config, arrays), tolerances(config, arrays, "float32"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["input", "offset", "weight", "bias", "mask", "cotangent", "everything"]
)
def test_layouts(layout, name):
    config = Config()
    arrays = rounded(random_arrays(config, 0), "float32")
    values = {n: a.astype(np.float32) for n, a in arrays.items()}
    arguments = {
        n: layout(values[n]) if name in (n, "everything") else mx.array(values[n])
        for n in ("input", "offset", "weight", "bias", "mask")
    }
    for n, argument in arguments.items():
        np.testing.assert_array_equal(np.array(argument), values[n])  # the layout is right
    cotangent = values["cotangent"]
    cotangent = layout(cotangent) if name in ("cotangent", "everything") else mx.array(cotangent)
    check(config, arrays, arguments, cotangent)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_im2col_layouts(layout):
    config = Config()
    arrays = rounded(random_arrays(config, 0), "float32")
    values = {n: a.astype(np.float32) for n, a in arrays.items()}
    arguments = {n: layout(values[n]) for n in ("input", "offset", "mask")}
    columns, gradients = im2col_vjp_mx(config, arguments, layout(values["column_cotangent"]))
    got = {n: to_numpy(a) for n, a in {"columns": columns, **gradients}.items()}
    want = run_oracle_im2col(config, arrays)
    assert_all_close(got, want, im2col_tolerances(config, arrays, "float32"))


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_broadcast_arrays(name):
    """Strides of 0 on every axis but one, and on all of them."""
    config = Config()
    shape = config.shapes[name]
    for kept in (None, *range(len(shape))):
        arrays = rounded(random_arrays(config, 1), "float32")
        small = np.ones(len(shape), int)
        if kept is not None:
            small[kept] = shape[kept]
        few = np.random.default_rng(5).standard_normal(small).astype(np.float32)
        arrays[name] = np.broadcast_to(few, shape).astype(np.float64)
        arguments = mx_arguments(arrays, "float32")
        arguments[name] = mx.broadcast_to(mx.array(few), shape)
        check(config, arrays, arguments, to_mx(arrays["cotangent"], "float32"))


def test_broadcast_cotangent():
    """As the gradient of a sum has it."""
    config = Config()
    arrays = rounded(random_arrays(config, 1), "float32")
    arrays["cotangent"] = np.full(config.output_shape, 0.75)
    cotangent = mx.broadcast_to(mx.array(0.75), config.output_shape)
    check(config, arrays, mx_arguments(arrays, "float32"), cotangent)


def test_one_array_in_several_places():
    """Offset and mask cut from one prediction, as DCNv2 layers do it."""
    config = Config(has_bias=False)
    arrays = rounded(random_arrays(config, 2), "float32")
    split = arrays["offset"].shape[-1]
    joined = mx.concatenate([to_mx(arrays[n], "float32") for n in ("offset", "mask")], axis=-1)
    input, weight = to_mx(arrays["input"], "float32"), to_mx(arrays["weight"], "float32")
    cotangent = to_mx(arrays["cotangent"], "float32")

    def loss(joined):
        offset, mask = joined[..., :split], joined[..., split:]
        output = mlx_deform.deform_conv2d(input, offset, weight, mask=mask, **config.settings)
        return (output * cotangent).sum()

    got = to_numpy(mx.grad(loss)(joined))
    want, allowed = run_oracle(config, arrays), tolerances(config, arrays, "float32")
    assert_all_close(
        {"offset": got[..., :split], "mask": got[..., split:]},
        {n: want[n] for n in ("offset", "mask")},
        allowed,
    )


# ---------------------------------------------------------------------------
# Types

FLOATS = ("float16", "bfloat16", "float32")


@pytest.mark.parametrize(("input", "weight", "bias"), list(itertools.product(FLOATS, repeat=3)))
def test_input_weight_and_bias_promote_together(input, weight, bias):
    config = Config()
    arrays = random_arrays(config, 0)
    dtypes = {"input": input, "weight": weight, "bias": bias}
    arguments = mx_arguments(arrays, "float32", **dtypes)
    output = forward_mx(config, arguments)
    kinds = set(dtypes.values())
    assert output.dtype == (getattr(mx, input) if len(kinds) == 1 else mx.float32)
    plain = mx.conv2d(arguments["input"], arguments["weight"], groups=config.G)
    assert output.dtype == (plain + arguments["bias"]).dtype
    cotangent = to_mx(arrays["cotangent"], "float32").astype(output.dtype)
    _, gradients = vjp_mx(config, arguments, cotangent)
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name


@pytest.mark.parametrize("offset", FLOATS)
@pytest.mark.parametrize("mask", FLOATS)
@pytest.mark.parametrize("input", FLOATS)
def test_offset_and_mask_leave_the_output_type_alone(input, offset, mask):
    config = Config()
    dtypes = {"offset": offset, "mask": mask}
    arrays = random_arrays(config, 0)
    arguments = mx_arguments(arrays, input, **dtypes)
    output, gradients = vjp_mx(config, arguments, to_mx(arrays["cotangent"], input))
    assert output.dtype == getattr(mx, input)
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
    check_against_oracle(config, arrays, input, **dtypes)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_one_half_among_float32(half, name):
    config = Config()
    check_against_oracle(config, random_arrays(config, 0), "float32", **{name: half})


def test_float64_beside_float32():
    config = Config()
    arrays = rounded(random_arrays(config, 0), "float32")
    with mx.stream(mx.cpu):
        arguments = mx_arguments(arrays, "float32", input="float64")
        output = forward_mx(config, arguments)
        assert output.dtype == mx.float64
        got = {"output": to_numpy(output)}
    # Whatever the type of the offsets, these are exact in float32 and in float64.
    want = {"output": run_oracle(config, arrays)["output"]}
    assert_all_close(got, want, tolerances(config, arrays, "float64"))
