"""Checks an installed mlx_deform: ``python -m mlx_deform.selftest [--device cpu|gpu]``.

Every kernel, element type and gradient of a device, by default MLX's own, beside the same op
composed of MLX's primitives (:func:`mlx_deform.portable`) in float64 on the CPU, with random
cotangents. One row for each case and type: the largest error in units of what rounding allows,
and the kernels that the row reaches on a GPU. The exit status is 0 if all rows pass, else 1, and
the end of the report is what to paste into an issue.

It needs MLX and this package alone, and takes less than a minute. TF32 is switched off, whose
products hold three digits: the rows ask for float32's.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ["MLX_ENABLE_TF32"] = "0"  # read by MLX's first product

import mlx.core as mx

import mlx_deform
from mlx_deform import deform_conv2d, deform_im2col, multi_scale_deformable_attention

# The distance from 1 to the next number.
EPS = {mx.float64: 2.0**-52, mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
GPU_TYPES = (mx.float32, mx.float16, mx.bfloat16)
# Of a result as large as the largest: columns, their cotangent and the result are rounded to the
# type of the image on a GPU.
ROUNDINGS = 8
SUM_EPS = 64 * EPS[mx.float32]  # in a sum of many


@dataclass(frozen=True)
class Check:
    """A function of arrays, which are rounded to a type first, and the shape of its output."""

    name: str
    function: Callable
    arguments: dict  # by name: a function of a key that makes an array
    wide: tuple = ()  # arguments that stay float32 beside a half: where to sample
    kernels: str = ""  # that a GPU runs
    environment: dict = field(default_factory=dict)


@dataclass
class Row:
    name: str
    dtype: str
    kernels: str
    errors: dict = field(default_factory=dict)  # of output and gradients, of what is allowed
    message: str = ""

    @property
    def worst(self):
        return max(self.errors, key=self.errors.get, default="")

    @property
    def error(self):
        return max(self.errors.values(), default=0.0)

    @property
    def passed(self):
        return not self.message and self.error <= 1


@contextlib.contextmanager
def environment(changes):
    """Variables that the library reads at each call."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- cases


def normal(*shape, scale=1.0):
    return lambda key: scale * mx.random.normal(shape, key=key)


def uniform(*shape):
    return lambda key: mx.random.uniform(shape=shape, key=key)


def conv(
    name,
    kernels,
    *,
    C=12,
    C_out=10,
    k=(3, 2),
    G=1,
    DG=1,
    mask=True,
    bias=True,
    stride=(1, 1),
    padding=(1, 2),
    dilation=(1, 1),
    **environment,
):
    """A convolution; distinct sizes, so that no axis can stand for another."""
    N, H, W = 2, 9, 11
    Ho, Wo = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, p, d, s in zip((H, W), k, padding, dilation, stride, strict=True)
    )
    taps = k[0] * k[1] * DG
    arguments = {
        "input": normal(N, H, W, C),
        "offset": normal(N, Ho, Wo, 2 * taps, scale=1.5),
        "weight": normal(C_out, *k, C // G, scale=(k[0] * k[1] * C // G) ** -0.5),
    }
    if mask:
        arguments["mask"] = uniform(N, Ho, Wo, taps)
    if bias:
        arguments["bias"] = normal(C_out)

    def function(input, offset, weight, mask=None, bias=None):
        return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    return Check(
        f"deform_conv2d, {name}", function, arguments, ("offset", "mask"), kernels, environment
    )


def im2col(name, kernels, C=12, DG=2, **environment):
    arguments = {
        "input": normal(2, 7, 9, C),
        "offset": normal(2, 7, 8, 2 * 6 * DG, scale=1.5),
        "mask": uniform(2, 7, 8, 6 * DG),
    }

    def function(input, offset, mask):
        return deform_im2col(input, offset, (3, 2), padding=(1, 0), mask=mask)

    return Check(
        f"deform_im2col, {name}", function, arguments, ("offset", "mask"), kernels, environment
    )


def attention(name, kernels, D=16, method="bilinear", **environment):
    shapes, points = ((7, 11), (4, 6), (3, 2)), (3, 1, 4)
    S, K = sum(h * w for h, w in shapes), sum(points)
    arguments = {
        "value": normal(2, S, 3, D),
        "sampling_locations": lambda key: (
            1.2 * mx.random.uniform(shape=(2, 5, 3, K, 2), key=key) - 0.1
        ),
        "attention_weights": uniform(2, 5, 3, K),
    }

    def function(value, sampling_locations, attention_weights):
        return multi_scale_deformable_attention(
            value, shapes, sampling_locations, attention_weights, points=points, method=method
        )

    wide = ("sampling_locations", "attention_weights")
    return Check(
        f"multi_scale_deformable_attention, {name}", function, arguments, wide, kernels, environment
    )


SAMPLES = "deform_im2col deform_offset_grad"
PRODUCTS = "deform_output_product deform_column_product deform_weight_product"
SCATTER = "deform_col2im deform_offset_grad"
DENSE = f"{SAMPLES} deform_col2im {PRODUCTS} zero_fill"
ORDERED = {"MLX_DEFORM_DETERMINISTIC": "1"}
WIDE = {"MLX_DEFORM_INDEX_BITS": "64"}
CHUNKS = {"MLX_DEFORM_COLUMN_BUDGET_MB": "0.02"}
PIECES = {"MLX_DEFORM_PIECE_GFLOP": "1e-5"}
ATTENTION = "msda_forward msda_grad_value msda_grad_samples"


def checks():
    """Of every op: a new one adds its own."""
    return [
        conv("plain", DENSE, C=16, C_out=12),
        conv("no mask, no bias", DENSE, mask=False, bias=False),
        conv("odd channels", DENSE, C=7, C_out=5),
        conv("many channels", DENSE, C=144, C_out=72, DG=2),
        conv("groups", DENSE, C=48, C_out=40, G=2, DG=3),
        conv("stride and dilation", DENSE, stride=(2, 1), dilation=(1, 2)),
        conv("chunks", DENSE, C=64, C_out=16, **CHUNKS),
        conv("pieces", DENSE, C=16, C_out=12, **CHUNKS, **PIECES),
        conv("fixed order", DENSE.replace("col2im ", "col2im_ordered "), **ORDERED),
        conv("wide index", DENSE, C=16, C_out=12, **WIDE),
        conv(
            "depthwise",
            f"deform_depthwise_output deform_depthwise_weight {SCATTER}",
            C=16,
            C_out=16,
            G=16,
        ),
        conv(
            "small groups",
            f"deform_grouped_output deform_grouped_weight {SCATTER}",
            C=24,
            C_out=36,
            G=6,
            DG=2,
        ),
        im2col("plain", f"{SAMPLES} deform_col2im"),
        im2col("odd channels", f"{SAMPLES} deform_col2im", C=9, DG=3),
        attention("plain", ATTENTION),
        attention("odd channels", ATTENTION, D=5),
        attention("discrete", ATTENTION, method="discrete"),
        attention("fixed order", ATTENTION.replace("grad_value", "grad_value_ordered"), **ORDERED),
        attention("wide index", ATTENTION, **WIDE),
        attention("pieces", ATTENTION, **PIECES),
    ]


# ---- comparison


def arrays_of(check, dtype):
    """The arguments, as the device gets them."""
    keys = mx.random.split(mx.random.key(7), len(check.arguments))
    arrays = []
    for (name, make), key in zip(check.arguments.items(), keys, strict=True):
        wide = mx.float64 if dtype == mx.float64 else mx.float32
        arrays.append(make(key).astype(wide if name in check.wide else dtype))
    return arrays


def values_of(check, arrays, cotangent, device):
    """Output and gradients, by name, in float64 on the CPU."""
    names = list(check.arguments)

    def function(*arguments):
        return check.function(**dict(zip(names, arguments, strict=True)))

    with mx.stream(device):
        outputs, gradients = mx.vjp(function, arrays, [cotangent])
        mx.eval(outputs, gradients)
    found = {
        "output": outputs[0],
        **{f"grad {n}": g for n, g in zip(names, gradients, strict=True)},
    }
    return {name: x.astype(mx.float64, stream=mx.cpu) for name, x in found.items()}


def error_of(got, want, dtype):
    """The largest error in units of what rounding allows; infinite for NaN or a wrong shape."""
    if got.shape != want.shape:
        return float("inf")
    if want.size == 0:
        return 0.0
    with mx.stream(mx.cpu):
        error = mx.max(mx.abs(got - want)).item()
        size = mx.max(mx.abs(want)).item()
    sums = SUM_EPS if dtype != mx.float64 else 64 * EPS[mx.float64]
    allowed = (ROUNDINGS * EPS[dtype] + sums) * size
    if error != error:
        return float("inf")
    if allowed == 0:  # no gradient at all, as of a discrete location
        return 0.0 if error == 0 else float("inf")
    return error / allowed


def run(check, dtype, device):
    """A row of the table."""
    row = Row(check.name, str(dtype).split(".")[-1], check.kernels)
    try:
        with mx.stream(mx.cpu):
            arrays = arrays_of(check, dtype)
            exact = [x.astype(mx.float64) for x in arrays]
            names = list(check.arguments)
            with mlx_deform.portable():
                shape = check.function(**dict(zip(names, exact, strict=True))).shape
                cotangent = mx.random.normal(shape, key=mx.random.key(3)).astype(dtype)
                mx.eval(arrays, exact, cotangent)
                want = values_of(check, exact, cotangent.astype(mx.float64), mx.cpu)
        with environment(check.environment):
            got = values_of(check, arrays, cotangent, device)
        row.errors = {name: error_of(got[name], value, dtype) for name, value in want.items()}
    except Exception as error:  # whatever it is, it belongs into the report
        row.message = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def special_coordinates(device):
    """NaN in its own output alone; infinite and huge coordinates are zeros."""
    row = Row("deform_conv2d, special coordinates", "float32", "deform_im2col")
    try:
        offset = mx.zeros((1, 3, 3, 2))
        for place, value in enumerate((float("nan"), float("inf"), 1e30, -float("inf"))):
            offset[0, place // 3, place % 3, place % 2] = value
        with mx.stream(device):
            x = mx.ones((1, 3, 3, 8))
            out = deform_conv2d(x, offset, mx.ones((4, 1, 1, 8)))
            mx.eval(out)
        got = out[0, :, :, 0].tolist()
        nan, zeros, rest = got[0][0], [got[0][1], got[0][2], got[1][0]], [*got[1][1:], *got[2]]
        if nan == nan or zeros != [0.0] * 3 or rest != [8.0] * 5:
            row.message = f"got {got}"
    except Exception as error:
        row.message = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


# ---- report


def where_it_ran(device):
    stand_in = os.environ.get("MLX_DEFORM_STAND_IN", "0")
    if device == mx.cpu and stand_in not in ("", "0"):
        return f"the GPU's route over stand-ins on the CPU (MLX_DEFORM_STAND_IN={stand_in})"
    return "the GPU" if device == mx.gpu else "the CPU"


def table(rows):
    width = max(len(row.name) for row in rows)
    lines = [f"{'check':<{width}}  {'type':<9} {'error':>6}  of the allowed, at worst in"]
    for row in rows:
        verdict = "ok" if row.passed else "FAILED"
        lines.append(
            f"{row.name:<{width}}  {row.dtype:<9} {row.error:6.2f}  {row.worst:<23} {verdict}"
        )
        if not row.passed:
            lines.append(f"{'':<{width}}  kernels: {row.kernels}")
            if row.message:
                lines.append(f"{'':<{width}}  {row.message}")
    return "\n".join(lines)


# What a kernel has a part in.
PARTS = {
    "deform_im2col": ("output", "grad weight"),
    "deform_output_product": ("output",),
    "deform_grouped_output": ("output",),
    "deform_depthwise_output": ("output",),
    "deform_column_product": ("grad input", "grad offset", "grad mask"),
    "deform_col2im": ("grad input",),
    "deform_col2im_ordered": ("grad input",),
    "deform_offset_grad": ("grad offset", "grad mask"),
    "deform_weight_product": ("grad weight",),
    "deform_grouped_weight": ("grad weight",),
    "deform_depthwise_weight": ("grad weight",),
    "zero_fill": ("grad input", "grad weight", "grad value"),
    "msda_forward": ("output",),
    "msda_grad_value": ("grad value",),
    "msda_grad_value_ordered": ("grad value",),
    "msda_grad_samples": ("grad sampling_locations", "grad attention_weights"),
}


def suspects(rows):
    """The kernels that have a part in what is wrong, and in nothing that is right."""
    wrong, right = set(), set()
    for row in rows:
        for stem in row.kernels.split():
            name = f"{stem} ({row.dtype})"
            errors = [row.errors.get(part, 0.0) for part in PARTS[stem]]
            if row.message or max(errors) > 1:
                wrong.add(name)
            if not row.message and min(errors) <= 1:
                right.add(name)
    return sorted(wrong - right or wrong)


def report(rows, device):
    failed = [row for row in rows if not row.passed]
    lines = [
        "---- paste this into an issue",
        f"mlx_deform {mlx_deform.__version__}, mlx {importlib.metadata.version('mlx')}, Python"
        f" {platform.python_version()}, {platform.platform()}",
        f"ran on {where_it_ran(device)}: {mx.device_info(device)}",
        f"{len(rows) - len(failed)} of {len(rows)} rows passed",
    ]
    if failed:
        lines.append(f"suspects: {', '.join(suspects(rows))}")
        lines.append(table(failed))
    return "\n".join(lines)


def progress(items):
    """A bar, for whoever watches and has tqdm."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, leave=False)


def main(arguments=None):
    """Runs the checks and prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_deform.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's own")
    chosen = parser.parse_args(arguments).device
    if chosen == "gpu" and not mx.is_available(mx.gpu):
        parser.error("MLX finds no GPU here")
    device = getattr(mx, chosen) if chosen else mx.default_device().type
    types = GPU_TYPES if device == mx.gpu else (mx.float64, *GPU_TYPES)
    print(f"mlx_deform on {where_it_ran(device)}")
    jobs = [(check, dtype) for check in checks() for dtype in types]
    rows = [run(check, dtype, device) for check, dtype in progress(jobs)]
    rows.append(special_coordinates(device))
    print(table(rows))
    print(report(rows, device))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
