"""jvp, gradients of gradients and vmap: against finite differences, loops and the oracle.

Everything is float64 on the CPU, with offsets away from cell borders, where the op is smooth.
The transforms are written with the op itself, so what holds here holds on a GPU too.
"""

import io
import itertools
import re

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform

SETTINGS = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
KERNEL = (3, 2)
ARGUMENTS = ("input", "offset", "weight", "bias", "mask")


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def make_arguments(seed, with_mask=True, with_bias=True):
    """N=2, H=7, W=6, C=6, O=4, G=2, DG=3: all pairwise distinct where they could be confused."""
    rng = np.random.default_rng(seed)
    kh, kw = KERNEL
    # Fractions in [0.2, 0.8]: a finite difference must not cross a cell border.
    offset = rng.integers(-3, 4, (2, 4, 8, 2 * 3 * kh * kw)) + rng.uniform(
        0.2, 0.8, (2, 4, 8, 2 * 3 * kh * kw)
    )
    arrays = {
        "input": rng.standard_normal((2, 7, 6, 6)),
        "offset": offset,
        "weight": rng.standard_normal((4, kh, kw, 3)),
    }
    if with_bias:
        arrays["bias"] = rng.standard_normal(4)
    if with_mask:
        arrays["mask"] = rng.uniform(0.1, 1.0, (2, 4, 8, 3 * kh * kw))
    return {name: mx.array(a, dtype=mx.float64) for name, a in arrays.items()}


def random_like(rng, array):
    return mx.array(rng.standard_normal(array.shape), dtype=array.dtype)


def conv(arguments):
    return mlx_deform.deform_conv2d(**arguments, **SETTINGS)


def im2col(arguments):
    arguments = {k: v for k, v in arguments.items() if k in ("input", "offset", "mask")}
    return mlx_deform.deform_im2col(**arguments, kernel_size=KERNEL, **SETTINGS)


OPS = {"conv": conv, "im2col": im2col}


def worst(got, wanted):
    got, wanted = np.array(got), np.array(wanted)
    assert got.shape == wanted.shape
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def close(got, wanted, tolerance):
    error = worst(got, wanted)
    assert error <= tolerance, f"{error} > {tolerance}"


def names_for(op, arguments):
    return [n for n in arguments if op == "conv" or n in ("input", "offset", "mask")]


def subsets(names):
    return [
        subset
        for size in range(1, len(names) + 1)
        for subset in itertools.combinations(names, size)
    ]


def as_function(op, arguments, varied):
    return lambda *values: OPS[op]({**arguments, **dict(zip(varied, values, strict=True))})


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_jvp_against_finite_differences(op, with_mask):
    arguments = make_arguments(1, with_mask)
    rng = np.random.default_rng(2)
    for varied in subsets(names_for(op, arguments)):
        function = as_function(op, arguments, varied)
        primals = [arguments[name] for name in varied]
        tangents = [random_like(rng, x) for x in primals]
        outputs, derivatives = mx.jvp(function, primals, tangents)
        step = 1e-6
        above = function(*[x + step * t for x, t in zip(primals, tangents, strict=True)])
        below = function(*[x - step * t for x, t in zip(primals, tangents, strict=True)])
        close(outputs[0], function(*primals), 0)
        # Central differences: step^2 from the cut series, eps / step from rounding.
        close(derivatives[0], (above - below) / (2 * step), 1e-8)


@pytest.mark.parametrize("op", OPS)
def test_jvp_is_the_transpose_of_vjp(op):
    arguments = make_arguments(3)
    rng = np.random.default_rng(4)
    varied = names_for(op, arguments)
    function = as_function(op, arguments, varied)
    primals = [arguments[name] for name in varied]
    tangents = [random_like(rng, x) for x in primals]
    outputs, derivatives = mx.jvp(function, primals, tangents)
    cotangent = random_like(rng, outputs[0])
    _, gradients = mx.vjp(function, primals, [cotangent])
    forward = mx.sum(derivatives[0] * cotangent).item()
    backward = sum(mx.sum(g * t).item() for g, t in zip(gradients, tangents, strict=True))
    assert abs(forward - backward) <= 1e-11 * abs(forward)


def test_jvp_at_integer_coordinates_is_the_right_hand_derivative():
    arguments = make_arguments(5)
    rng = np.random.default_rng(6)
    arguments["offset"] = mx.round(arguments["offset"])
    tangent = mx.abs(random_like(rng, arguments["offset"]))
    function = as_function("conv", arguments, ["offset"])
    _, derivatives = mx.jvp(function, [arguments["offset"]], [tangent])
    step = 1e-7
    above = function(arguments["offset"] + step * tangent)
    close(derivatives[0], (above - function(arguments["offset"])) / step, 1e-5)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_against_finite_differences(op, with_mask):
    """The gradient of a gradient penalty, in every argument and in the cotangent."""
    arguments = make_arguments(7, with_mask)
    rng = np.random.default_rng(8)
    varied = names_for(op, arguments)
    function = as_function(op, arguments, varied)
    primals = [arguments[name] for name in varied]
    cotangent = random_like(rng, function(*primals))
    directions = [random_like(rng, x) for x in primals]

    def penalty(*values):
        _, gradients = mx.vjp(function, list(values[:-1]), [values[-1]])
        # Unequal weights, so that no gradient can stand in for another.
        return sum(mx.sum(g * d) for g, d in zip(gradients, directions, strict=True))

    values = [*primals, cotangent]
    gradients = mx.grad(penalty, argnums=list(range(len(values))))(*values)
    step = 1e-5
    for i, gradient in enumerate(gradients):
        direction = random_like(rng, values[i])
        above, below = list(values), list(values)
        above[i] = values[i] + step * direction
        below[i] = values[i] - step * direction
        wanted = (penalty(*above) - penalty(*below)).item() / (2 * step)
        got = mx.sum(gradient * direction).item()
        scale = mx.sum(mx.abs(gradient * direction)).item()
        assert abs(got - wanted) <= 1e-7 * max(scale, 1.0), (i, got, wanted)


@pytest.mark.parametrize("op", OPS)
def test_forward_over_reverse(op):
    """jvp of a gradient equals the gradient of the matching directional derivative."""
    arguments = make_arguments(9)
    rng = np.random.default_rng(10)
    varied = [n for n in names_for(op, arguments) if n != "bias"]
    function = as_function(op, arguments, varied)
    primals = [arguments[name] for name in varied]
    cotangent = random_like(rng, function(*primals))
    tangents = [random_like(rng, x) for x in primals]

    def gradients_of(*values):
        return mx.vjp(function, list(values), [cotangent])[1]

    _, got = mx.jvp(gradients_of, primals, tangents)

    def along(*values):
        gradients = gradients_of(*values)
        return sum(mx.sum(g * t) for g, t in zip(gradients, tangents, strict=True))

    # The Hessian is symmetric.
    wanted = mx.grad(along, argnums=list(range(len(primals))))(*primals)
    for g, w in zip(got, wanted, strict=True):
        close(g, w, 1e-10)


def test_a_gradient_penalty_trains():
    arguments = make_arguments(11)
    target = random_like(np.random.default_rng(12), conv(arguments))

    def loss(weight):
        def fit(image):
            return mx.mean((conv({**arguments, "weight": weight, "input": image}) - target) ** 2)

        value, gradient = mx.value_and_grad(fit)(arguments["input"])
        return value + mx.sum(gradient**2)

    weight = arguments["weight"]
    losses = []
    for _ in range(20):
        value, gradient = mx.value_and_grad(loss)(weight)
        weight = weight - 0.3 * gradient
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(b < a for a, b in itertools.pairwise(losses))


def stacked(arguments, mapped, axes, size=3):
    """Copies with `size` different values along a new axis, for the mapped arguments."""
    rng = np.random.default_rng(13)
    out = dict(arguments)
    for name, axis in zip(mapped, axes, strict=True):
        values = [
            x + 0.1 * random_like(rng, x) if name != "offset" else x + 0.01 * random_like(rng, x)
            for x in [arguments[name]] * size
        ]
        out[name] = mx.stack(values, axis)
    return out


def axis_choices(arguments, mapped):
    """Two placements of the new axis: in front, and somewhere inside or at the end."""
    yield [0] * len(mapped)
    yield [(1 + i) % (arguments[name].ndim + 1) for i, name in enumerate(mapped)]


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_every_subset(op):
    arguments = make_arguments(14)
    names = names_for(op, arguments)
    for mapped in subsets(names):
        for axes in axis_choices(arguments, mapped):
            stacks = stacked(arguments, mapped, axes)
            in_axes = tuple(axes[mapped.index(n)] if n in mapped else None for n in names)
            function = as_function(op, arguments, names)
            got = mx.vmap(function, in_axes=in_axes, out_axes=1)(*[stacks[n] for n in names])
            wanted = mx.stack(
                [
                    function(
                        *[
                            mx.take(stacks[n], mx.array(i), axis=axis)
                            if axis is not None
                            else stacks[n]
                            for n, axis in zip(names, in_axes, strict=True)
                        ]
                    )
                    for i in range(3)
                ],
                axis=1,
            )
            close(got, wanted, 1e-13)


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_gradients(op):
    """Per-example gradients, with shared and with mapped arguments."""
    arguments = make_arguments(15)
    names = names_for(op, arguments)
    function = as_function(op, arguments, names)
    cotangent = random_like(np.random.default_rng(16), function(*[arguments[n] for n in names]))

    def gradients(*values):
        return mx.vjp(function, list(values), [cotangent])[1]

    for mapped in [
        ("input",),
        ("weight",) if op == "conv" else ("mask",),
        ("offset",),
        tuple(names),
    ]:
        stacks = stacked(arguments, mapped, [0] * len(mapped))
        in_axes = tuple(0 if n in mapped else None for n in names)
        got = mx.vmap(gradients, in_axes=in_axes)(*[stacks[n] for n in names])
        for i in range(3):
            wanted = gradients(*[stacks[n][i] if n in mapped else stacks[n] for n in names])
            for g, w in zip(got, wanted, strict=True):
                close(g[i], w, 1e-13)


@pytest.mark.parametrize("shapeless", [False, True])
def test_compile_of_a_training_step(shapeless):
    arguments = make_arguments(17)
    names = list(arguments)

    def step(*values):
        def loss(*inner):
            return mx.mean(conv(dict(zip(names, inner, strict=True))) ** 2)

        value, gradients = mx.value_and_grad(loss, argnums=list(range(len(names))))(*values)
        return [value, *[x - 0.1 * g for x, g in zip(values, gradients, strict=True)]]

    values = [arguments[n] for n in names]
    compiled = mx.compile(step, shapeless=shapeless)
    for got, wanted in zip(compiled(*values), step(*values), strict=True):
        close(got, wanted, 1e-13)


def test_shapeless_compile_follows_the_shapes():
    arguments = make_arguments(18)
    names = list(arguments)
    compiled = mx.compile(as_function("conv", arguments, names), shapeless=True)
    compiled(*[arguments[n] for n in names])
    first = {n: x[:1] if n in ("input", "offset", "mask") else x for n, x in arguments.items()}
    got = compiled(*[first[n] for n in names])
    assert got.shape[0] == 1
    close(got, conv(first), 0)


def test_checkpoint_gives_the_same_gradients():
    arguments = make_arguments(19)
    names = list(arguments)
    values = [arguments[n] for n in names]

    def block(*inner):
        return mx.tanh(conv(dict(zip(names, inner, strict=True))))

    argnums = list(range(len(names)))
    plain = mx.grad(lambda *v: mx.sum(block(*v) ** 2), argnums=argnums)(*values)
    saved = mx.grad(lambda *v: mx.sum(mx.checkpoint(block)(*v) ** 2), argnums=argnums)(*values)
    for got, wanted in zip(saved, plain, strict=True):
        close(got, wanted, 0)


@pytest.mark.parametrize("varied", [("input",), ("weight",), ("mask", "offset"), ARGUMENTS])
def test_only_the_wanted_gradients_are_computed(varied):
    """The VJP primitive in the graph has the outputs asked for and no others."""
    arguments = make_arguments(20)
    function = as_function("conv", arguments, varied)
    primals = [arguments[name] for name in varied]
    _, gradients = mx.vjp(function, primals, [mx.ones_like(function(*primals))])
    graph = io.StringIO()
    mx.export_to_dot(graph, *gradients)
    (node,) = re.findall(r"(\d+) \[label =\"DeformConv2dVJP\"", graph.getvalue())
    outputs = re.findall(rf"^{node} -> ", graph.getvalue(), re.MULTILINE)
    assert len(outputs) == len(set(varied) - {"bias"})  # bias needs a sum alone
