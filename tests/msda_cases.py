"""Configurations of multi-scale deformable attention, their arrays from seeds, and calls."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

import mlx_deform
from numerics import (
    EPS,
    HALF_DTYPES,
    assert_all_close,
    coordinate_dtype,
    device_for,
    rounded,
    to_mx,
    to_numpy,
)
from oracle.multi_scale_deformable_attention import (
    multi_scale_deformable_attention_vjp as oracle_vjp,
)

ARGUMENTS = ("value", "locations", "weights")
# Locations are multiples of this unless asked otherwise: times the size of a map they are
# exact in float32, and no implementation can round a sample into the neighbouring cell.
LOCATION_GRID = 2.0**-12
# Where samples lie: on the maps and a little beyond; mostly far beyond; on the borders of
# cells (where sizes are powers of two).
KINDS = ("near", "far", "borders")


@dataclass(frozen=True)
class Config:
    N: int = 2
    shapes: tuple = ((5, 7), (3, 4))
    Q: int = 11
    M: int = 3
    D: int = 6
    points: tuple = (4, 4)
    ragged: bool = False  # one axis of samples, and `points`
    method: str = "bilinear"
    kind: str = "near"

    @property
    def S(self):
        return sum(h * w for h, w in self.shapes)

    @property
    def K(self):
        return sum(self.points)

    @property
    def output_shape(self):
        return (self.N, self.Q, self.M * self.D)

    def but(self, **changes):
        return replace(self, **changes)


def random_config(seed, **fixed):
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(KINDS, p=[0.6, 0.1, 0.3]))
    sizes = [1, 2, 4, 8, 16] if kind == "borders" else range(1, 12)
    L = int(rng.integers(1, 5))
    shapes = tuple(tuple(int(size) for size in rng.choice(sizes, 2)) for _ in range(L))
    ragged = bool(rng.random() < 0.4)
    points = rng.integers(1, 6, L) if ragged else np.repeat(rng.integers(1, 6), L)
    return Config(
        N=int(rng.choice([0, 1, 2, 3], p=[0.05, 0.4, 0.3, 0.25])),
        shapes=shapes,
        Q=int(rng.choice([0, 1, 5, 17, 40], p=[0.05, 0.15, 0.3, 0.3, 0.2])),
        M=int(rng.integers(1, 5)),
        D=int(rng.integers(1, 20)),
        points=tuple(int(count) for count in points),
        ragged=ragged,
        kind=kind,
    ).but(**fixed)


def random_arrays(config, seed, grid=LOCATION_GRID):
    """float64 arrays by argument name, and "cotangent"; locations with one axis of samples."""
    rng = np.random.default_rng(seed)
    samples = (config.N, config.Q, config.M, config.K)
    if config.kind == "borders":
        sizes = np.repeat(np.array([shape[::-1] for shape in config.shapes]), config.points, 0)
        pixels = rng.integers(-2, sizes + 2, (*samples, 2))
        locations = (pixels + 0.5) / sizes
    else:
        spread = 0.7 if config.kind == "near" else 20
        locations = 0.5 + rng.uniform(-spread, spread, (*samples, 2))
        if grid is not None:
            locations = np.round(locations / grid) * grid
    return {
        "value": rng.standard_normal((config.N, config.S, config.M, config.D)),
        "locations": locations,
        "weights": rng.uniform(-0.5, 1, samples),
        "cotangent": rng.standard_normal(config.output_shape),
    }


def call(config, value, locations, weights):
    """The library, on arrays with one axis of samples."""
    points = None
    if config.ragged:
        points = config.points
    else:
        levels = len(config.shapes)
        locations = mx.unflatten(locations, 3, (levels, config.points[0]))
        weights = mx.unflatten(weights, 3, (levels, config.points[0]))
    return mlx_deform.multi_scale_deformable_attention(
        value, config.shapes, locations, weights, points=points, method=config.method
    )


def mx_arguments(arrays, dtype, **dtypes):
    return [to_mx(arrays[name], dtypes.get(name, dtype)) for name in ARGUMENTS]


def run_library(config, arrays, dtype, **dtypes):
    """Output and gradients as float64 NumPy, by name."""
    with mx.stream(device_for(dtype, *dtypes.values())):
        arguments = mx_arguments(arrays, dtype, **dtypes)
        cotangent = to_mx(arrays["cotangent"], dtype)
        outputs, gradients = mx.vjp(lambda *values: call(config, *values), arguments, [cotangent])
        mx.eval(outputs, gradients)
        assert outputs[0].dtype == arguments[0].dtype
        for argument, gradient in zip(arguments, gradients, strict=True):
            assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)
        results = zip(("output", *ARGUMENTS), (*outputs, *gradients), strict=True)
        return {name: to_numpy(result) for name, result in results}


def run_oracle(config, arrays, **options):
    arguments = {name: arrays[name] for name in ARGUMENTS}
    settings = {"spatial_shapes": config.shapes, "points": config.points, "method": config.method}
    output, gradients = oracle_vjp(arrays["cotangent"], **arguments, **settings, **options)
    return {"output": output, **gradients._asdict()}


def tolerances(config, arrays, dtype):
    """k * eps * magnitude for every element, as tests/numerics.py has it."""
    magnitudes = run_oracle(config, arrays, absolute=True, coordinate_dtype=coordinate_dtype(dtype))
    sample = 8  # coordinate, weights, the sum over four corners
    roundings = {
        "output": config.K + sample,
        # Every sample of a level may lie in one cell.
        "value": config.Q * max(config.points) + sample,
        "locations": config.D + sample,
        "weights": config.D + sample,
    }
    computed = "float32" if dtype in HALF_DTYPES else dtype
    allowed = {}
    for name, magnitude in magnitudes.items():
        allowed[name] = roundings[name] * EPS[computed] * magnitude + np.finfo(computed).tiny
        if dtype in HALF_DTYPES:
            allowed[name] = allowed[name] + EPS[dtype] * magnitude + 2.0**-24
    return allowed


def check_against_oracle(config, arrays, dtype, **dtypes):
    """Output and every gradient within tolerance; judged by the coarsest type among them."""
    arrays = rounded(arrays, dtype, **dtypes)
    coarsest = max((dtype, *dtypes.values()), key=EPS.get)
    want = run_oracle(config, arrays, coordinate_dtype=coordinate_dtype(dtype))
    got = run_library(config, arrays, dtype, **dtypes)
    assert_all_close(got, want, tolerances(config, arrays, coarsest))
