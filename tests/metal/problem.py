"""One deformable convolution for the GPU kernels: sizes, arrays, launches, expectations."""

import numpy as np

import oracle
from mlx_deform import _ext
from numerics import EPS

from .launch import guarded

DTYPES = ("float32", "float16", "bfloat16")
# Relative to the largest magnitude: float32 arithmetic, whatever is stored.
FLOAT32_TOLERANCE = 1e-5
# Of the type of the input; the others are float32 always.
HALF_ARRAYS = ("input", "columns", "grad_columns", "cotangent", "weight", "bias")
IN_CUDA_TOO = ("im2col", "col2im", "offset_grad")  # which leaves the products to MLX


def encode(array, dtype):
    """As stored in memory; bfloat16, which NumPy lacks, as its 16 bits."""
    array = np.asarray(array, np.float32)
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def decode(array):
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def rounding(dtype):
    """Half the distance of neighbouring numbers, relative: the error of storing one."""
    return EPS[dtype] / 2


def assert_near(got, want, dtype="float32"):
    """NaN where NaN is wanted, infinite where infinite, else near.

    float32: 1e-5 of the largest magnitude. Half types: twice the error of rounding the
    element, on top of that.
    """
    got, want = decode(got), np.asarray(want)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    if not finite.any():
        return
    tolerance = FLOAT32_TOLERANCE * np.abs(want[finite]).max()
    if dtype != "float32":
        tolerance = tolerance + 2 * rounding(dtype) * np.abs(want[finite])
    error = np.abs(got[finite] - want[finite])
    assert (error <= tolerance).all(), f"off by {error.max()}, allowed {np.max(tolerance)}"


class Problem:
    """The arrays of a `cases.Config`, and its kernels run on the pixels [begin, end).

    Columns are laid out (G, pixels, kH * kW, C / G), as a product batched over the groups
    takes them.
    """

    def __init__(self, config, dtype="float32", seed=0, begin=0, end=None):
        rng = np.random.default_rng(seed)
        self.config, self.dtype = config, dtype
        self.pixels = config.N * config.Ho * config.Wo
        self.begin, self.end = begin, self.pixels if end is None else end
        self.taps = config.kH * config.kW
        self.input = rng.standard_normal(config.shapes["input"])
        self.offset = 2 * rng.standard_normal(config.shapes["offset"])
        self.mask = rng.random(config.shapes["mask"]) if config.has_mask else None
        self.grad_columns = rng.standard_normal(
            (self.end - self.begin, self.taps, config.G, config.C // config.G)
        )
        self.columns = rng.standard_normal(self.grad_columns.shape)
        self.cotangent = rng.standard_normal(config.output_shape)
        self.weight = rng.standard_normal(config.shapes["weight"])
        self.bias = rng.standard_normal(config.O)
        # Added to, not overwritten; small, so as not to hide an error.
        self.grad_input = rng.standard_normal(config.shapes["input"]) / 16
        self.grad_weight = rng.standard_normal(config.shapes["weight"]) / 16

    @property
    def fields(self):
        c = self.config
        group = c.C // c.G
        return {
            **{name: getattr(c, name) for name in ("N", "H", "W", "C", "O", "kH", "kW")},
            **{"Ho": c.Ho, "Wo": c.Wo, "G": c.G, "DG": c.DG, "has_mask": int(c.has_mask)},
            **dict(zip(("stride_h", "stride_w"), c.stride, strict=True)),
            **dict(zip(("pad_h", "pad_w"), c.padding, strict=True)),
            **dict(zip(("dilation_h", "dilation_w"), c.dilation, strict=True)),
            "pixel_begin": self.begin,
            "pixel_end": self.end,
            "column_group": (self.end - self.begin) * self.taps * group,
            "column_pixel": self.taps * group,
            "column_tap": group,
        }

    def plan(self, op, **options):
        plan = _ext._dispatch_plan(op, self.fields, self.dtype, **options)
        if op in IN_CUDA_TOO and not options.get("direct") and not plan["empty"]:
            plan["cuda"] = _ext._cuda_kernel(op, self.fields, self.dtype, **options)
        return plan

    # ---- as the kernels store them

    def stored(self, name):
        array = getattr(self, name)
        if name in ("columns", "grad_columns"):
            array = array.transpose(2, 0, 1, 3)
        return encode(array, self.dtype if name in HALF_ARRAYS else "float32")

    def rounded(self, name):
        """The numbers that the kernels see, in float64."""
        array = getattr(self, name)
        if array is None:
            return None
        return decode(encode(array, self.dtype if name in HALF_ARRAYS else "float32"))

    def run(self, kernels, plan, outputs, seed=0):
        """Runs a plan; `outputs` are arrays by role, written in place."""
        arrays = {
            role: outputs[role] if role in outputs else self.stored(role)
            for role, _, _ in plan["buffers"]
            if role != "params"
        }
        with guarded(*arrays.values()) as copies:
            buffers = dict(zip(arrays, copies, strict=True))
            kernels.run(plan, {**buffers, "params": _ext._params_bytes(self.fields)}, seed)

    # ---- results and expectations

    def im2col(self, kernels, seed=0, **options):
        columns = self.empty_columns()
        self.run(kernels, self.plan("im2col", **options), {"columns": columns}, seed)
        return columns.transpose(1, 2, 0, 3)

    def col2im(self, kernels, seed=0, **options):
        grad_input = self.stored("grad_input")
        self.run(kernels, self.plan("col2im", **options), {"grad_input": grad_input}, seed)
        return grad_input

    def offset_grad(self, kernels, seed=0, **options):
        """grad_offset and grad_mask, NaN where they were not written."""
        outputs = {
            "grad_offset": np.full(self.offset.shape, np.nan, np.float32),
            "grad_mask": np.full(self.config.but(has_mask=True).shapes["mask"], np.nan, np.float32),
        }
        self.run(kernels, self.plan("offset_grad", **options), outputs, seed)
        return outputs["grad_offset"], outputs["grad_mask"]

    def column_product(self, kernels, seed=0, **options):
        columns = self.empty_columns()
        self.run(kernels, self.plan("column_product", **options), {"grad_columns": columns}, seed)
        return columns.transpose(1, 2, 0, 3)

    def output(self, kernels, how, seed=0, **options):
        """By `how`, "output_product" or "direct_output"; NaN where nothing was written."""
        out = encode(np.full(self.config.output_shape, np.nan), self.dtype)
        self.run(kernels, self.plan(how, **options), {"out": out}, seed)
        return out

    def weight_gradient(self, kernels, how, seed=0, **options):
        """By `how`, "weight_product" or "direct_weight", on top of grad_weight."""
        grad_weight = self.stored("grad_weight")
        self.run(kernels, self.plan(how, **options), {"grad_weight": grad_weight}, seed)
        return grad_weight

    def empty_columns(self):
        """NaN, as far as a kernel writes nothing."""
        c = self.config
        shape = (c.G, self.end - self.begin, self.taps, c.C // c.G)
        return encode(np.full(shape, np.nan), self.dtype)

    @property
    def oracle_arguments(self):
        c = self.config
        return (
            (self.rounded("input"), self.rounded("offset"), c.kernel),
            {**c.settings, "mask": self.rounded("mask"), "coordinate_dtype": np.float32},
        )

    def expected_columns(self):
        arguments, options = self.oracle_arguments
        columns = oracle.deform_im2col(*arguments, **options)
        c = self.config
        columns = columns.reshape(self.pixels, self.taps, c.G, c.C // c.G)
        return columns[self.begin : self.end]

    # The products, of columns that are (pixels, taps, G, C / G).

    @property
    def rounded_weight(self):
        c = self.config
        return self.rounded("weight").reshape(c.G, c.O // c.G, self.taps, c.C // c.G)

    @property
    def cotangent_rows(self):
        c = self.config
        rows = self.rounded("cotangent").reshape(self.pixels, c.G, c.O // c.G)
        return rows[self.begin : self.end]

    def expected_column_product(self):
        return np.einsum("pgo,gokc->pkgc", self.cotangent_rows, self.rounded_weight)

    def expected_output(self, columns, has_bias=True):
        product = np.einsum("pkgc,gokc->pgo", columns, self.rounded_weight)
        out = np.full((self.pixels, self.config.O), np.nan)
        out[self.begin : self.end] = product.reshape(len(columns), -1)
        if has_bias:
            out += self.rounded("bias")
        return out.reshape(self.config.output_shape)

    def expected_weight_gradient(self, columns):
        product = np.einsum("pgo,pkgc->gokc", self.cotangent_rows, columns)
        return self.rounded("grad_weight") + product.reshape(self.weight.shape)

    def expected_gradients(self, grad_columns=None):
        """Of the input added to, of offset and mask; NaN beyond the launch's pixels."""
        c = self.config
        cotangent = np.zeros((self.pixels, self.taps * c.C))
        if grad_columns is None:
            grad_columns = self.rounded("grad_columns")
        cotangent[self.begin : self.end] = grad_columns.reshape(len(grad_columns), -1)
        arguments, options = self.oracle_arguments
        cotangent = cotangent.reshape(c.columns_shape)
        _, grads = oracle.deform_im2col_vjp(cotangent, *arguments, **options)
        return (
            self.rounded("grad_input") + grads.input,
            self.within(grads.offset),
            None if grads.mask is None else self.within(grads.mask),
        )

    def within(self, array):
        out = np.full((self.pixels, array.shape[-1]), np.nan)
        out[self.begin : self.end] = array.reshape(out.shape)[self.begin : self.end]
        return out.reshape(array.shape)
