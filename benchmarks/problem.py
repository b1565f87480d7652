"""The arrays of a case, the size of its matrix products, and its check."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from cases import random_arrays, random_offset
from named_cases import cropped
from numerics import EPS, TORCHVISION_TOLERANCE, check_against_oracle, relative_error

FORWARD = "forward"
BACKWARD = "forward+backward"
PASSES = (FORWARD, BACKWARD)
PRODUCTS = {FORWARD: 1, BACKWARD: 3}  # output; and the gradients of columns and weight

# Rounded results and, on GPUs, rounded columns, each by half an eps.
TOLERANCE = {
    "float32": TORCHVISION_TOLERANCE["float32"],
    "float16": 2 * EPS["float16"],
    "bfloat16": 2 * EPS["bfloat16"],
}
# Its 11 bits of significand are what every float32 product has on the tensor cores.
TF32_TOLERANCE = 2 * EPS["float16"]


class Mismatch(Exception):
    """The library's results are not those of the reference."""


@dataclass(frozen=True)
class Product:
    """columns (G, M, K) times weight (G, O, K) transposed: what a convolution cannot avoid."""

    G: int
    M: int  # output pixels
    K: int  # taps times the channels of a group
    O: int  # output channels of a group  # noqa: E741

    @property
    def flops(self):
        return 2 * self.G * self.M * self.K * self.O

    def rows(self, bytes_at_once=2**27):
        """The rows of M, in pieces whose columns take a bounded memory."""
        most = max(1, bytes_at_once // (4 * self.G * self.K))
        pieces = math.ceil(self.M / most)
        return [self.M * (i + 1) // pieces - self.M * i // pieces for i in range(pieces)]


def product_of(config):
    return Product(
        G=config.G,
        M=config.N * config.Ho * config.Wo,
        K=config.kH * config.kW * config.C // config.G,
        O=config.O // config.G,
    )


def gflop(config, which):
    return PRODUCTS[which] * product_of(config).flops / 1e9


@dataclass(frozen=True)
class Problem:
    name: str
    config: object
    arrays: dict  # float32 by argument name, and "cotangent"


def _held_by_bfloat16(array):
    """Rounded to values that every type holds, so that one reference serves them all."""
    array = mx.array(np.asarray(array, np.float32))
    return np.array(array.astype(mx.bfloat16).astype(mx.float32))


def make_problem(name, config, seed=0):
    rng = np.random.default_rng(seed)

    def normal(shape):
        return rng.standard_normal(shape, dtype=np.float32)

    shapes = config.shapes
    arrays = {
        "input": normal(shapes["input"]),
        "offset": random_offset(config, rng),
        "weight": normal(shapes["weight"]) / math.sqrt(product_of(config).K),
        "bias": normal(shapes["bias"]),
        "mask": rng.random(shapes["mask"], dtype=np.float32),
        "cotangent": normal(config.output_shape),
    }
    return Problem(name, config, {n: _held_by_bfloat16(array) for n, array in arrays.items()})


def errors_of(got, want):
    return {name: float(relative_error(got[name], want[name])) for name in want}


def check_against(reference, results, dtype, tf32):
    """The largest relative error of output and gradients; Mismatch beyond the tolerance."""
    tolerance = TF32_TOLERANCE if tf32 and dtype == "float32" else TOLERANCE[dtype]
    errors = errors_of(results, reference)
    if not all(error <= tolerance for error in errors.values()):  # NaN is a mismatch too
        raise Mismatch(f"relative errors {errors} where {tolerance:.3g} is allowed")
    return max(errors.values())


def check_cropped(problem, dtype):
    """Output and gradients on a small map, against the tests' oracle."""
    config = cropped(problem.config)
    try:
        check_against_oracle(config, random_arrays(config, seed=0), dtype)
    except AssertionError as error:
        raise Mismatch(str(error)) from None
