"""Transforms of multi_scale_deformable_attention: jvp, vmap, gradients of gradients, compile,
checkpoint, the portable form; and the same bits from any number of threads."""

import hashlib
import io
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform
from msda_cases import (
    ARGUMENTS,
    Config,
    call,
    check_against_oracle,
    mx_arguments,
    random_arrays,
    random_config,
    run_library,
)
from numerics import relative_error, rounded, to_mx, to_numpy

SMALL = Config(N=2, Q=5, M=2, D=3, shapes=((4, 5), (3, 2)), points=(2, 2))
SUBSETS = [s for size in (1, 2, 3) for s in itertools.combinations(range(3), size)]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def make_arguments(config=SMALL, seed=0):
    """float64, with locations away from the borders of cells, where the op is smooth."""
    arrays = random_arrays(config, seed)
    rng = np.random.default_rng(seed)
    sizes = np.repeat([shape[::-1] for shape in config.shapes], config.points, 0)
    shape = arrays["locations"].shape
    pixels = rng.integers(-2, sizes + 1, shape) + rng.uniform(0.2, 0.8, shape)
    arrays["locations"] = (pixels + 0.5) / sizes
    return mx_arguments(arrays, "float64"), to_mx(arrays["cotangent"], "float64")


def random_like(array, seed):
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal(array.shape), dtype=array.dtype)


def close(got, want, tolerance):
    got, want = np.array(got), np.array(want)
    assert relative_error(got, want) <= tolerance


def function_of(varied, arguments, config=SMALL):
    """The op as a function of some arguments."""

    def function(*values):
        everything = list(arguments)
        for index, value in zip(varied, values, strict=True):
            everything[index] = value
        return call(config, *everything)

    return function


@pytest.mark.parametrize("varied", SUBSETS)
def test_jvp_against_finite_differences(varied):
    arguments, _ = make_arguments()
    function = function_of(varied, arguments)
    primals = [arguments[i] for i in varied]
    tangents = [random_like(x, 20 + i) for i, x in enumerate(primals)]
    outputs, derivatives = mx.jvp(function, primals, tangents)
    step = 1e-6
    above = function(*[x + step * t for x, t in zip(primals, tangents, strict=True)])
    below = function(*[x - step * t for x, t in zip(primals, tangents, strict=True)])
    close(outputs[0], function(*primals), 0)
    close(derivatives[0], (above - below) / (2 * step), 1e-7)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_jvp_is_the_transpose_of_vjp(method):
    config = SMALL.but(method=method)
    arguments, cotangent = make_arguments(config)
    tangents = [random_like(x, 30 + i) for i, x in enumerate(arguments)]
    _, derivatives = mx.jvp(lambda *x: call(config, *x), arguments, tangents)
    _, gradients = mx.vjp(lambda *x: call(config, *x), arguments, [cotangent])
    backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    close((derivatives[0] * cotangent).sum(), backward, 1e-12)


def gradient_function(varied):
    def gradients(*values):
        *arguments, weight = values

        def loss(*some):
            return (function_of(varied, arguments)(*some) * weight).sum()

        return mx.vjp(loss, [arguments[i] for i in varied], [mx.array(1.0, mx.float64)])[1]

    return gradients


@pytest.mark.parametrize("varied", SUBSETS)
def test_gradients_of_gradients(varied):
    """The VJP and the JVP of the gradients, by all arguments and by the cotangent."""
    arguments, cotangent = make_arguments(seed=1)
    function = gradient_function(varied)
    primals = [*arguments, cotangent]
    tangents = [random_like(x, 40 + i) for i, x in enumerate(primals)]
    outputs = function(*primals)
    seeds = [random_like(x, 50 + i) for i, x in enumerate(outputs)]
    step = 1e-6
    above = function(*[x + step * t for x, t in zip(primals, tangents, strict=True)])
    below = function(*[x - step * t for x, t in zip(primals, tangents, strict=True)])
    differences = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
    _, derivatives = mx.jvp(function, primals, tangents)
    for derivative, difference in zip(derivatives, differences, strict=True):
        close(derivative, difference, 1e-7)
    _, second = mx.vjp(function, primals, seeds)
    forward = sum((d * s).sum() for d, s in zip(derivatives, seeds, strict=True))
    backward = sum((g * t).sum() for g, t in zip(second, tangents, strict=True))
    close(forward, backward, 1e-11)


def test_third_derivatives():
    arguments, _ = make_arguments(seed=2)

    def first(locations):
        return mx.grad(lambda x: (call(SMALL, arguments[0], x, arguments[2]) ** 3).sum())(locations)

    def second(locations):
        return mx.grad(lambda x: (first(x) ** 2).sum())(locations)

    direction = random_like(arguments[1], 3)
    step = 1e-6
    _, (got,) = mx.jvp(second, [arguments[1]], [direction])
    above, below = (second(arguments[1] + t * direction) for t in (step, -step))
    close(got, (above - below) / (2 * step), 1e-6)


def stacked(x, axis, count=3):
    return mx.stack([x + 0.1 * i for i in range(count)], axis=axis)


@pytest.mark.parametrize("varied", SUBSETS)
@pytest.mark.parametrize("axis", [0, 2, -1])
def test_vmap(varied, axis):
    arguments, _ = make_arguments(seed=3)
    mapped = [stacked(x, axis) if i in varied else x for i, x in enumerate(arguments)]
    axes = tuple(axis if i in varied else None for i in range(3))
    got = mx.vmap(lambda *x: call(SMALL, *x), in_axes=axes)(*mapped)
    for i in range(3):
        one = [mx.take(x, i, axis) if a is not None else x
               for x, a in zip(mapped, axes, strict=True)]  # fmt: skip
        close(got[i], call(SMALL, *one), 1e-14)


@pytest.mark.parametrize("varied", SUBSETS)
def test_vmap_of_gradients(varied):
    arguments, cotangent = make_arguments(seed=4)
    mapped = [stacked(x, 1) if i in varied else x for i, x in enumerate(arguments)]
    axes = tuple(1 if i in varied else None for i in range(3))

    def gradients(*values):
        return mx.grad(lambda *x: (call(SMALL, *x) * cotangent).sum(), (0, 1, 2))(*values)

    got = mx.vmap(gradients, in_axes=axes)(*mapped)
    for i in range(3):
        one = [x[:, i] if a is not None else x for x, a in zip(mapped, axes, strict=True)]
        for g, want in zip(got, gradients(*one), strict=True):
            close(g[i], want, 1e-13)


def test_vmap_over_the_cotangent():
    arguments, cotangent = make_arguments(seed=5)
    many = stacked(cotangent, 0)

    def gradients(cotangent):
        return mx.vjp(lambda *x: call(SMALL, *x), arguments, [cotangent])[1]

    got = mx.vmap(gradients)(many)
    for i in range(3):
        for g, want in zip(got, gradients(many[i]), strict=True):
            close(g[i], want, 1e-13)


def test_vmap_over_a_cotangent_of_one_argument():
    arguments, cotangent = make_arguments(seed=5)
    many = stacked(cotangent, 0)
    got = mx.vmap(
        lambda c: mx.vjp(lambda v: call(SMALL, v, *arguments[1:]), [arguments[0]], [c])[1][0]
    )(many)
    assert got.shape == (3, *arguments[0].shape)


def test_compile():
    arguments, cotangent = make_arguments(seed=6)

    def step(*values):
        return mx.value_and_grad(lambda *x: (call(SMALL, *x) * cotangent).sum(), (0, 1, 2))(*values)

    compiled = mx.compile(step)
    for seed in (6, 7):
        arguments, _ = make_arguments(seed=seed)
        value, gradients = step(*arguments)
        got_value, got = compiled(*arguments)
        close(got_value, value, 1e-14)
        for g, want in zip(got, gradients, strict=True):
            close(g, want, 0)


@pytest.mark.parametrize("ragged", [False, True])
def test_compile_shapeless(ragged):
    config = SMALL.but(ragged=ragged)
    compiled = mx.compile(lambda *x: mx.sin(call(config, *x)), shapeless=True)
    for changes in ({}, {"N": 3, "Q": 7}, {"Q": 1}):
        other = config.but(**changes)
        arguments, _ = make_arguments(other)
        points = config.points if ragged else None
        if not ragged:
            arguments = [arguments[0], *(mx.unflatten(x, 3, (2, 2)) for x in arguments[1:])]

        def op(*x, points=points):
            return mlx_deform.multi_scale_deformable_attention(x[0], SMALL.shapes, *x[1:],
                                                               points=points)  # fmt: skip

        compiled = compiled if changes else mx.compile(lambda *x: mx.sin(op(*x)), shapeless=True)
        got = compiled(*arguments)
        assert got.shape == other.output_shape
        close(got, mx.sin(op(*arguments)), 1e-14)


def test_compile_does_not_confuse_settings():
    """Calls of one trace that differ in their settings alone must not be merged into one."""
    variants = [
        SMALL,
        SMALL.but(method="discrete"),
        SMALL.but(shapes=((5, 4), (3, 2))),
        SMALL.but(shapes=((5, 4), (2, 3))),
        SMALL.but(points=(1, 3), ragged=True),
    ]
    arguments, _ = make_arguments()
    results = mx.compile(lambda *x: [call(config, *x) for config in variants])(*arguments)
    for config, got in zip(variants, results, strict=True):
        close(got, call(config, *arguments), 0)
    for a, b in itertools.combinations(results, 2):
        assert not mx.allclose(a, b)


def test_checkpoint():
    arguments, cotangent = make_arguments(seed=8)
    plain = mx.grad(lambda *x: (call(SMALL, *x) * cotangent).sum(), (0, 1, 2))(*arguments)
    kept = mx.checkpoint(lambda *x: call(SMALL, *x))
    got = mx.grad(lambda *x: (kept(*x) * cotangent).sum(), (0, 1, 2))(*arguments)
    for g, want in zip(got, plain, strict=True):
        close(g, want, 0)


# ---- portable


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("seed", range(600, 615))
def test_portable(seed, method):
    config = random_config(seed, method=method)
    with mlx_deform.portable():
        check_against_oracle(config, random_arrays(config, seed), "float64")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_portable_types(dtype):
    with mlx_deform.portable():
        check_against_oracle(SMALL, random_arrays(SMALL, 9), dtype)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_portable_locations_that_are_no_place(bad, method):
    config = SMALL.but(method=method)
    arrays = random_arrays(config, 10)
    arrays["locations"].reshape(-1)[::7] = bad
    with mlx_deform.portable():
        got = run_library(config, arrays, "float64")["output"]
    want = run_library(config, arrays, "float64")["output"]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_portable_has_no_primitive_of_ours():
    arguments, _ = make_arguments()

    def graph():
        text = io.StringIO()
        mx.export_to_dot(text, call(SMALL, *arguments))
        return text.getvalue()

    assert "MultiScaleDeformableAttention" in graph()
    with mlx_deform.portable():
        assert "MultiScaleDeformableAttention" not in graph()


# ---- threads and instruction sets

SCRIPT = textwrap.dedent(
    """
    import sys
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    from msda_cases import Config, random_arrays, run_library
    from test_multi_scale_deformable_attention_transforms import digest

    configs = [
        Config(Q=333, D=32, M=5, shapes=((17, 19), (8, 9))),
        Config(N=1, M=1, Q=1500, D=7, shapes=((40, 30),), points=(3,)),
        Config(N=1, Q=3, D=64, points=(70, 70)),
    ]
    for number, config in enumerate(configs):
        arrays = random_arrays(config, 0, grid=None)
        for dtype in ("float32", "float64", "float16"):
            for name, value in run_library(config, arrays, dtype).items():
                print(number, dtype, name, digest(value), abs(value).sum())
    """
)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def run_script(**environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        env={**os.environ, "MLX_DEFORM_TEST_DEVICE": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * 3 * 4
    return lines


def test_the_same_bits_for_any_number_of_threads():
    alone = run_script(MLX_DEFORM_NUM_THREADS="1")
    for threads in ("2", "5"):
        assert run_script(MLX_DEFORM_NUM_THREADS=threads) == alone


def test_the_baseline_instruction_set():
    best, baseline = (run_script(MLX_DEFORM_ISA=isa) for isa in ("", "baseline"))
    for a, b in zip(best, baseline, strict=True):
        *label, _, size = a.split()
        assert label == b.split()[:3]
        np.testing.assert_allclose(float(size), float(b.split()[-1]), rtol=1e-4)


def test_results_are_not_shared_with_arguments():
    arrays = rounded(random_arrays(SMALL, 11), "float32")
    arguments = mx_arguments(arrays, "float32")
    mx.eval(mx.vjp(lambda *x: call(SMALL, *x), arguments, [to_mx(arrays["cotangent"], "float32")]))
    for name, argument in zip(ARGUMENTS, arguments, strict=True):
        np.testing.assert_array_equal(to_numpy(argument), arrays[name])
