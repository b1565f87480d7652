"""The kernels that sample, in Metal and CUDA, run on the CPU from the dispatch plans, against
the oracle. The products of Metal: test_metal_products.py.
"""

import mmap

import numpy as np
import pytest

import metal
from cases import Config
from cuda_kernels.variants import COL2IM_WIDTHS, WIDTHS
from gpu_cases import (
    CASES,
    DTYPES,
    RAGGED,
    SEEDS,
    Problem,
    fits,
    gradients_of,
    metal_kernels,
    needs_a_compiler,
    problem_of,
)
from metal.problem import assert_near
from mlx_deform import _ext

pytestmark = needs_a_compiler


@pytest.mark.parametrize("case", CASES)
def test_im2col(kernels_of, types, case):
    dtype, index_bits = types
    kernels = kernels_of(*types)
    problem = problem_of(case, dtype)
    want = problem.expected_columns()
    for width in WIDTHS[dtype]:
        if fits(problem, width):
            for seed in SEEDS:
                got = problem.im2col(kernels, seed, vector_width=width, index_bits=index_bits)
                assert_near(got, want, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_col2im(kernels_of, types, case, deterministic):
    dtype, index_bits = types
    kernels = kernels_of(*types)
    problem = problem_of(case, dtype)
    want = gradients_of(case, dtype)[0]
    for width in (1,) if deterministic else COL2IM_WIDTHS[index_bits]:
        for seed in SEEDS:
            options = {"deterministic": deterministic, "vector_width": width}
            got = problem.col2im(kernels, seed, index_bits=index_bits, **options)
            assert_near(got, want)


@pytest.mark.parametrize("walk", ["zero", "right", "left", "wavy", "down", "rough"])
def test_col2im_carries_shared_corners(kernels_of, walk):
    """Along rows where neighbouring pixels share corners, the same ones, or none."""
    # Enough pixels for walks of several, whose ends lie in the middle of rows.
    config = RAGGED.but(N=3, H=18, W=37, C=70, G=1, DG=1, stride=(1, 1))
    problem, kernels = Problem(config, "float32", seed=8, begin=3), kernels_of("float32", 32)
    assert problem.plan("col2im")["constants"]["pixels_per_thread"] == 4
    rng = np.random.default_rng(9)
    offset = np.zeros((config.N, config.Ho, config.Wo, problem.taps, 2))
    column = np.arange(config.Wo)[:, None]
    if walk == "right":
        offset += (0.25, 0.375)
    elif walk == "left":  # the next pixel's cell lies left of this one's
        offset[..., 1] = -2 * column + 30.625
        offset[..., 0] = 0.5
    elif walk == "wavy":
        offset += np.sin(column / 2)[..., None] + 0.01
    elif walk == "down":
        offset[..., 0] = column
        offset[..., 1] = -column + 7.25
    elif walk == "rough":
        offset += 2 * rng.standard_normal(offset.shape)
    problem.offset = offset.reshape(problem.offset.shape)
    want = problem.expected_gradients()[0]
    for width in COL2IM_WIDTHS[32]:
        assert_near(problem.col2im(kernels, 1, vector_width=width), want)


def test_an_infinite_gradient_stays_with_the_corners_that_have_weight(kernels_of):
    config = RAGGED.but(C=16, G=1, DG=1, has_mask=False)
    problem, kernels = Problem(config, "float32", seed=5), kernels_of("float32", 32)
    problem.offset = np.round(problem.offset)
    problem.grad_columns[::3] = np.inf
    with np.errstate(invalid="ignore"):
        want = problem.expected_gradients()[0]
    finite = np.isfinite(want)
    assert finite.any()
    for deterministic in (False, True):
        got = problem.col2im(kernels, deterministic=deterministic)
        assert np.isfinite(got[finite]).all()
        assert not np.isnan(got).any()


@pytest.mark.parametrize("case", CASES)
def test_offset_grad(kernels_of, types, case):
    dtype, index_bits = types
    kernels = kernels_of(*types)
    problem = problem_of(case, dtype)
    _, want_offset, want_mask = gradients_of(case, dtype)
    has_mask = problem.config.has_mask
    for width in WIDTHS[dtype]:
        if fits(problem, width):
            for seed in SEEDS:
                got_offset, got_mask = problem.offset_grad(
                    kernels, seed, vector_width=width, index_bits=index_bits, wants_mask=has_mask
                )
                assert_near(got_offset, want_offset)
                if has_mask:
                    assert_near(got_mask, want_mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_takes_the_widest_vector_that_fits(dtype):
    widest = max(WIDTHS[dtype])
    assert problem_of("groups", dtype).plan("im2col")["vector_width"] == widest
    assert problem_of("33 channels", dtype).plan("im2col")["vector_width"] == 1
    itemsize = 4 if dtype == "float32" else 2
    # An array that starts at an odd element.
    plan = problem_of("groups", dtype).plan("offset_grad", alignment=itemsize)
    assert plan["vector_width"] == 1
    with pytest.raises(ValueError, match="vector width must"):
        problem_of("33 channels", dtype).plan("im2col", vector_width=4)


@pytest.mark.parametrize("max_threads", [32, 100, 128])
def test_smaller_threadgroups_give_the_same(kernels_of, max_threads):
    """A pipeline that needs many registers allows fewer threads than the plan's group."""
    problem, kernels = problem_of("groups", "float16"), kernels_of("float16", 32)
    options = {"max_threads": max_threads}
    for op in ("im2col", "col2im", "offset_grad"):
        plan = problem.plan(op, **options)
        assert np.prod(plan["group"]) <= max_threads
        assert plan["cuda"]["group"] == plan["group"]
    np.testing.assert_array_equal(problem.im2col(kernels, **options), problem.im2col(kernels))
    for got, want in zip(
        problem.offset_grad(kernels, **options), problem.offset_grad(kernels), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    want = problem.col2im(kernels, deterministic=True)
    got = problem.col2im(kernels, deterministic=True, **options)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordered_col2im_is_bitwise_the_same_in_every_order(kernels_of, dtype):
    problem, kernels = problem_of("groups", dtype), kernels_of(dtype, 32)
    first = problem.col2im(kernels, 0, deterministic=True)
    scattered = problem.col2im(kernels, 0)
    differs = False
    for seed in (1, 2, 3, 4):
        np.testing.assert_array_equal(problem.col2im(kernels, seed, deterministic=True), first)
        differs |= not np.array_equal(problem.col2im(kernels, seed), scattered)
    assert differs, "the orders must tell a sum that depends on them"


def test_offset_grad_wraps_long_grids(kernels_of):
    problem, kernels = problem_of("groups", "float32"), kernels_of("float32", 32)
    plan = problem.plan("offset_grad", groups_per_row=3)
    assert plan["grid"][1] > 2
    for got, want in zip(
        problem.offset_grad(kernels, groups_per_row=3), problem.offset_grad(kernels), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("wants", ["offset", "mask"])
def test_either_gradient_alone(kernels_of, wants):
    problem, kernels = problem_of("groups", "float32"), kernels_of("float32", 32)
    both = dict(zip(("offset", "mask"), problem.offset_grad(kernels), strict=True))
    alone = dict(
        zip(
            ("offset", "mask"),
            problem.offset_grad(
                kernels, wants_offset=wants == "offset", wants_mask=wants == "mask"
            ),
            strict=True,
        )
    )
    np.testing.assert_array_equal(alone.pop(wants), both[wants])
    (other,) = alone.values()
    assert np.isnan(other).all(), "what was not asked for stays unwritten"


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_every_bound(kernels_of, dtype, has_mask):
    """NaN, infinite and huge coordinates, on either axis; borders; integers."""
    config = RAGGED.but(C=16, DG=2, has_mask=has_mask)
    problem, kernels = Problem(config, dtype, seed=3), kernels_of(dtype, 32)
    rng = np.random.default_rng(4)
    special = [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 1e9, 0, 0, 1, -1]
    chosen = rng.random(problem.offset.shape) < 0.5
    problem.offset[chosen] = rng.choice(special, chosen.sum())
    problem.offset = np.where(chosen, problem.offset, np.round(problem.offset))
    assert_near(problem.im2col(kernels), problem.expected_columns(), dtype)
    want_input, want_offset, want_mask = problem.expected_gradients()
    assert np.isnan(want_offset).any()
    assert np.isfinite(want_offset).any()
    for deterministic in (False, True):
        assert_near(problem.col2im(kernels, deterministic=deterministic), want_input)
    got_offset, got_mask = problem.offset_grad(kernels, wants_mask=has_mask)
    assert_near(got_offset, want_offset)
    if has_mask:
        assert_near(got_mask, want_mask)


@pytest.mark.parametrize("pixel", [np.inf, -np.inf, np.nan])
def test_pixels_beside_the_cell_do_not_leak(kernels_of, pixel):
    """A corner outside the image is not read: 0 times a border pixel would be NaN."""
    config = RAGGED.but(C=8, G=1, DG=1)
    problem, kernels = Problem(config, "float32", seed=5), kernels_of("float32", 32)
    problem.input[:, [0, -1]] = pixel
    problem.input[:, :, [0, -1]] = pixel
    want = problem.expected_columns()
    assert np.isfinite(want).any()
    assert not np.isfinite(want).all()
    got = problem.im2col(kernels)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    _, want_offset, want_mask = problem.expected_gradients()
    got_offset, got_mask = problem.offset_grad(kernels)
    np.testing.assert_array_equal(np.isfinite(got_offset), np.isfinite(want_offset))
    np.testing.assert_array_equal(np.isfinite(got_mask), np.isfinite(want_mask))


def test_no_channels_and_no_pixels(kernels_of):
    config = RAGGED.but(N=0)
    problem, kernels = Problem(config), kernels_of("float32", 32)
    for op in ("im2col", "col2im", "offset_grad"):
        assert problem.plan(op)["empty"]
    assert problem.im2col(kernels).size == 0
    chunk = Problem(RAGGED, begin=5, end=5)
    assert chunk.plan("col2im", deterministic=True)["empty"]
    np.testing.assert_array_equal(chunk.col2im(kernels), chunk.stored("grad_input"))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 257, 5000])
def test_zero_fill(size):
    out = np.full(size, np.nan, np.float32)
    plan = _ext._dispatch_plan("zero_fill", {"size": size})
    with metal.guarded(out) as (copy,):
        metal_kernels("float32", 32).run(
            plan, {"out": copy, "params": np.int64(size).tobytes()}, seed=1
        )
    np.testing.assert_array_equal(out, np.zeros(size))


def test_arrays_of_more_than_two_to_the_31_elements(kernels_of):
    """A pixel at the far end of an image whose memory is mostly never touched."""
    H, W, C = 40000, 30000, 2
    config = Config(
        N=1,
        H=H,
        W=W,
        C=C,
        kH=1,
        kW=1,
        stride=(H, W),
        padding=(0, 0),
        dilation=(1, 1),
        G=1,
        DG=1,
        has_mask=False,
    )
    assert (config.Ho, config.Wo) == (1, 1)
    assert H * W * C > 2**31
    problem = Problem(config.but(H=1, W=1), "float16")
    problem.config = config
    problem.offset = np.array([H - 1.75, W - 1.5]).reshape(1, 1, 1, 2)
    plan = problem.plan("im2col")
    assert plan["index_bits"] == 64
    assert plan["cuda"]["index"] == "int64"
    with pytest.raises(ValueError, match="32-bit"):
        problem.plan("im2col", index_bits=32)

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, H * W * C * 2, flags=flags)
    image = np.frombuffer(memory, np.float16).reshape(1, H, W, C)
    image[0, -2:, -2:] = np.arange(8).reshape(2, 2, 2)
    columns = np.full((1, 1, 1, C), np.nan, np.float16)
    kernels_of("float16", 64).run(
        plan,
        {
            "input": image,
            "offset": problem.stored("offset"),
            "columns": columns,
            "params": _ext._params_bytes(problem.fields),
        },
    )
    # A quarter of the way down, half of the way right.
    np.testing.assert_array_equal(columns.ravel(), [2, 3])
