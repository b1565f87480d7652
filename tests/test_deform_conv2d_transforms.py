"""mx.grad, mx.value_and_grad and mx.vjp by every subset of the arguments, and mx.compile."""

import itertools

import mlx.core as mx
import pytest

import mlx_deform
from cases import Config, random_arrays
from numerics import (
    ARGUMENTS,
    assert_close,
    device_for,
    forward_mx,
    mx_arguments,
    rounded,
    run_oracle,
    to_mx,
    to_numpy,
    tolerances,
    vjp_mx,
)

SUBSETS = [names for size in range(1, 6) for names in itertools.combinations(ARGUMENTS, size)]


@pytest.fixture(params=["float32", "float64"])
def problem(request):
    """config, arguments, loss of the arguments in order, oracle, tolerances, type."""
    dtype = request.param
    config = Config()
    arrays = rounded(random_arrays(config, 0), dtype)
    with mx.stream(device_for(dtype)):
        cotangent = to_mx(arrays["cotangent"], dtype)

        def loss(input, offset, weight, bias, mask):
            output = mlx_deform.deform_conv2d(
                input, offset, weight, bias, *config.settings.values(), mask
            )
            return (output * cotangent).sum()

        yield {
            "config": config,
            "arguments": mx_arguments(arrays, dtype),
            "cotangent": cotangent,
            "loss": loss,
            "want": run_oracle(config, arrays),
            "allowed": tolerances(config, arrays, dtype),
        }


def check_gradients(problem, names, gradients):
    assert len(names) == len(gradients)
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.dtype == problem["arguments"][name].dtype
        assert_close(to_numpy(gradient), problem["want"][name], problem["allowed"][name], name)


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_grad_by_a_subset(problem, names):
    argnums = [ARGUMENTS.index(name) for name in names]
    arguments = problem["arguments"]
    gradients = mx.grad(problem["loss"], argnums)(*[arguments[name] for name in ARGUMENTS])
    if len(names) == 1:  # MLX gives one gradient bare
        gradients = [gradients]
    check_gradients(problem, names, gradients)


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_vjp_by_a_subset(problem, names):
    arguments = problem["arguments"]

    def call(*values):
        return forward_mx(problem["config"], {**arguments, **dict(zip(names, values, strict=True))})

    outputs, gradients = mx.vjp(call, [arguments[name] for name in names], [problem["cotangent"]])
    want, allowed = problem["want"]["output"], problem["allowed"]["output"]
    assert_close(to_numpy(outputs[0]), want, allowed, "output")
    check_gradients(problem, names, gradients)


@pytest.mark.parametrize("absent", [("bias",), ("mask",), ("bias", "mask")])
def test_gradients_without_bias_or_mask(absent):
    config = Config(has_bias="bias" not in absent, has_mask="mask" not in absent)
    arrays = rounded(random_arrays(config, 0), "float32")
    want, allowed = run_oracle(config, arrays), tolerances(config, arrays, "float32")
    arguments = mx_arguments(arrays, "float32")
    assert set(arguments) == set(ARGUMENTS) - set(absent)
    cotangent = to_mx(arrays["cotangent"], "float32")
    for size in range(1, len(arguments) + 1):
        for names in itertools.combinations(arguments, size):

            def call(*values, names=names):
                return forward_mx(config, {**arguments, **dict(zip(names, values, strict=True))})

            _, gradients = mx.vjp(call, [arguments[n] for n in names], [cotangent])
            for name, gradient in zip(names, gradients, strict=True):
                assert_close(to_numpy(gradient), want[name], allowed[name], name)


def test_value_and_grad(problem):
    arguments = [problem["arguments"][name] for name in ARGUMENTS]
    value, gradients = mx.value_and_grad(problem["loss"], list(range(5)))(*arguments)
    assert mx.allclose(value, problem["loss"](*arguments))
    check_gradients(problem, ARGUMENTS, gradients)


def test_gradients_of_a_tree(problem):
    """As mlx.nn calls it: one dictionary of parameters."""
    arguments = problem["arguments"]
    parameters = {"layer": {n: arguments[n] for n in ("weight", "bias")}}

    def loss(parameters, input):
        return problem["loss"](
            input, arguments["offset"], **parameters["layer"], mask=arguments["mask"]
        )

    _, gradients = mx.value_and_grad(loss)(parameters, arguments["input"])
    check_gradients(problem, ("weight", "bias"), list(gradients["layer"].values()))


def test_compile_forward(problem):
    config, arguments = problem["config"], problem["arguments"]
    compiled = mx.compile(lambda arguments: forward_mx(config, arguments))
    for _ in range(2):  # traced, then replayed
        got = to_numpy(compiled(arguments))
        assert_close(got, problem["want"]["output"], problem["allowed"]["output"], "output")


def test_compile_forward_and_gradients(problem):
    arguments = [problem["arguments"][name] for name in ARGUMENTS]
    compiled = mx.compile(mx.value_and_grad(problem["loss"], list(range(5))))
    for _ in range(2):
        value, gradients = compiled(*arguments)
        assert mx.allclose(value, problem["loss"](*arguments))
        check_gradients(problem, ARGUMENTS, gradients)
    # New values through the same trace.
    config = problem["config"]
    dtype = str(arguments[0].dtype).removeprefix("mlx.core.")
    arrays = rounded(random_arrays(config, 77), dtype)
    other = mx_arguments(arrays, dtype)
    arrays["cotangent"] = to_numpy(problem["cotangent"])
    want, allowed = run_oracle(config, arrays), tolerances(config, arrays, dtype)
    _, gradients = compiled(*other.values())
    for name, gradient in zip(other, gradients, strict=True):
        assert_close(to_numpy(gradient), want[name], allowed[name], name)


def test_compile_does_not_confuse_two_settings():
    """Calls of one trace that differ in their settings alone must not be merged into one."""
    config = Config(stride=(1, 1), padding=(1, 1), kH=3, kW=3, dilation=(1, 1))
    twice = config.but(padding=(2, 2), dilation=(2, 2))
    assert config.shapes == twice.shapes
    arguments = mx_arguments(random_arrays(config, 0), "float32")

    @mx.compile
    def both(arguments):
        return forward_mx(config, arguments), forward_mx(twice, arguments)

    first, second = both(arguments)
    assert mx.array_equal(first, forward_mx(config, arguments))
    assert mx.array_equal(second, forward_mx(twice, arguments))
    assert not mx.allclose(first, second)


def test_two_calls_add_their_gradients():
    """One input under two convolutions, with surroundings that MLX differentiates itself."""
    config = Config()
    arrays = [rounded(random_arrays(config, seed), "float32") for seed in (0, 1)]
    arrays[1]["input"] = arrays[0]["input"]
    first, second = (mx_arguments(a, "float32") for a in arrays)
    cotangents = [to_mx(a["cotangent"], "float32") for a in arrays]

    def loss(input):
        total = 0
        for arguments, cotangent in zip((first, second), cotangents, strict=True):
            output = forward_mx(config, {**arguments, "input": 2 * input})
            total = total + (output * cotangent).sum()
        return total

    got = to_numpy(mx.grad(loss)(first["input"]))
    for a in arrays:
        a["input"] = 2 * a["input"]
    want = [2 * run_oracle(config, a)["input"] for a in arrays]
    allowed = [2 * tolerances(config, a, "float32")["input"] for a in arrays]
    assert_close(got, sum(want), 2 * sum(allowed), "input")


def test_outputs_are_not_shared_with_arguments():
    """Evaluating gradients leaves arguments and cotangents as they were."""
    config = Config()
    arrays = rounded(random_arrays(config, 0), "float32")
    arguments = mx_arguments(arrays, "float32")
    cotangent = to_mx(arrays["cotangent"], "float32")
    mx.eval(vjp_mx(config, arguments, cotangent))
    for name, argument in arguments.items():
        assert (to_numpy(argument) == arrays[name]).all(), name
    assert (to_numpy(cotangent) == arrays["cotangent"]).all()
