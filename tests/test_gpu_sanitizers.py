"""The Metal and CUDA kernels under AddressSanitizer and ThreadSanitizer.

The kernels' own sources are clean; with one line of them broken, the sanitizer that
watches for it complains. Threads of a launch are fibers that ThreadSanitizer takes for
unsynchronised threads, so that races show in whatever order they ran.
"""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metal
from cases import Config
from cuda_kernels import text_of
from cuda_kernels.on_cpu import build_texts
from cuda_kernels.on_cpu import launch as cuda_launch
from metal.problem import Problem
from mlx_deform import _ext
from sanitizers import COMPILER, RUNTIMES, SYMBOLS, runtime

COMPLAINTS = {"address": "AddressSanitizer: heap-", "thread": "data race"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0" + SYMBOLS,
    "TSAN_OPTIONS": "halt_on_error=1" + SYMBOLS,
    "OPENBLAS_NUM_THREADS": "1",
}


pytestmark = pytest.mark.skipif(
    not (runtime("address") and runtime("thread") and shutil.which("setarch")),
    reason="needs clang-22 and libclang-rt-22-dev, on Linux",
)

# Many samples a pixel, partial threadgroups, groups that do not nest.
CONFIG = Config(
    N=2, H=4, W=5, C=12, kH=2, kW=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1), G=2, DG=3
)
# So many that several threadgroups share a sum over them.
MANY_PIXELS = CONFIG.but(N=3, H=18, W=21)
# Operation and options of its plan.
LAUNCHES = {
    "im2col": ("im2col", {}),
    "col2im": ("col2im", {}),
    "col2im ordered": ("col2im", {"deterministic": True}),
    "offset_grad": ("offset_grad", {}),
    "output_product": ("output_product", {}),
    "column_product": ("column_product", {}),
    "weight_product": ("weight_product", {}),
    "direct_output": ("direct_output", {}),
    "direct_weight": ("direct_weight", {}),
    "col2im direct": ("col2im", {"direct": True}),
    "offset_grad direct": ("offset_grad", {"direct": True}),
}
IN_CUDA_TOO = ("im2col", "col2im", "col2im ordered", "offset_grad")
# A launch, a line of its Metal kernel, what to put in its place, and who finds it.
ATOMIC_ADD = """    metal::atomic_fetch_add_explicit(
        grad_input + at + Index(k * step), sum, metal::memory_order_relaxed);"""
PLAIN_ADD = """
    ((device float*)grad_input)[at + Index(k * step)] += sum;"""
BARRIER = "      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n"
LOADED = "right, depth, depth_end, right_tile, thread_at, threads);\n"
STRIP_BARRIER = """        metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
        const int at"""
WEIGHT_ADD = """    metal::atomic_fetch_add_explicit(
        weight + Index(row) * stride + Index(column),
        sum,
        metal::memory_order_relaxed);"""
PLANTED = {
    "race: scatter without atomics": ("col2im", ATOMIC_ADD, PLAIN_ADD, "thread"),
    "race: rows of another SIMD group": (
        "col2im ordered",
        "Index(group_at.y) * Index(p.W) * Index(p.C) + Index(channel);",
        "Index(channel);",
        "thread",
    ),
    "race: channels of another offset group": (
        "col2im ordered",
        "if (c < width) {",
        "if (channel < p.C) {",
        "thread",
    ),
    "race: every lane writes the sum": (
        "offset_grad",
        "if (active && lane == 0) {",
        "if (active) {",
        "thread",
    ),
    "race: no barrier before the product": (
        "column_product",
        LOADED + BARRIER,
        LOADED,
        "thread",
    ),
    "race: a strip that is read before it is written": (
        "output_product",
        STRIP_BARRIER,
        "        const int at",
        "thread",
    ),
    "race: splits that add without atomics": (
        "weight_product",
        WEIGHT_ADD,
        "    ((device float*)weight)[Index(row) * stride + Index(column)] += sum;",
        "thread",
    ),
    "overrun: a tile's row more": (
        "output_product",
        "if (side < factor.sides && begin",
        "if (side <= factor.sides && begin",
        "address",
    ),
    "overrun: a tile's depth more": (
        "weight_product",
        "begin + Index(depth) < end) {",
        "begin + Index(depth) <= end) {",
        "address",
    ),
    "overrun: a tile's column written beyond": (
        "column_product",
        "side < left.sides && at < right.sides",
        "side < left.sides && at <= right.sides",
        "address",
    ),
    "overrun: a corner below the image": (
        "col2im",
        "if (cell.corner[i] && weights.w[i] != 0.0f) {",
        "if (weights.w[i] != 0.0f) {",
        "address",
    ),
    "overrun: one channel more": (
        "im2col",
        "c < width; c += int(grid.x) * V",
        "c < width + 1; c += int(grid.x) * V",
        "address",
    ),
    "overrun: a pixel more": (
        "offset_grad",
        "id.pixel < Index(p.pixel_end)",
        "id.pixel <= Index(p.pixel_end)",
        "address",
    ),
    "overrun: a corner beside the image": (
        "col2im ordered",
        "if (cell.corner[i] && touches_row && weights.w[i] != 0.0f) {",
        "if (touches_row && weights.w[i] != 0.0f) {",
        "address",
    ),
}
# The same of CUDA.
PLANTED_IN_CUDA = {
    "race: scatter without atomics": (
        "col2im",
        "atomicAdd(grad_input + at + Index(k * step), sum);",
        "grad_input[at + Index(k * step)] += sum;",
        "thread",
    ),
    "race: rows of another warp": (
        "col2im ordered",
        "Index(block.y) * Index(p.W) * Index(p.C) + Index(channel);",
        "Index(channel);",
        "thread",
    ),
    "race: every lane writes the sum": (
        "offset_grad",
        "if (active && lane == 0) {",
        "if (active) {",
        "thread",
    ),
    "overrun: threads beyond the grid": (
        "im2col",
        """  if (!in_grid(at, launch.grid)) {
    return;
  }
""",
        "",
        "address",
    ),
    "overrun: a corner below the image": (
        "col2im",
        "if (cell.corner[i] && weights.w[i] != 0.0f) {",
        "if (weights.w[i] != 0.0f) {",
        "address",
    ),
    "overrun: a pixel more": (
        "offset_grad",
        "id.pixel < Index(p.pixel_end)",
        "id.pixel <= Index(p.pixel_end)",
        "address",
    ),
}


def watch(sanitizer, launch, change, tmp_path, language="metal", seed=1):
    """The process that ran the launch, of the source as `change` returns it."""
    op, options = LAUNCHES[launch]
    problem = Problem(MANY_PIXELS if op == "weight_product" else CONFIG)
    # ThreadSanitizer tells 255 threads at once apart, and takes more for one another.
    max_threads = 128 if sanitizer == "thread" else 256
    plan = problem.plan(op, max_threads=max_threads, **options)
    outputs = {
        "columns": problem.empty_columns(),
        "grad_input": problem.stored("grad_input"),
        "grad_weight": problem.stored("grad_weight"),
        "out": problem.stored("cotangent"),
        "grad_offset": problem.stored("offset"),
        "grad_mask": problem.stored("mask"),
    }
    buffers = {
        role: outputs[role] if role in outputs else problem.stored(role)
        for role, _, _ in plan["buffers"]
        if role != "params"
    }
    buffers["params"] = _ext._params_bytes(problem.fields)
    if language == "metal":
        source = change(_ext._metal_source("float32", 32))
        build = metal.build(source, sanitize=sanitizer, compiler=[COMPILER])
    else:
        text = text_of(plan["cuda"], "float32")
        text = text._replace(header=change(text.header))
        build = build_texts([text], sanitize=sanitizer, compiler=[COMPILER])
        plan, buffers = cuda_launch(plan["cuda"], text, buffers)
    job = tmp_path / "job.pickle"
    job.write_bytes(pickle.dumps((tuple(build), plan, buffers, seed)))
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": runtime(sanitizer),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    # Sanitizers reserve fixed addresses, which a randomised layout may have taken.
    return subprocess.run(
        ["setarch", "-R", sys.executable, "-m", "metal.run_sanitized", str(job)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def breaking(line, broken):
    def change(source):
        assert source.count(line) >= 1, "the line to break is no longer there"
        return source.replace(line, broken)

    return change


CLEAN = [("metal", launch) for launch in LAUNCHES] + [("cuda", launch) for launch in IN_CUDA_TOO]
FAULTS = [("metal", fault) for fault in PLANTED] + [("cuda", fault) for fault in PLANTED_IN_CUDA]


@pytest.mark.parametrize("sanitizer", RUNTIMES)
@pytest.mark.parametrize(("language", "launch"), CLEAN)
def test_clean(sanitizer, language, launch, tmp_path):
    process = watch(sanitizer, launch, str, tmp_path, language)
    assert process.returncode == 0, process.stderr[:4000]
    assert "Sanitizer" not in process.stderr, process.stderr[:4000]


@pytest.mark.parametrize(("language", "fault"), FAULTS)
def test_found(language, fault, tmp_path):
    launch, line, broken, sanitizer = {"metal": PLANTED, "cuda": PLANTED_IN_CUDA}[language][fault]
    process = watch(sanitizer, launch, breaking(line, broken), tmp_path, language)
    assert process.returncode != 0
    assert COMPLAINTS[sanitizer] in process.stderr, process.stderr[:4000]
    places = (f"deform_{LAUNCHES[launch][0]}", "mlx_deform::make_tile")
    assert any(place in process.stderr for place in places), "found elsewhere"
