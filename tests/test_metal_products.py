"""Metal's products with the weight, and what does without columns, run on the CPU from the
dispatch plans against float64. CUDA leaves products to MLX.
"""

import numpy as np
import pytest

from cuda_kernels.variants import COL2IM_WIDTHS, INDEX_BITS, WIDTHS
from gpu_cases import (
    CASES,
    DTYPES,
    RAGGED,
    SEEDS,
    Problem,
    fits,
    metal_kernels,
    needs_a_compiler,
    problem_of,
)
from metal.problem import assert_near
from mlx_deform import _ext

pytestmark = needs_a_compiler

# More pixels, columns and outputs than a tile has, none of them a multiple of it.
TILES = RAGGED.but(N=3, H=13, W=11, stride=(1, 1), C=32, O=136, G=2, DG=1)
# Outputs and columns of a group in vectors of 4.
VECTORS = RAGGED.but(C=24, O=40, G=2, DG=1)
SMALL_GROUPS = {
    "depthwise": (RAGGED.but(C=16, O=16, G=16, DG=2), {}),
    "depthwise, inner chunk, no mask": (
        RAGGED.but(C=16, O=16, G=16, DG=4, has_mask=False),
        {"begin": 11, "end": 38},
    ),
    "three outputs a channel": (RAGGED.but(C=8, O=24, G=8, DG=1), {"begin": 5}),
    "odd depthwise": (RAGGED.but(C=7, O=14, G=7, DG=7), {}),
    "groups of 8 to 12": (RAGGED.but(C=24, O=36, G=3, DG=1), {"end": 40}),
    "groups of 16 to 2": (RAGGED.but(C=32, O=4, G=2, DG=2), {}),
    "groups of 3 to 5": (RAGGED.but(C=9, O=15, G=3, DG=1, has_mask=False), {}),
}


def small_groups(case, dtype, seed=2):
    config, chunk = SMALL_GROUPS[case]
    problem = Problem(config, dtype, seed, **chunk)
    assert _ext._is_direct(problem.fields)
    return problem


# ---- products of columns


def product_widths(problem):
    """The vectors that a plan allows."""
    c = problem.config
    sizes = (problem.taps * c.C // c.G, c.O // c.G)
    return (1, 4) if all(size % 4 == 0 for size in sizes) else (1,)


def check_products(problem, kernels, seed=0, **options):
    columns = problem.rounded("columns")
    got = problem.column_product(kernels, seed, **options)
    assert_near(got, problem.expected_column_product(), problem.dtype)
    for has_bias in (False, True):
        got = problem.output(kernels, "output_product", seed, has_bias=has_bias, **options)
        assert_near(got, problem.expected_output(columns, has_bias), problem.dtype)
    for deterministic in (False, True):
        got = problem.weight_gradient(
            kernels, "weight_product", seed, deterministic=deterministic, **options
        )
        assert_near(got, problem.expected_weight_gradient(columns))


@pytest.mark.parametrize("case", CASES)
def test_products(types, case):
    problem, kernels = problem_of(case, types[0]), metal_kernels(*types)
    for width in product_widths(problem):
        for seed in SEEDS:
            check_products(problem, kernels, seed, index_bits=types[1], vector_width=width)


def test_products_by_vectors(types):
    problem = Problem(VECTORS, types[0], seed=3, begin=4)
    assert product_widths(problem) == (1, 4)
    for width in (1, 4):
        check_products(problem, metal_kernels(*types), 2, index_bits=types[1], vector_width=width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"max_threads": 64}, {"max_threads": 32}, {"max_threads": 100}], ids=str
)
def test_products_of_several_tiles(dtype, options):
    """Also in groups with fewer threads than a tile wants."""
    problem = Problem(TILES, dtype, seed=6, begin=5)
    assert problem.plan("output_product")["vector_width"] == 4
    check_products(problem, metal_kernels(dtype, 32), 1, **options)


def test_the_weights_gradient_shares_a_deep_sum():
    """Few tiles and many pixels: several threadgroups a tile, unless the order is to be fixed."""
    problem = Problem(RAGGED.but(N=5, H=19, W=23, stride=(1, 1), C=8, O=12, G=1, DG=1), seed=7)
    assert problem.plan("weight_product")["constants"]["depth_splits"] == 4
    fixed = problem.plan("weight_product", deterministic=True)
    assert fixed["constants"]["depth_splits"] == 1
    kernels = metal_kernels("float32", 32)
    check_products(problem, kernels)
    first = problem.weight_gradient(kernels, "weight_product", 0, deterministic=True)
    for seed in SEEDS:
        again = problem.weight_gradient(kernels, "weight_product", seed, deterministic=True)
        np.testing.assert_array_equal(again, first)


def test_half_products_are_summed_in_float32():
    """A sum whose partial sums neither float16 could hold."""
    config = RAGGED.but(N=1, H=9, W=11, stride=(1, 1), C=64, O=8, G=1, DG=1)
    problem, kernels = Problem(config, "float16", seed=1), metal_kernels("float16", 32)
    problem.columns = np.full(problem.columns.shape, 200.0)
    problem.cotangent = np.full(problem.cotangent.shape, 100.0)
    want = problem.expected_weight_gradient(problem.columns)
    assert want.min() > 65504
    assert_near(problem.weight_gradient(kernels, "weight_product"), want)


# ---- without columns


@pytest.mark.parametrize("case", SMALL_GROUPS)
def test_small_groups(types, case):
    dtype, index_bits = types
    problem, kernels = small_groups(case, dtype), metal_kernels(*types)
    columns = problem.expected_columns()
    config = problem.config
    depthwise = config.C == config.G
    for width in WIDTHS[dtype]:
        if not (fits(problem, width) or (depthwise and config.C // config.DG % width == 0)):
            continue
        options = {"index_bits": index_bits, "vector_width": width}
        for seed in SEEDS:
            for has_bias in (False, True):
                got = problem.output(kernels, "direct_output", seed, has_bias=has_bias, **options)
                assert_near(got, problem.expected_output(columns, has_bias), dtype)
            for deterministic in (False, True):
                got = problem.weight_gradient(
                    kernels, "direct_weight", seed, deterministic=deterministic, **options
                )
                assert_near(got, problem.expected_weight_gradient(columns))


@pytest.mark.parametrize("case", SMALL_GROUPS)
def test_gradients_of_samples_of_small_groups(types, case):
    """col2im and offset_grad make the columns' cotangent themselves."""
    dtype, index_bits = types
    problem, kernels = small_groups(case, dtype), metal_kernels(*types)
    has_mask = problem.config.has_mask
    want_input, want_offset, want_mask = problem.expected_gradients(
        problem.expected_column_product()
    )
    options = {"index_bits": index_bits, "direct": True}
    for seed in SEEDS:
        for deterministic in (False, True):
            got = problem.col2im(kernels, seed, deterministic=deterministic, **options)
            assert_near(got, want_input)
        got_offset, got_mask = problem.offset_grad(kernels, seed, wants_mask=has_mask, **options)
        assert_near(got_offset, want_offset)
        if has_mask:
            assert_near(got_mask, want_mask)


def test_small_groups_share_a_deep_sum():
    config = RAGGED.but(N=5, H=19, W=23, stride=(1, 1), C=8, O=8, G=8, DG=1)
    problem, kernels = Problem(config, seed=7), metal_kernels("float32", 32)
    plan = problem.plan("direct_weight")
    assert 64 <= plan["constants"]["pixels_per_thread"] < problem.pixels
    want = problem.expected_weight_gradient(problem.expected_columns())
    assert_near(problem.weight_gradient(kernels, "direct_weight"), want)
    first = problem.weight_gradient(kernels, "direct_weight", 0, deterministic=True)
    for seed in SEEDS:
        again = problem.weight_gradient(kernels, "direct_weight", seed, deterministic=True)
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates_beyond_every_bound_without_columns(dtype):
    problem, kernels = small_groups("depthwise", dtype, seed=3), metal_kernels(dtype, 32)
    rng = np.random.default_rng(4)
    special = [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 1e9]
    chosen = rng.random(problem.offset.shape) < 0.02
    problem.offset[chosen] = rng.choice(special, chosen.sum())
    columns = problem.expected_columns()
    want = problem.expected_output(columns)
    assert np.isnan(want).any()
    assert np.isfinite(want).any()
    assert_near(problem.output(kernels, "direct_output"), want, dtype)


# ---- plans


def test_the_cases_run_every_metal_kernel():
    """Names as the sources instantiate them, against those that the tests ask for."""
    for dtype in DTYPES:
        for index_bits in INDEX_BITS:
            asked = set()
            bits = {"index_bits": index_bits}

            def add(problem, op, asked=asked, bits=bits, **options):
                asked.add(problem.plan(op, **bits, **options)["kernel"])

            asked.add(_ext._dispatch_plan("zero_fill", {"size": 1}, dtype, **bits)["kernel"])
            for case in CASES:
                problem = problem_of(case, dtype)
                add(problem, "col2im", deterministic=True)
                for width in COL2IM_WIDTHS[index_bits]:
                    add(problem, "col2im", vector_width=width)
                for width in WIDTHS[dtype]:
                    if fits(problem, width):
                        add(problem, "im2col", vector_width=width)
                        add(problem, "offset_grad", wants_mask=False, vector_width=width)
            for width in (1, 4):
                for op in ("output_product", "column_product", "weight_product"):
                    add(Problem(VECTORS, dtype), op, vector_width=width)
            for case in SMALL_GROUPS:
                problem = small_groups(case, dtype)
                for width in WIDTHS[dtype]:
                    if problem.config.C // problem.config.DG % width == 0 and (
                        fits(problem, width) or problem.config.C == problem.config.G
                    ):
                        add(problem, "direct_output", vector_width=width)
                        add(problem, "direct_weight", vector_width=width)
            kernels = metal_kernels(dtype, index_bits).numbers
            assert asked == {name for name in kernels if not name.startswith("msda_")}


@pytest.mark.parametrize(
    ("sizes", "direct"),
    [
        ({"C": 256, "O": 256, "G": 256, "DG": 1}, True),
        ({"C": 32, "O": 32, "G": 2, "DG": 1}, True),
        ({"C": 34, "O": 32, "G": 2, "DG": 1}, False),
        ({"C": 32, "O": 34, "G": 2, "DG": 1}, False),
        ({"C": 1, "O": 1, "G": 1, "DG": 1}, False),
    ],
)
def test_which_weight_groups_are_small(sizes, direct):
    assert _ext._is_direct(Problem(RAGGED.but(**sizes)).fields) == direct
