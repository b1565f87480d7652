"""Multi-scale deformable attention's kernels under AddressSanitizer and ThreadSanitizer.

As tests/test_gpu_sanitizers.py: the sources are clean; with one line broken, the sanitizer
that watches for it complains.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import metal
from cuda_kernels import text_of
from cuda_kernels.on_cpu import build_texts
from cuda_kernels.on_cpu import launch as cuda_launch
from metal.msda_problem import MsdaConfig, MsdaProblem
from mlx_deform import _ext
from test_gpu_sanitizers import (
    COMPILER,
    COMPLAINTS,
    OPTIONS,
    RUNTIMES,
    breaking,
    pytestmark,  # noqa: F401
    runtime,
)

# Partial threadgroups; maps with many cells that reach beyond them.
CONFIG = MsdaConfig(N=2, Q=47, M=3, D=12, shapes=((3, 4), (2, 3)), points=(3, 2))
# Operation and options of its plan.
LAUNCHES = {
    "forward": ("forward", {}),
    "grad_value": ("grad_value", {}),
    "grad_value ordered": ("grad_value", {"deterministic": True}),
    "grad_samples": ("grad_samples", {}),
}
# Broken in either language: a launch, a line of its kernel, what to put in its place, and
# who finds it.
PLANTED = {
    "race: rows of another SIMD group": (
        "grad_value ordered",
        "        Index(map_row) * Index(level.W)) *",
        "        Index(0) * Index(level.W)) *",
        "thread",
    ),
    "race: channels of another head": (
        "grad_value ordered",
        "if (channel < p.D) {",
        "if (channel < p.D + 1) {",
        "thread",
    ),
    "race: every lane writes the sum": (
        "grad_samples",
        "if (active && lane == 0) {",
        "if (active) {",
        "thread",
    ),
    "overrun: a corner below the map": (
        "grad_value",
        "if (cell.corner[i] && sums.w[i] != 0.0f) {",
        "if (sums.w[i] != 0.0f) {",
        "address",
    ),
    "overrun: corners outside are read": (
        "forward",
        "if (cell.corner[i]) {\n      out.at[i] = ChannelIO<T, V>::load(\n          value",
        "if (true) {\n      out.at[i] = ChannelIO<T, V>::load(\n          value",
        "address",
    ),
    "overrun: a sample too many on the last level": (
        "forward",
        "levels[4 * (l + 1) + 3] : p.K;",
        "levels[4 * (l + 1) + 3] : p.K + 1;",
        "address",
    ),
    "overrun: a corner beside the map": (
        "grad_value ordered",
        "if (cell.corner[i] && cell.y + (i >> 1) == map_row) {",
        "if (cell.y + (i >> 1) == map_row) {",
        "address",
    ),
    "overrun: a row more": (
        "grad_samples",
        "row < Index(p.query_end)",
        "row <= Index(p.query_end)",
        "address",
    ),
    "overrun: a level too many": (
        "grad_value",
        "for (int l = 0; l < p.L; ++l) {",
        "for (int l = 0; l <= p.L; ++l) {",
        "address",
    ),
}
PLANTED_IN_METAL = {
    "race: scatter without atomics": (
        "grad_value",
        """metal::atomic_fetch_add_explicit(
          grad_value + head_corner_index<Index>(cell_at, i, level, p),
          sums.w[i],
          metal::memory_order_relaxed);""",
        "((device float*)grad_value)[head_corner_index<Index>(cell_at, i, level, p)] += sums.w[i];",
        "thread",
    ),
}
PLANTED_IN_CUDA = {
    "race: scatter without atomics": (
        "grad_value",
        """atomicAdd(
          grad_value + head_corner_index<Index>(cell_at, i, level, p),
          sums.w[i]);""",
        "grad_value[head_corner_index<Index>(cell_at, i, level, p)] += sums.w[i];",
        "thread",
    ),
    "overrun: threads beyond the grid": (
        "forward",
        """  if (!in_grid(at, launch.grid)) {
    return;
  }
""",
        "",
        "address",
    ),
}


def watch(sanitizer, launch, change, tmp_path, language="metal", seed=1):
    """The process that ran the launch, of the source as `change` returns it."""
    op, options = LAUNCHES[launch]
    problem = MsdaProblem(CONFIG)
    # ThreadSanitizer tells 255 threads at once apart, and takes more for one another.
    max_threads = 128 if sanitizer == "thread" else 256
    plan = problem.plan(op, max_threads=max_threads, **options)
    outputs = {**problem.unwritten(), "grad_value": problem.stored("grad_value")}
    buffers = problem.buffers(plan, outputs)
    buffers["params"] = _ext._msda_params_bytes(problem.fields)
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


CLEAN = [(language, launch) for language in ("metal", "cuda") for launch in LAUNCHES]
FAULTS = [
    (language, fault)
    for language, own in (("metal", PLANTED_IN_METAL), ("cuda", PLANTED_IN_CUDA))
    for fault in (*PLANTED, *own)
]


@pytest.mark.parametrize("sanitizer", RUNTIMES)
@pytest.mark.parametrize(("language", "launch"), CLEAN)
def test_clean(sanitizer, language, launch, tmp_path):
    process = watch(sanitizer, launch, str, tmp_path, language)
    assert process.returncode == 0, process.stderr[:4000]
    assert "Sanitizer" not in process.stderr, process.stderr[:4000]


@pytest.mark.parametrize(("language", "fault"), FAULTS)
def test_found(language, fault, tmp_path):
    own = {"metal": PLANTED_IN_METAL, "cuda": PLANTED_IN_CUDA}[language]
    launch, line, broken, sanitizer = {**PLANTED, **own}[fault]
    process = watch(sanitizer, launch, breaking(line, broken), tmp_path, language)
    assert process.returncode != 0
    assert COMPLAINTS[sanitizer] in process.stderr, process.stderr[:4000]
    assert f"msda_{LAUNCHES[launch][0]}" in process.stderr, "found elsewhere"
