"""The GPU's dispatch plan by itself: chunks, index widths, limits, refusals."""

import numpy as np
import pytest

from cases import Config
from metal.problem import Problem
from mlx_deform import _ext

CONFIG = Config(N=2, H=9, W=7, C=12, G=2, DG=3)
MB = 2**20
OPS = (
    "im2col",
    "col2im",
    "offset_grad",
    "output_product",
    "column_product",
    "weight_product",
    "direct_output",
    "direct_weight",
)
M1_FLOPS = 2.6e12


def fields(**changes):
    return {**Problem(CONFIG).fields, **changes}


def huge(**changes):
    """As large as the struct can say."""
    largest = 2**31 - 1
    out = dict.fromkeys(fields(), 1)
    out.update(N=largest, H=largest, W=largest, C=largest, Ho=largest, Wo=largest, G=1, DG=1)
    out.update(pixel_begin=0, pixel_end=0)
    return {**out, **changes}


# ---- chunks


@pytest.mark.parametrize("budget", [1, 500, 5000, 20000, 10**6])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_cover_every_pixel_once(budget, itemsize):
    chunks = _ext._chunk_plan(fields(), itemsize, budget)
    pixels = CONFIG.N * CONFIG.Ho * CONFIG.Wo
    assert [begin for begin, _ in chunks] == [0, *[end for _, end in chunks[:-1]]]
    assert chunks[-1][1] == pixels
    pixel_bytes = CONFIG.kH * CONFIG.kW * CONFIG.C * itemsize
    sizes = [end - begin for begin, end in chunks]
    assert min(sizes) > 0
    assert max(sizes) * pixel_bytes <= max(budget, pixel_bytes)
    if budget >= CONFIG.Wo * pixel_bytes:
        assert all(size % CONFIG.Wo == 0 for size in sizes)
        assert max(sizes) - min(sizes) <= CONFIG.Wo
    else:
        assert max(sizes) - min(sizes) <= 1


def birefnet(batch=1):
    """Its largest layer, at 1024x1024."""
    pixels = batch * 256 * 256
    sizes = {"N": batch, "H": 256, "W": 256, "C": 64, "O": 256, "kH": 7, "kW": 7}
    sizes.update(Ho=256, Wo=256, G=1, DG=1, pixel_end=pixels)
    return fields(**sizes)


def test_the_default_budget_is_64_mb_in_two_halves(monkeypatch):
    monkeypatch.delenv("MLX_DEFORM_COLUMN_BUDGET_MB", raising=False)
    chunks = _ext._chunk_plan(birefnet(), 4)
    assert len(chunks) == 26  # of 822 MB
    assert max(end - begin for begin, end in chunks) * 49 * 64 * 4 <= 32 * MB
    monkeypatch.setenv("MLX_DEFORM_COLUMN_BUDGET_MB", "411")
    assert len(_ext._chunk_plan(birefnet(), 4)) == 4


def test_columns_that_would_fit_are_cut_too_so_that_sampling_overlaps_products(monkeypatch):
    monkeypatch.delenv("MLX_DEFORM_COLUMN_BUDGET_MB", raising=False)
    sizes = {"N": 1, "H": 64, "W": 64, "Ho": 64, "Wo": 64, "kH": 3, "kW": 3, "G": 1, "DG": 1}
    large = fields(**sizes, C=256, pixel_end=4096)  # 38 MB
    assert [end - begin for begin, end in _ext._chunk_plan(large, 4)] == [1024] * 4
    small = fields(**sizes, C=32, pixel_end=4096)  # 5 MB: a launch would be too short
    assert _ext._chunk_plan(small, 4) == [(0, 4096)]


@pytest.mark.parametrize("value", ["0", "-3", "many", "64MB", "nan", "inf"])
def test_a_budget_that_is_no_size_is_refused(monkeypatch, value):
    monkeypatch.setenv("MLX_DEFORM_COLUMN_BUDGET_MB", value)
    with pytest.raises(ValueError, match=f"MLX_DEFORM_COLUMN_BUDGET_MB .* got {value}"):
        _ext._chunk_plan(fields(), 4)


def test_chunks_of_extreme_sizes():
    assert _ext._chunk_plan(fields(N=0, pixel_end=0), 4) == []
    # No channels: columns take no memory, but a launch still has a limit.
    pixels = 70000**2
    wide = _ext._chunk_plan(fields(N=1, Ho=70000, Wo=70000, C=0, G=1, DG=1, pixel_end=pixels), 4)
    assert wide[-1][1] == pixels
    assert max(end - begin for begin, end in wide) < 2**31
    with pytest.raises(ValueError, match="64 bits"):
        _ext._chunk_plan(huge(), 4)


# ---- pieces: the primitives that share a call's work

FORWARD = {"output": True}
BACKWARD = {"grad_input": True, "grad_samples": True, "grad_weight": True}


@pytest.mark.parametrize("work", [FORWARD, BACKWARD, BACKWARD | {"deterministic": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_no_piece_outlives_a_watchdog(work, batch):
    whole = birefnet(batch)
    pieces = _ext._piece_plan(whole, **work)
    assert [begin for begin, _ in pieces] == [0, *[end for _, end in pieces[:-1]]]
    assert pieces[-1][1] == whole["pixel_end"]
    assert all(begin < end for begin, end in pieces)
    assert all(begin % whole["Wo"] == 0 for begin, _ in pieces)

    def seconds(begin, end):
        chunk = {**whole, "pixel_begin": begin, "pixel_end": end}
        return _ext._operations(chunk, **work) / M1_FLOPS

    longest = max(seconds(*piece) for piece in pieces)
    total = seconds(0, whole["pixel_end"])
    assert longest < 0.5
    assert sum(seconds(*piece) for piece in pieces) == pytest.approx(total)
    if batch == 16:
        assert total > 0.6, "in one piece it would be a danger"
    else:
        assert len(pieces) <= 2, "work that is no danger stays whole"


def test_small_work_is_one_piece():
    assert _ext._piece_plan(fields(), **BACKWARD) == [(0, CONFIG.N * CONFIG.Ho * CONFIG.Wo)]
    assert _ext._piece_plan(fields(N=0, pixel_end=0), **FORWARD) == [(0, 0)]


def test_operations_are_those_of_the_products_and_the_samples():
    p = birefnet()
    samples = 65536 * 49
    product = 2 * samples * 64 * 256
    sampling = samples * 26 + samples * 64 * 9
    assert _ext._operations(p, **FORWARD) == product + sampling
    backward = _ext._operations(p, **BACKWARD)
    assert backward == 2 * product + 2 * sampling + samples * (26 + 64 * 8)


def test_pieces_are_rows_at_the_least_and_the_environment_may_ask_for_more(monkeypatch):
    monkeypatch.setenv("MLX_DEFORM_PIECE_GFLOP", "1e-9")
    rows = CONFIG.N * CONFIG.Ho
    assert len(_ext._piece_plan(fields(), **FORWARD)) == rows
    monkeypatch.setenv("MLX_DEFORM_PIECE_GFLOP", "none")
    with pytest.raises(ValueError, match=r"MLX_DEFORM_PIECE_GFLOP must be .* got none"):
        _ext._piece_plan(fields(), **FORWARD)


# ---- index widths


@pytest.mark.parametrize("op", ["im2col", "col2im", "offset_grad"])
def test_64_bit_positions_from_two_to_the_31_elements_on(op):
    size = {"N": 1, "H": 2**15, "W": 2**15, "G": 1, "DG": 1, "has_mask": 0}
    size.update(pixel_begin=0, pixel_end=1)
    options = {"wants_mask": False}

    def bits(**changes):
        return _ext._dispatch_plan(op, fields(**size, **changes), "float16", **options)[
            "index_bits"
        ]

    assert bits(C=1) == 32
    assert bits(C=2) == 64, "the input"
    assert bits(C=1, Ho=2**14, Wo=2**14) == 64, "the offsets"
    assert bits(C=1, column_tap=2**29) == 64, "the columns"


def test_launches_beyond_the_grid_are_refused():
    with pytest.raises(ValueError, match="smaller chunks"):
        _ext._dispatch_plan(
            "im2col", fields(N=1, Ho=2**16, Wo=2**16, has_mask=0, pixel_end=2**32), "float32"
        )


@pytest.mark.parametrize("op", OPS)
def test_sizes_beyond_64_bits_are_refused(op):
    with pytest.raises(ValueError, match="64 bits"):
        _ext._dispatch_plan(op, huge(), "float32")


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"H": -1}, "H must not be negative; got -1"),
        ({"kW": 0}, "kW must be at least 1; got 0"),
        ({"G": 0}, "G must be at least 1; got 0"),
        ({"DG": 5}, "must divide C; got C 12, G 2, DG 5"),
        ({"pixel_begin": -1}, r"must lie in \[0, "),
        ({"pixel_begin": 9, "pixel_end": 8}, r"got \[9, 8\)"),
        ({"pixel_end": 10**6}, "got .0, 1000000"),
        ({"column_tap": -4}, "column_tap must not be negative"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_sizes_that_make_no_sense_are_refused(op, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        _ext._dispatch_plan(op, fields(**changes), "float32")


def test_options_that_make_no_sense_are_refused():
    plan = _ext._dispatch_plan
    with pytest.raises(ValueError, match=r"dtype must be .* got float64"):
        plan("im2col", fields(), "float64")
    with pytest.raises(ValueError, match="op must be"):
        plan("im2row", fields())
    with pytest.raises(ValueError, match="without a mask"):
        plan("offset_grad", fields(has_mask=0))
    with pytest.raises(ValueError, match="index_bits must be"):
        plan("im2col", fields(), index_bits=16)
    with pytest.raises(ValueError, match="size must not be negative"):
        plan("zero_fill", {"size": -1})
    for op in OPS[3:]:
        with pytest.raises(ValueError, match="G must divide O; got O 9, G 2"):
            plan(op, fields(O=9))
    with pytest.raises(ValueError, match="columns of a product must lie"):
        plan("output_product", fields(column_pixel=7))
    with pytest.raises(ValueError, match="col2im takes 1, 2 or"):
        plan("col2im", fields(), vector_width=8)


@pytest.mark.parametrize("op", OPS)
def test_the_environment_forces_64_bit_positions(monkeypatch, op):
    """So that a test at small sizes has Apple's compiler build those libraries too."""
    assert _ext._dispatch_plan(op, fields(), "float16")["index_bits"] == 32
    monkeypatch.setenv("MLX_DEFORM_INDEX_BITS", "64")
    plan = _ext._dispatch_plan(op, fields(), "float16")
    assert plan["index_bits"] == 64
    assert "_i64_" in plan["kernel"]
    monkeypatch.setenv("MLX_DEFORM_INDEX_BITS", "16")
    with pytest.raises(ValueError, match="MLX_DEFORM_INDEX_BITS must be 32 or 64; got 16"):
        _ext._dispatch_plan(op, fields(), "float16")


# ---- the shape of a launch


@pytest.mark.parametrize("channels", [1, 3, 4, 31, 64, 100, 256, 300, 2048])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_launch_covers_its_work_and_fits_a_gpu(dtype, channels):
    problem = Problem(CONFIG.but(C=channels * 2, G=1, DG=2), dtype)
    for op, options in [
        ("im2col", {}),
        ("col2im", {}),
        ("col2im", {"deterministic": True}),
        ("offset_grad", {}),
    ]:
        plan = problem.plan(op, **options)
        assert np.prod(plan["group"]) <= 256
        assert all(0 < threads < 2**31 for threads in plan["grid"])
        assert all(
            1 <= group <= grid for group, grid in zip(plan["group"], plan["grid"], strict=True)
        )
        if op in ("im2col", "col2im") and not options:
            walk = plan["constants"].get("pixels_per_thread", 1)
            assert plan["grid"][1:] == (problem.taps * 2, -(-problem.pixels // walk))
            assert plan["grid"][0] * plan["vector_width"] >= min(channels, 32)
        else:
            # Whole SIMD groups, also when the group shrinks.
            assert plan["group"][0] % 32 == 0
            assert plan["grid"][0] % plan["group"][0] == 0


def test_the_ordered_scatter_covers_every_row_and_channel():
    problem = Problem(CONFIG.but(C=132, G=1, DG=3))
    plan = problem.plan("col2im", deterministic=True)
    simd_groups = plan["grid"][0] // 32
    assert simd_groups >= 3 * 2  # 44 channels of a group take two SIMD groups
    assert plan["grid"][1] == CONFIG.N * CONFIG.H


def test_zero_fill_covers_large_arrays_in_one_launch():
    plan = _ext._dispatch_plan("zero_fill", {"size": 2**40})
    assert 0 < plan["grid"][0] < 2**31
    assert _ext._dispatch_plan("zero_fill", {"size": 0})["empty"]
