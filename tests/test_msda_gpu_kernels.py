"""Multi-scale deformable attention's Metal and CUDA kernels, run on the CPU.

As tests/test_gpu_kernels.py: every kernel of every library (data type x index width), from
the dispatch plans, in three scheduling orders, against a float64 reference.
"""

import mmap
from functools import cache

import numpy as np
import pytest

import metal
from cuda_kernels import CudaKernels, msda_variants
from cuda_kernels.variants import INDEX_BITS, WIDTHS
from metal.msda_problem import MsdaConfig, MsdaProblem
from metal.problem import DTYPES, assert_near
from mlx_deform import _ext

pytestmark = pytest.mark.skipif(
    metal.compiler_command() is None, reason="needs ziglang, clang++-22 or MSL_CXX"
)

SEEDS = (0, 1, 2)  # of the scheduling order

RAGGED = MsdaConfig()
CASES = {
    "ragged": (RAGGED, {}),
    "ragged, inner rows": (RAGGED, {"begin": 3, "end": 12}),
    "discrete": (RAGGED.but(is_discrete=True), {}),
    "discrete, inner rows": (RAGGED.but(is_discrete=True, D=5), {"begin": 8}),
    "one level": (RAGGED.but(shapes=((6, 5),), points=(4,), N=1, M=2, D=8), {}),
    "one head": (RAGGED.but(M=1, D=24), {"end": 10}),
    "levels without samples": (RAGGED.but(points=(0, 4, 0), D=4), {}),
    "maps of one pixel, one row, one column": (
        RAGGED.but(shapes=((1, 1), (1, 7), (4, 1)), D=4),
        {},
    ),
    # No vector fits; lanes without work.
    "one channel": (RAGGED.but(D=1), {}),
    "33 channels": (RAGGED.but(D=33, N=1), {}),
    # 40 vectors of 4: more than a SIMD group has lanes.
    "160 channels": (RAGGED.but(D=160, N=1, Q=5, M=2), {}),
}


@cache
def metal_kernels(dtype, index_bits):
    return metal.load(_ext._metal_source(dtype, index_bits))


@cache
def cuda_kernels():
    return CudaKernels([pair for pairs in msda_variants.kernels().values() for pair in pairs])


@pytest.fixture(params=["metal", "cuda"])
def kernels_of(request):
    """The kernels of a language, by data type and index width."""
    if request.param == "metal":
        return metal_kernels
    return lambda dtype, index_bits: cuda_kernels()


@cache
def problem_of(case, dtype):
    config, rows = CASES[case]
    return MsdaProblem(config, dtype, seed=len(case), **rows)


@cache
def expected_of(case, dtype):
    return problem_of(case, dtype).expected()


@cache
def gradients_of(case, dtype):
    return problem_of(case, dtype).expected_gradients()


def widths_of(problem):
    return [width for width in WIDTHS[problem.dtype] if problem.config.D % width == 0]


@pytest.fixture(
    params=[(d, b) for d in DTYPES for b in INDEX_BITS], ids=lambda p: f"{p[0]}-i{p[1]}"
)
def types(request):
    """A data type and an index width."""
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_forward(kernels_of, types, case):
    dtype, index_bits = types
    problem, kernels = problem_of(case, dtype), kernels_of(*types)
    want = expected_of(case, dtype)
    for width in widths_of(problem):
        for seed in SEEDS:
            got = problem.forward(kernels, seed, vector_width=width, index_bits=index_bits)
            assert_near(got, want, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_grad_value(kernels_of, types, case, deterministic):
    dtype, index_bits = types
    problem, kernels = problem_of(case, dtype), kernels_of(*types)
    want = gradients_of(case, dtype).value
    options = {"deterministic": deterministic, "index_bits": index_bits}
    for rows in (1,) if deterministic else (1, 2, 16):
        for seed in SEEDS:
            got = problem.grad_of_value(kernels, seed, rows_per_thread=rows, **options)
            assert_near(got, want)


@pytest.mark.parametrize("case", CASES)
def test_grad_samples(kernels_of, types, case):
    dtype, index_bits = types
    problem, kernels = problem_of(case, dtype), kernels_of(*types)
    want = gradients_of(case, dtype)
    for width in widths_of(problem):
        for seed in SEEDS:
            got_locations, got_weights = problem.grads_of_samples(
                kernels, seed, vector_width=width, index_bits=index_bits
            )
            assert_near(got_locations, want.locations)
            assert_near(got_weights, want.weights)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("constant int* levels", "device int* levels"),
        ("const device float* locations", "const float* locations"),
        ("device float* grad_weights", "threadgroup float* grad_weights"),
        ("device T* out [[buffer(4)]]", "const device T* out [[buffer(4)]]"),
    ],
)
def test_address_spaces_are_checked(line, broken):
    """tests/test_metal_strict.py has the whole source pass; here it does not."""
    source = _ext._metal_source("float16", 64)
    before, own = source.split("// ---- metal/multi_scale_deformable_attention", 1)
    assert line in own
    with pytest.raises(metal.MslError):
        metal.check(before + "// " + own.replace(line, broken))


def test_the_cases_run_every_metal_kernel():
    """Names as the sources instantiate them, against those that the tests above ask for."""
    for dtype in DTYPES:
        for index_bits in INDEX_BITS:
            asked = set()
            for case in CASES:
                problem = problem_of(case, dtype)
                for width in widths_of(problem):
                    for op in ("forward", "grad_samples"):
                        plan = problem.plan(op, vector_width=width, index_bits=index_bits)
                        asked.add(plan["kernel"])
                for deterministic in (False, True):
                    plan = problem.plan(
                        "grad_value", deterministic=deterministic, index_bits=index_bits
                    )
                    asked.add(plan["kernel"])
            there = metal_kernels(dtype, index_bits).numbers
            assert asked == {name for name in there if name.startswith("msda_")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_takes_the_widest_vector_that_fits(dtype):
    widest = max(WIDTHS[dtype])
    itemsize = 4 if dtype == "float32" else 2
    for op in ("forward", "grad_samples"):
        assert problem_of("ragged", dtype).plan(op)["vector_width"] == widest
        assert problem_of("33 channels", dtype).plan(op)["vector_width"] == 1
        # An array that starts at an odd element.
        plan = problem_of("ragged", dtype).plan(op, alignment=itemsize)
        assert plan["vector_width"] == 1
        with pytest.raises(ValueError, match="vector width must"):
            problem_of("33 channels", dtype).plan(op, vector_width=4)


@pytest.mark.parametrize("max_threads", [32, 100, 128])
def test_smaller_threadgroups_give_the_same(kernels_of, max_threads):
    """A pipeline that needs many registers allows fewer threads than the plan's group."""
    problem, kernels = problem_of("ragged", "float16"), kernels_of("float16", 32)
    options = {"max_threads": max_threads}
    for op in ("forward", "grad_value", "grad_samples"):
        assert np.prod(problem.plan(op, **options)["group"]) <= max_threads
    np.testing.assert_array_equal(problem.forward(kernels, **options), problem.forward(kernels))
    for got, want in zip(
        problem.grads_of_samples(kernels, **options),
        problem.grads_of_samples(kernels),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        problem.grad_of_value(kernels, deterministic=True, **options),
        problem.grad_of_value(kernels, deterministic=True),
    )
    assert_near(problem.grad_of_value(kernels, **options), gradients_of("ragged", "float16").value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordered_grad_value_is_bitwise_the_same_in_every_order(kernels_of, dtype):
    problem, kernels = problem_of("ragged", dtype), kernels_of(dtype, 32)
    first = problem.grad_of_value(kernels, 0, deterministic=True)
    scattered = problem.grad_of_value(kernels, 0)
    differs = False
    for seed in (1, 2, 3, 4):
        np.testing.assert_array_equal(
            problem.grad_of_value(kernels, seed, deterministic=True), first
        )
        differs |= not np.array_equal(problem.grad_of_value(kernels, seed), scattered)
    assert differs, "the orders must tell a sum that depends on them"


@pytest.mark.parametrize("is_discrete", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_grad_value_of_neighbouring_cells(kernels_of, rows, is_discrete):
    """Queries that walk over a map, as an encoder's: the same cell, the next one, a new row.

    With samples in between that lie outside or nowhere, and images that follow one another.
    """
    W, H = 8, 4
    # One level: the cells of row H - 1 of an image and of row -1 of the next share an index.
    config = MsdaConfig(N=3, Q=42, M=2, D=4, shapes=((H, W),), points=(3,), is_discrete=is_discrete)
    problem = MsdaProblem(config, seed=8)
    steps = np.array([0.37, 0.5, 1.0])  # pixels from query to query
    x = np.arange(config.Q)[:, None] * steps
    at = np.stack([x % (W + 2) - 1.2, x // (W + 2) % (H + 1) - 0.7], -1)  # (Q, K, 2)
    problem.locations[...] = ((at + 0.5) / np.array([W, H]))[None, :, None]
    nowhere = np.random.default_rng(9).random(problem.locations.shape[:-1])
    problem.locations[nowhere < 0.1] = np.nan
    problem.locations[(nowhere > 0.1) & (nowhere < 0.2)] = -4
    # From image to image, the same cell; and once more, behind a sample beyond the map.
    problem.locations[0, -1] = problem.locations[1, 0] = problem.locations[0, 2]
    problem.locations[1, -1] = problem.locations[2, 1] = problem.locations[0, 2]
    problem.locations[2, 0] = -4
    want = problem.expected_gradients().value
    assert_near(problem.grad_of_value(kernels_of("float32", 32), rows_per_thread=rows), want)


def test_rows_of_a_thread_follow_the_sizes():
    problem = MsdaProblem(RAGGED)

    def rows(**fields):
        fields = {**problem.fields, **fields}
        return _ext._msda_plan("grad_value", fields, problem.levels)["constants"]["rows_per_thread"]

    assert rows() == 1
    decoder = {"N": 1, "Q": 300, "M": 8, "D": 32, "query_end": 300}
    assert rows(**decoder) == 1
    assert rows(**{**decoder, "Q": 22223, "query_end": 22223}) == 16
    for wrong in (-1, 3, 32):
        with pytest.raises(ValueError, match="rows_per_thread must be a power of two up to 16"):
            problem.plan("grad_value", rows_per_thread=wrong)


def test_pieces_add_up(kernels_of):
    """One piece after another, into the same memory, as the ops' chain of pieces does."""
    problem, kernels = MsdaProblem(RAGGED, seed=7), kernels_of("float32", 32)
    want, gradients = problem.expected(), problem.expected_gradients()
    out = {**problem.unwritten(), "grad_value": problem.grad_value}
    for begin, end in ((0, 5), (5, 6), (6, 6), (6, 14)):
        piece = MsdaProblem(RAGGED, seed=7, begin=begin, end=end)
        piece.grad_value = out["grad_value"]
        out["grad_value"] = piece.grad_of_value(kernels, deterministic=True)
        rows = slice(begin, end)
        locations, weights = piece.grads_of_samples(kernels)
        for name, got in (
            ("out", piece.forward(kernels)),
            ("grad_locations", locations),
            ("grad_weights", weights),
        ):
            flat = (problem.rows, *got.shape[2:])
            out[name].reshape(flat)[rows] = got.reshape(flat)[rows]
    assert_near(out["out"], want)
    assert_near(out["grad_value"], gradients.value)
    assert_near(out["grad_locations"], gradients.locations)
    assert_near(out["grad_weights"], gradients.weights)


def test_grad_samples_wraps_long_grids(kernels_of):
    problem, kernels = problem_of("160 channels", "float32"), kernels_of("float32", 32)
    plan = problem.plan("grad_samples", groups_per_row=2)
    assert plan["grid"][1] > 1
    for got, want in zip(
        problem.grads_of_samples(kernels, groups_per_row=2),
        problem.grads_of_samples(kernels),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("wanted", ["locations", "weights"])
def test_either_gradient_alone(kernels_of, wanted):
    problem, kernels = problem_of("ragged", "float32"), kernels_of("float32", 32)
    names = ("locations", "weights")
    both = dict(zip(names, problem.grads_of_samples(kernels), strict=True))
    wants = {f"wants_{name}": name == wanted for name in names}
    alone = dict(zip(names, problem.grads_of_samples(kernels, **wants), strict=True))
    np.testing.assert_array_equal(alone.pop(wanted), both[wanted])
    (other,) = alone.values()
    assert np.isnan(other).all(), "what was not asked for stays unwritten"


@pytest.mark.parametrize("is_discrete", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_locations_beyond_every_bound(kernels_of, dtype, is_discrete):
    """NaN, infinite and huge locations, on either axis; borders; pixels' centres."""
    config = RAGGED.but(is_discrete=is_discrete, Q=9, shapes=((4, 8), (2, 16), (1, 2)))
    problem, kernels = MsdaProblem(config, dtype, seed=3), kernels_of(dtype, 32)
    rng = np.random.default_rng(4)
    special = [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, -3e38, 2.0**31, -(2.0**31), 1e9]
    # Sizes are powers of two, so these are exact: borders, and integer coordinates.
    exact = [0.0, 1.0, -0.25, 1.25, -0.125, 0.125, 0.375, 0.5, 0.625, 0.75]
    chosen = rng.random(problem.locations.shape)
    problem.locations = np.where(
        chosen < 0.1,
        rng.choice(special, chosen.shape),
        np.where(chosen < 0.5, rng.choice(exact, chosen.shape), problem.locations),
    )
    want, gradients = problem.expected(), problem.expected_gradients()
    for array in (want, gradients.weights):
        assert np.isnan(array).any()
        assert np.isfinite(array).any()
    assert_near(problem.forward(kernels), want, dtype)
    for deterministic in (False, True):
        got = problem.grad_of_value(kernels, deterministic=deterministic)
        assert_near(got, gradients.value)
    got_locations, got_weights = problem.grads_of_samples(kernels)
    assert_near(got_locations, gradients.locations)
    assert_near(got_weights, gradients.weights)
    if is_discrete:
        assert not got_locations.any()


@pytest.mark.parametrize("pixel", [np.inf, -np.inf, np.nan])
def test_pixels_of_other_levels_and_heads_do_not_leak(kernels_of, pixel):
    """A corner outside the map is not read: 0 times what lies there would be NaN."""
    config = RAGGED.but(D=8, points=(0, 6, 0))
    problem, kernels = MsdaProblem(config, seed=5), kernels_of("float32", 32)
    _, (_, _, start, _), (_, _, end, _) = config.levels
    problem.value[:, :start] = pixel
    problem.value[:, end:] = pixel
    got = problem.forward(kernels)
    assert_near(got, problem.expected())
    assert np.isfinite(got).all()
    got_locations, got_weights = problem.grads_of_samples(kernels)
    assert np.isfinite(got_locations).all()
    assert np.isfinite(got_weights).all()


def test_nothing_to_do(kernels_of):
    kernels = kernels_of("float32", 32)
    for changes in ({"N": 0}, {"Q": 0}, {"D": 0}):
        problem = MsdaProblem(RAGGED.but(**changes))
        for op in ("forward", "grad_value"):
            assert problem.plan(op)["empty"]
        assert problem.forward(kernels).size == 0
    chunk = MsdaProblem(RAGGED, begin=5, end=5)
    assert chunk.plan("grad_value", deterministic=True)["empty"]
    np.testing.assert_array_equal(chunk.grad_of_value(kernels), chunk.stored("grad_value"))
    # Without a channel, the samples' gradients are zeros; without a sample, the output is.
    for got in MsdaProblem(RAGGED.but(D=0)).grads_of_samples(kernels):
        assert not got.any()
    without = MsdaProblem(RAGGED.but(points=(0, 0, 0)))
    assert not without.forward(kernels).any()
    for op in ("grad_value", "grad_samples"):
        assert without.plan(op)["empty"]
    assert without.plan("grad_value", deterministic=True)["empty"]


def test_arrays_of_more_than_two_to_the_31_elements(kernels_of):
    """A pixel at the far end of a map whose memory is mostly never touched."""
    H, W, D = 40000, 30000, 2
    config = MsdaConfig(N=1, Q=1, M=1, D=D, shapes=((1, 1), (H, W)), points=(0, 1))
    assert config.S * D > 2**31
    problem = MsdaProblem(config.but(shapes=((1, 1), (1, 1))), "float16")
    problem.config = config
    # A quarter of the way down, half of the way right, between the last four pixels.
    problem.locations = np.array([(W - 1.0) / W, (H - 1.25) / H]).reshape(1, 1, 1, 1, 2)
    problem.weights[:] = 1
    plan = problem.plan("forward")
    assert plan["index_bits"] == 64
    with pytest.raises(ValueError, match="32-bit"):
        problem.plan("forward", index_bits=32)

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, config.S * D * 2, flags=flags)
    value = np.frombuffer(memory, np.float16)
    pixels = value[D:].reshape(H, W, D)
    pixels[-2:, -2:] = np.arange(8).reshape(2, 2, 2)
    out = np.full((1, 1, 1, D), np.nan, np.float16)
    kernels_of("float16", 64).run(
        plan,
        {
            "value": value,
            **{name: problem.stored(name) for name in ("locations", "weights", "levels")},
            "out": out,
            "params": _ext._msda_params_bytes(problem.fields),
        },
    )
    np.testing.assert_allclose(out.ravel(), [2, 3], rtol=0, atol=0.02)


# ---- what plans refuse


def test_sizes_are_checked():
    problem = MsdaProblem(RAGGED)

    def plan(levels=None, **fields):
        return _ext._msda_plan("forward", {**problem.fields, **fields}, levels or problem.levels)

    plan()
    for fields, complaint in (
        ({"Q": -1}, "Q must not be negative; got -1"),
        ({"M": 0}, "M must be at least 1; got 0"),
        ({"M": 2**16, "D": 2**16}, r"M \* D must be below 2\^31; got 4294967296"),
        ({"query_end": 15}, r"rows must lie in \[0, 14\]; got \[0, 15\)"),
        ({"query_begin": 9, "query_end": 8}, "rows must lie in"),
        ({"S": 70}, "levels must have S = 70 pixels; got 69"),
        ({"L": 2}, "there must be L = 2 levels; got 3"),
        ({"K": 2}, r"first sample in \[0, 2\]; got 3"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan(**fields)
    for level, changed, complaint in (
        (0, (-5, 9, 0, 0), "must not be negative; got -5 and 9"),
        (0, (5, 9, 0, 1), r"first sample in \[0, 0\]; got 1"),
        (1, (3, 4, 44, 3), "must start at pixel 45; got 44"),
        (2, (2, 6, 57, 2), r"first sample in \[3, 6\]; got 2"),
    ):
        levels = list(problem.levels)
        levels[level] = changed
        with pytest.raises(ValueError, match=complaint):
            plan(levels)
    with pytest.raises(ValueError, match="dtype must be"):
        _ext._msda_plan("forward", problem.fields, problem.levels, "float64")
    with pytest.raises(ValueError, match="op must be"):
        _ext._msda_plan("backward", problem.fields, problem.levels)
    with pytest.raises(ValueError, match="single channels; got a vector width of 4"):
        _ext._msda_plan("grad_value", problem.fields, problem.levels, vector_width=4)
    with pytest.raises(ValueError, match="fewer than 2\\^31 threads"):
        plan(N=2**20, Q=2**12, query_end=2**32)


def test_pieces_cover_the_rows(monkeypatch):
    problem = MsdaProblem(RAGGED)
    whole = [(0, problem.rows)]
    pieces = {"output": True, "grad_value": True, "grad_samples": True}
    assert _ext._msda_pieces(problem.fields, problem.levels, **pieces) == whole
    operations = _ext._msda_operations(problem.fields, problem.levels, **pieces)
    monkeypatch.setenv("MLX_DEFORM_PIECE_GFLOP", str(operations / 4.5e9))
    cut = _ext._msda_pieces(problem.fields, problem.levels, **pieces)
    assert len(cut) == 5
    assert [begin for begin, _ in cut] == [0] + [end for _, end in cut[:-1]]
    assert cut[-1][1] == problem.rows
    assert all(begin < end for begin, end in cut)
    monkeypatch.setenv("MLX_DEFORM_PIECE_GFLOP", "1e-9")
    assert len(_ext._msda_pieces(problem.fields, problem.levels, **pieces)) == problem.rows


def test_ordered_sums_cost_more_on_taller_maps():
    """Their kernel looks at every sample from each row of a map; the scatter does not."""

    def operations(config, deterministic):
        problem = MsdaProblem(config)
        return _ext._msda_operations(
            problem.fields, problem.levels, grad_value=True, deterministic=deterministic
        )

    tall = RAGGED.but(shapes=((50, 9), (3, 4), (2, 6)))
    assert operations(tall, True) > 1.1 * operations(RAGGED, True)
    assert operations(tall, False) == operations(RAGGED, False)
