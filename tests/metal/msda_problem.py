"""One multi-scale deformable attention for the GPU kernels, as problem.py has convolutions."""

from dataclasses import dataclass, replace

import numpy as np

from mlx_deform import _ext
from oracle.multi_scale_deformable_attention import (
    Gradients,
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_vjp,
)

from .launch import guarded
from .problem import decode, encode

# Of the type of the value; the others are float32, and `levels` int32.
HALF_ARRAYS = ("value", "cotangent", "out")


@dataclass(frozen=True)
class MsdaConfig:
    N: int = 2
    Q: int = 7
    M: int = 3
    D: int = 16
    shapes: tuple = ((5, 9), (3, 4), (2, 6))
    points: tuple = (3, 1, 2)
    is_discrete: bool = False

    def but(self, **changes):
        return replace(self, **changes)

    @property
    def S(self):
        return sum(h * w for h, w in self.shapes)

    @property
    def K(self):
        return sum(self.points)

    @property
    def levels(self):
        """Rows of (H, W, first row in S, first sample in K)."""
        out, start, first = [], 0, 0
        for (h, w), points in zip(self.shapes, self.points, strict=True):
            out.append((h, w, start, first))
            start, first = start + h * w, first + points
        return out


# ---------------------------------------------------------------------------
# The kernels


class MsdaProblem:
    """The arrays of a config, and its kernels run on the rows n * Q + q of [begin, end)."""

    def __init__(self, config, dtype="float32", seed=0, begin=0, end=None):
        rng = np.random.default_rng(seed)
        c = self.config = config
        self.dtype = dtype
        self.rows = c.N * c.Q
        self.begin, self.end = begin, self.rows if end is None else end
        self.value = rng.standard_normal((c.N, c.S, c.M, c.D))
        # Some beyond the map, on every side.
        self.locations = rng.uniform(-0.3, 1.3, (c.N, c.Q, c.M, c.K, 2))
        self.weights = rng.random((c.N, c.Q, c.M, c.K))
        self.cotangent = rng.standard_normal((c.N, c.Q, c.M, c.D))
        # Added to, not overwritten; small, so as not to hide an error.
        self.grad_value = rng.standard_normal(self.value.shape) / 16

    @property
    def fields(self):
        c = self.config
        return {
            **{name: getattr(c, name) for name in ("N", "S", "Q", "M", "D", "K")},
            "L": len(c.shapes),
            "is_discrete": int(c.is_discrete),
            "query_begin": self.begin,
            "query_end": self.end,
        }

    @property
    def levels(self):
        return self.config.levels

    def plan(self, op, **options):
        plan = _ext._msda_plan(op, self.fields, self.levels, self.dtype, **options)
        if not plan["empty"]:
            plan["cuda"] = _ext._msda_cuda_kernel(
                op, self.fields, self.levels, self.dtype, **options
            )
        return plan

    # ---- as the kernels store them

    def type_of(self, name):
        return self.dtype if name in HALF_ARRAYS else "float32"

    def stored(self, name):
        if name == "levels":
            return np.array(self.levels, np.int32)
        return encode(getattr(self, name), self.type_of(name))

    def rounded(self, name):
        """The numbers that the kernels see, in float64."""
        return decode(self.stored(name))

    def unwritten(self):
        """Outputs that are written, and not added to: NaN as far as a kernel writes nothing."""
        shapes = {
            "out": self.cotangent.shape,
            "grad_locations": self.locations.shape,
            "grad_weights": self.weights.shape,
        }
        return {
            name: encode(np.full(shape, np.nan), self.type_of(name))
            for name, shape in shapes.items()
        }

    def buffers(self, plan, outputs):
        return {
            role: outputs[role] if role in outputs else self.stored(role)
            for role, _, _ in plan["buffers"]
            if role != "params"
        }

    def run(self, kernels, op, seed=0, **options):
        """The outputs by role: all that were written, and those that were not asked for."""
        outputs = {**self.unwritten(), "grad_value": self.stored("grad_value")}
        plan = self.plan(op, **options)
        arrays = self.buffers(plan, outputs)
        with guarded(*arrays.values()) as copies:
            buffers = dict(zip(arrays, copies, strict=True))
            kernels.run(plan, {**buffers, "params": _ext._msda_params_bytes(self.fields)}, seed)
        return outputs

    def forward(self, kernels, seed=0, **options):
        return self.run(kernels, "forward", seed, **options)["out"]

    def grad_of_value(self, kernels, seed=0, **options):
        return self.run(kernels, "grad_value", seed, **options)["grad_value"]

    def grads_of_samples(self, kernels, seed=0, **options):
        outputs = self.run(kernels, "grad_samples", seed, **options)
        return outputs["grad_locations"], outputs["grad_weights"]

    # ---- expectations

    @property
    def reference_arguments(self):
        c = self.config
        return (
            (
                self.rounded("value"),
                c.shapes,
                self.rounded("locations"),
                self.rounded("weights"),
                c.points,
                "discrete" if c.is_discrete else "bilinear",
            ),
            {"coordinate_dtype": np.float32},
        )

    def expected(self):
        arguments, options = self.reference_arguments
        out = multi_scale_deformable_attention(*arguments, **options)
        return self.within(out.reshape(self.cotangent.shape))

    def expected_gradients(self):
        """Of the value added to, of locations and weights; NaN beyond the launch's rows."""
        arguments, options = self.reference_arguments
        cotangent = np.nan_to_num(self.within(self.rounded("cotangent")))
        _, grads = multi_scale_deformable_attention_vjp(
            cotangent.reshape(*cotangent.shape[:2], -1), *arguments, **options
        )
        return Gradients(
            self.rounded("grad_value") + grads.value,
            self.within(grads.locations),
            self.within(grads.weights),
        )

    def within(self, array):
        out = np.full((self.rows, *array.shape[2:]), np.nan)
        out[self.begin : self.end] = array.reshape(out.shape)[self.begin : self.end]
        return out.reshape(array.shape)
