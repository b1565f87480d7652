"""Every call that must be refused: ValueError, `[op] <rule>; got <value>`, before any work."""

import re
from dataclasses import dataclass, field

import mlx.core as mx
import pytest

import mlx_deform
from cases import Config, random_arrays
from numerics import ARGUMENTS, im2col_arguments, mx_arguments

CONFIG = Config(G=2, DG=3, C=12, O=10)
N, Ho, Wo = CONFIG.output_shape[:3]
TAPS = CONFIG.kH * CONFIG.kW
FORM = re.compile(r"\[(?P<op>\w+)\] (?P<rule>.+); got (?P<value>.+)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """Changes to a valid call, what the rule must name and what the value must show."""

    id: str
    names: str  # regular expression, searched in the rule
    shows: str  # plain text, looked for in the value; both are compared without spaces
    shapes: dict = field(default_factory=dict)  # new shapes of arguments
    dtypes: dict = field(default_factory=dict)  # new types of arguments
    settings: dict = field(default_factory=dict)  # new stride, padding, dilation, kernel_size


def rank_cases():
    for name in ARGUMENTS:
        shape = CONFIG.shapes[name]
        for wrong in (shape[:-1], (*shape, 1), ()):
            text = str(wrong).replace(",)", ")")
            yield Case(f"{name}-rank-{len(wrong)}", name, text, shapes={name: wrong})


def dtype_cases():
    for name in ARGUMENTS:
        for dtype in ("int32", "uint8", "bool_", "complex64"):
            yield Case(f"{name}-{dtype}", name, dtype.rstrip("_"), dtypes={name: dtype})


def setting_cases():
    for name, values in {
        "stride": [0, -1, (0, 1), (1, 0), (2, -3), (1, 2, 3), (1,), ()],
        "dilation": [0, -1, (0, 1), (1, 0), (2, -3), (1, 2, 3), (1,), ()],
        "padding": [-1, (-1, 0), (0, -2), (1, 2, 3), (1,), ()],
    }.items():
        for value in values:
            # The wrong number at least; how a pair is written is free.
            least = 0 if name == "padding" else 1
            numbers = (value,) if isinstance(value, int) else value
            wrong = [number for number in numbers if number < least] or numbers[-1:]
            shown = str(wrong[0]) if wrong else ""
            yield Case(f"{name}={value}", name, shown, settings={name: value})


SHARED_CASES = [
    *(case for case in rank_cases() if case.names in ("input", "offset", "mask")),
    *(case for case in dtype_cases() if case.names in ("input", "offset", "mask")),
    *setting_cases(),
    Case("offset-odd", "offset", "35", shapes={"offset": (N, Ho, Wo, 2 * 3 * TAPS - 1)}),
    Case("offset-no-group", "offset", "6", shapes={"offset": (N, Ho, Wo, TAPS)}),
    Case("offset-empty", "offset", "0", shapes={"offset": (N, Ho, Wo, 0)}),
    Case(
        "offset-groups-do-not-divide",
        "offset",
        "",
        shapes={"offset": (N, Ho, Wo, 2 * 5 * TAPS), "mask": (N, Ho, Wo, 5 * TAPS)},
    ),
    Case("offset-of-another-kernel", "offset", "40", shapes={"offset": (N, Ho, Wo, 2 * 20)}),
    Case("offset-batch", "offset", "3", shapes={"offset": (3, Ho, Wo, 2 * 3 * TAPS)}),
    Case("offset-batch-1", "offset", "1", shapes={"offset": (1, Ho, Wo, 2 * 3 * TAPS)}),
    Case(
        "offset-height",
        "offset",
        f"{Ho + 1}",
        shapes={"offset": (N, Ho + 1, Wo, 2 * 3 * TAPS)},
    ),
    Case("offset-width", "offset", f"{Wo - 1}", shapes={"offset": (N, Ho, Wo - 1, 2 * 3 * TAPS)}),
    Case("offset-transposed", "offset", f"{Wo}", shapes={"offset": (N, Wo, Ho, 2 * 3 * TAPS)}),
    Case("offset-channels-first", "offset", "36", shapes={"offset": (N, 2 * 3 * TAPS, Ho, Wo)}),
    Case("mask-groups", "mask", f"{2 * TAPS}", shapes={"mask": (N, Ho, Wo, 2 * TAPS)}),
    Case("mask-as-offset", "mask", f"{6 * TAPS}", shapes={"mask": (N, Ho, Wo, 6 * TAPS)}),
    Case("mask-empty", "mask", "0", shapes={"mask": (N, Ho, Wo, 0)}),
    Case("mask-batch", "mask", "3", shapes={"mask": (3, Ho, Wo, 3 * TAPS)}),
    Case("mask-height", "mask", f"{Ho + 1}", shapes={"mask": (N, Ho + 1, Wo, 3 * TAPS)}),
    Case("mask-width", "mask", f"{Wo + 1}", shapes={"mask": (N, Ho, Wo + 1, 3 * TAPS)}),
    Case("kernel-too-high", "output|input|kernel", "", shapes={"input": (N, 0, 9, 12)}),
    Case("dilation-too-wide", "output|input|kernel", "", settings={"dilation": (2, 999)}),
    Case("dilation-overflows", "output|input|kernel|dilation", "", settings={"dilation": 2**30}),
    Case("no-channels", "input", "0", shapes={"input": (N, 7, 9, 0)}),
]

CONV_CASES = [
    *(case for case in rank_cases() if case.names in ("weight", "bias")),
    *(case for case in dtype_cases() if case.names in ("weight", "bias")),
    Case("channels-not-a-multiple", "input|weight", "5", shapes={"weight": (10, 3, 2, 5)}),
    Case("weight-deeper-than-input", "input|weight", "24", shapes={"weight": (10, 3, 2, 24)}),
    Case("weight-empty-depth", "weight", "0", shapes={"weight": (10, 3, 2, 0)}),
    Case("outputs-not-a-multiple", "weight|output", "9", shapes={"weight": (9, 3, 2, 6)}),
    Case("no-outputs", "weight|output", "0", shapes={"weight": (0, 3, 2, 6), "bias": (0,)}),
    Case("weight-kernel-height-0", "kernel|weight", "0", shapes={"weight": (10, 0, 2, 6)}),
    Case("weight-kernel-width-0", "kernel|weight", "0", shapes={"weight": (10, 3, 0, 6)}),
    Case("weight-channels-first", "weight|offset", "", shapes={"weight": (10, 6, 3, 2)}),
    Case("bias-length", "bias", "9", shapes={"bias": (9,)}),
    Case("bias-one", "bias", "1", shapes={"bias": (1,)}),
    Case("bias-empty", "bias", "0", shapes={"bias": (0,)}),
]

IM2COL_CASES = [
    Case("kernel-size=0", "kernel", "0", settings={"kernel_size": 0}),
    Case("kernel-size=(3, 0)", "kernel", "0", settings={"kernel_size": (3, 0)}),
    Case("kernel-size=(-3, 2)", "kernel", "-3", settings={"kernel_size": (-3, 2)}),
    Case("kernel-size=(3, 2, 1)", "kernel", "3", settings={"kernel_size": (3, 2, 1)}),
    Case("kernel-size=()", "kernel", "", settings={"kernel_size": ()}),
]


def arguments_for(case):
    arguments = mx_arguments(random_arrays(CONFIG, 0), "float32")
    for name, shape in case.shapes.items():
        arguments[name] = mx.zeros(shape)
    for name, dtype in case.dtypes.items():
        arguments[name] = arguments[name].astype(getattr(mx, dtype))
    return arguments


def check_refused(case, op, call):
    with pytest.raises(ValueError, match=rf"^\[{op}\] ") as caught:
        call()
    message = str(caught.value)
    parts = FORM.fullmatch(message)
    assert parts, f"not of the form `[op] <rule>; got <value>`: {message}"
    assert re.search(case.names, parts["rule"]), message
    value = parts["value"].replace(" ", "").replace(",)", ")")
    assert case.shows.replace(" ", "") in value, message


@pytest.mark.parametrize("case", [*SHARED_CASES, *CONV_CASES], ids=lambda case: case.id)
def test_deform_conv2d(case):
    arguments = arguments_for(case)
    settings = {**CONFIG.settings, **case.settings}
    check_refused(case, "deform_conv2d", lambda: mlx_deform.deform_conv2d(**arguments, **settings))


@pytest.mark.parametrize("case", [*SHARED_CASES, *IM2COL_CASES], ids=lambda case: case.id)
def test_deform_im2col(case):
    arguments = im2col_arguments(arguments_for(case))
    settings = {"kernel_size": CONFIG.kernel, **CONFIG.settings, **case.settings}
    check_refused(case, "deform_im2col", lambda: mlx_deform.deform_im2col(**arguments, **settings))


def test_the_unchanged_call_is_accepted():
    arguments = mx_arguments(random_arrays(CONFIG, 0), "float32")
    mx.eval(mlx_deform.deform_conv2d(**arguments, **CONFIG.settings))
    arguments = im2col_arguments(arguments)
    mx.eval(mlx_deform.deform_im2col(**arguments, kernel_size=CONFIG.kernel, **CONFIG.settings))


def test_the_smallest_kernel_that_does_not_fit():
    """A padded extent one short of the dilated kernel is refused, an equal one accepted."""
    config = CONFIG.but(kH=3, kW=2, dilation=(3, 1), stride=(1, 1), padding=(1, 0), H=5)
    assert config.Ho == 1
    arguments = mx_arguments(random_arrays(config, 0), "float32")
    assert mlx_deform.deform_conv2d(**arguments, **config.settings).shape[1] == 1
    arguments["input"] = arguments["input"][:, :4]
    with pytest.raises(ValueError, match=r"\[deform_conv2d\] .*; got "):
        mlx_deform.deform_conv2d(**arguments, **config.settings)
    # A stride must not round the negative size up to an output of one row.
    with pytest.raises(ValueError, match=r"\[deform_conv2d\] .*; got "):
        mlx_deform.deform_conv2d(**arguments, **{**config.settings, "stride": (3, 1)})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_float64_on_a_gpu_stream(name):
    if not mx.is_available(mx.gpu):
        pytest.skip("no GPU")
    arguments = mx_arguments(random_arrays(CONFIG, 0), "float32", **{name: "float64"})
    with pytest.raises(ValueError, match=r"^\[deform_conv2d\] .*float64.*; got "):
        mlx_deform.deform_conv2d(**arguments, **CONFIG.settings, stream=mx.gpu)


def test_other_objects_are_refused_as_arguments():
    """Not MLX arrays at all: nanobind's own TypeError."""
    arguments = mx_arguments(random_arrays(CONFIG, 0), "float32")
    for name in ARGUMENTS:
        with pytest.raises((TypeError, ValueError)):
            mlx_deform.deform_conv2d(**{**arguments, name: "an array"}, **CONFIG.settings)
    with pytest.raises((TypeError, ValueError)):
        mlx_deform.deform_conv2d(**arguments, stride=1.5)
    with pytest.raises(TypeError):
        mlx_deform.deform_conv2d(arguments["input"], arguments["offset"])
