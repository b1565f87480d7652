"""What the CUDA backend would hand to MLX of multi-scale deformable attention.

As tests/test_cuda_build.py: the sources compile with NVRTC, as MLX writes them, without a
warning and without spilling a register.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest

from cuda_kernels import msda_variants, nvrtc, text_of
from cuda_kernels.mlx_source import DEFAULT_HEADER
from metal.msda_problem import MsdaConfig, MsdaProblem
from mlx_deform import _ext
from test_cuda_build import ARCHITECTURES, blocks_of, needs_nvrtc, remarks

CONFIG = MsdaConfig(N=2, Q=13, M=4, D=32)
LAUNCHES = (
    ("forward", {}),
    ("grad_value", {}),
    ("grad_value", {"deterministic": True}),
    ("grad_samples", {}),
)


@cache
def compilations():
    """What NVRTC says, as a future for each operation and architecture."""
    pool = ThreadPoolExecutor(os.cpu_count())
    out = {}
    for op, kernels in msda_variants.kernels().items():
        texts = [text_of(kernel, dtype) for kernel, dtype in kernels]
        source = DEFAULT_HEADER + texts[0].header + "".join(text.function for text in texts)
        for arch in ARCHITECTURES:
            arguments = (source, texts[0].name, arch, "--ptxas-options=-v")
            out[op, arch] = len(texts), pool.submit(nvrtc.compile, *arguments)
    return out


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", ["forward", "grad_value", "grad_samples"])
def test_every_kernel_compiles_without_a_warning(op, arch):
    count, compilation = compilations()[op, arch]
    code, log = compilation.result()
    assert code.startswith(b"\x7fELF")
    assert remarks(log) == []
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    )
    assert frames == [("0", "0", "0")] * count
    # Of 65536 in a multiprocessor: at least 3 blocks of 256 threads at once.
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == count
    assert max(registers) <= 80


@needs_nvrtc
def test_one_kernel_as_mlx_compiles_it():
    text = text_of(MsdaProblem(CONFIG, "bfloat16").plan("grad_samples")["cuda"], "bfloat16")
    code, log = nvrtc.compile(text.source, text.name, "sm_80")
    assert text.name.encode() in code
    assert log == ""


def words_of(kernel):
    """The fields of LaunchGrid, behind the params."""
    params = len(_ext._msda_params_bytes(MsdaProblem(CONFIG).fields))
    numbers = np.frombuffer(kernel["words"][params:], np.int32)
    return {"grid": tuple(numbers[:3]), "blocks": tuple(numbers[3:6]), "lanes": numbers[6]}


@pytest.mark.parametrize("channels", [1, 3, 64, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_launch_covers_the_plan(dtype, channels):
    problem = MsdaProblem(CONFIG.but(D=channels), dtype)
    for op, options in LAUNCHES:
        plan = problem.plan(op, **options)
        kernel, words = plan["cuda"], words_of(plan["cuda"])
        assert kernel["words"].startswith(_ext._msda_params_bytes(problem.fields))
        assert words["grid"] == plan["grid"]
        assert kernel["group"] == plan["group"]
        assert words["blocks"] == blocks_of(plan)
        assert blocks_of(kernel) == (np.prod(words["blocks"]), 1, 1)
        assert words["lanes"] == plan["constants"].get("segment_lanes", 0)


def test_many_blocks_are_launched_in_rows():
    """More queries than CUDA has blocks along y or z."""
    problem = MsdaProblem(CONFIG)
    fields = {**problem.fields, "N": 100, "Q": 90000, "query_end": 9_000_000, "D": 256}
    for op, options in LAUNCHES:
        kernel = _ext._msda_cuda_kernel(op, fields, problem.levels, index_bits=64, **options)
        wanted = np.prod([int(n) for n in words_of(kernel)["blocks"]])
        x, y, z = blocks_of(kernel)
        assert x * y * z >= wanted
        assert x * (y - 1) < wanted, "a row too many"
        assert y <= 65535
        assert z == 1
        assert max(kernel["grid"]) < 2**31


def test_more_blocks_than_can_be_counted_are_refused():
    problem = MsdaProblem(CONFIG)
    fields = {**problem.fields, "N": 2000, "Q": 90000, "query_end": 180_000_000, "D": 4096}
    with pytest.raises(ValueError, match="smaller chunks"):
        _ext._msda_cuda_kernel("forward", fields, problem.levels)
