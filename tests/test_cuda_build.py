"""What the CUDA backend hands to MLX and to NVIDIA's compiler, without a GPU.

The kernels' sources compile with NVRTC, as MLX writes them and calls it, without a warning
and without spilling a register; the extension takes nothing from MLX's library that the
CPU-only one lacks, but for what it can do without.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_deform
from cases import Config
from cuda_kernels import nvrtc, text_of, variants
from cuda_kernels.mlx_source import DEFAULT_HEADER
from metal.problem import Problem
from mlx_deform import _ext
from numerics import on_cuda

CONFIG = Config(N=2, H=9, W=7, C=48, G=2, DG=3)
ARCHITECTURES = ("sm_80", "sm_90a")  # as MLX names them, for an A100 and an H100
# A folder with MLX's wheel for CUDA, for a check of what its library exports.
WHEELS_VARIABLE = "MLX_DEFORM_CUDA_WHEELS"
# The functions that MLX's CPU-only library need not have, and does not.
OPTIONAL = {
    "mlx::core::cu::CommandEncoder::add_completed_handler(std::function<void ()>)",
    "mlx::core::cu::get_command_encoder(mlx::core::Stream)",
}

needs_nvrtc = pytest.mark.skipif(
    nvrtc.installed() is None, reason="needs nvidia-cuda-nvrtc and CUDA's headers"
)


# ---- the sources


@cache
def compilations():
    """What NVRTC says, as a future for each operation and architecture.

    The headers take the compiler longer than the kernels, so that all kernels of an
    operation are compiled at once.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    out = {}
    for op, kernels in variants.kernels().items():
        texts = [text_of(kernel, dtype) for kernel, dtype in kernels]
        source = DEFAULT_HEADER + texts[0].header + "".join(text.function for text in texts)
        for arch in ARCHITECTURES:
            arguments = (source, texts[0].name, arch, "--ptxas-options=-v")
            out[op, arch] = len(texts), pool.submit(nvrtc.compile, *arguments)
    return out


def remarks(log):
    """The log without what the assembler tells about registers."""
    return [line for line in log.splitlines() if line.strip() and not line.startswith("ptxas")]


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", ["im2col", "col2im", "offset_grad"])
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
    problem = Problem(CONFIG, "bfloat16")
    text = text_of(problem.plan("offset_grad")["cuda"], "bfloat16")
    code, log = nvrtc.compile(text.source, text.name, "sm_80")
    assert text.name.encode() in code
    assert log == ""


@needs_nvrtc
def test_what_is_wrong_is_said():
    text = text_of(Problem(CONFIG).plan("im2col")["cuda"], "float32")
    with pytest.raises(nvrtc.NvrtcError, match="nonsense"):
        nvrtc.compile(text.source.replace("floorf(x)", "nonsense(x)"), text.name, "sm_80")
    unused = text.source.replace("  using T =", "  int unused;\n  using T =")
    _, log = nvrtc.compile(unused, text.name, "sm_80")
    assert remarks(log), "a warning is not seen"


@pytest.mark.skipif(not on_cuda(), reason="MLX writes the source where it has a CUDA GPU")
@pytest.mark.parametrize("op", ["im2col", "col2im", "offset_grad"])
def test_the_source_is_what_mlx_writes(op):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import mlx.core as mx
from test_cuda_build import CONFIG, Problem
kernel = Problem(CONFIG, "float16").plan({op!r})["cuda"]
half = ("input", "columns", "grad_columns")
types = [mx.float16 if role in half else mx.float32 for role in kernel["inputs"]]
outputs = [mx.float16 if role in half else mx.float32 for role in kernel["outputs"]]
function = mx.fast.cuda_kernel(
    name=kernel["name"], input_names=kernel["inputs"], output_names=kernel["outputs"],
    source=kernel["source"], header=kernel["header"], ensure_row_contiguous=False)
function(
    inputs=[mx.zeros((1,), kind) for kind in types],
    template=[("T", mx.float16), ("Index", mx.int32), *kernel["constants"].items()],
    grid=kernel["grid"], threadgroup=kernel["group"], verbose=True,
    output_shapes=[(1,)] * len(outputs), output_dtypes=outputs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    written = re.search(r"```\n(.*)```", done.stdout, re.DOTALL)[1]
    kernel = Problem(CONFIG, "float16").plan(op)["cuda"]

    def nameless(source):
        return re.sub(r"custom_kernel_\w+", "NAME", " ".join(source.split()))

    assert nameless(written) == nameless(text_of(kernel, "float16").source)


# ---- the launches


def words_of(kernel):
    """The fields of LaunchArguments behind the params."""
    params = len(_ext._params_bytes(Problem(CONFIG).fields))
    numbers = np.frombuffer(kernel["words"][params:], np.int32)
    return {"grid": tuple(numbers[:3]), "blocks": tuple(numbers[3:6]), "lanes": numbers[6]}


def blocks_of(launch):
    """Along each axis, the last one perhaps in part."""
    return tuple(-(-n // group) for n, group in zip(launch["grid"], launch["group"], strict=True))


@pytest.mark.parametrize("channels", [1, 3, 64, 300, 2048])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_launch_covers_the_plan(dtype, channels):
    problem = Problem(CONFIG.but(C=channels * 2, G=1, DG=2), dtype)
    for op, options in [
        ("im2col", {}),
        ("col2im", {}),
        ("col2im", {"deterministic": True}),
        ("offset_grad", {}),
    ]:
        plan = problem.plan(op, **options)
        kernel, words = plan["cuda"], words_of(plan["cuda"])
        assert kernel["words"].startswith(_ext._params_bytes(problem.fields))
        assert words["grid"] == plan["grid"]
        assert kernel["group"] == plan["group"]
        assert words["blocks"] == blocks_of(plan)
        assert blocks_of(kernel) == (np.prod(words["blocks"]), 1, 1)
        assert words["lanes"] == plan["constants"].get("segment_lanes", 0)


def test_many_blocks_are_launched_in_rows():
    """More pixels than CUDA has blocks along z, more image rows than along y."""
    many = {"N": 1000, "H": 1000, "Ho": 1000, "Wo": 70, "pixel_end": 70_000_000}
    fields = {**Problem(CONFIG.but(C=256, G=1, DG=1)).fields, **many, "has_mask": 0}
    fields["column_group"] = 0
    options = {"index_bits": 64}
    for op, more in [
        ("im2col", {}),
        ("col2im", {}),
        ("col2im", {"deterministic": True}),
        ("offset_grad", {"wants_mask": False}),
    ]:
        plan = _ext._dispatch_plan(op, fields, **options, **more)
        kernel = _ext._cuda_kernel(op, fields, **options, **more)
        wanted = np.prod([int(n) for n in words_of(kernel)["blocks"]])
        x, y, z = blocks_of(kernel)
        assert x * y * z >= wanted > 65535
        assert x * (y - 1) < wanted, "a row too many"
        assert y <= 65535
        assert z == 1
        assert max(kernel["grid"]) < 2**31
        assert plan["group"] == kernel["group"]


def test_more_blocks_than_can_be_counted_are_refused():
    fields = {**Problem(CONFIG.but(C=256, G=1, DG=1)).fields, "has_mask": 0, "kH": 99, "kW": 99}
    fields.update(N=1, Ho=2**14, Wo=2**14, pixel_end=2**28, column_group=0)
    with pytest.raises(ValueError, match="smaller chunks"):
        _ext._cuda_kernel("im2col", fields)


def test_metal_s_own_kernels_are_refused():
    with pytest.raises(ValueError, match="must exist in CUDA; got deform_column_product"):
        _ext._cuda_kernel("column_product", Problem(CONFIG).fields)


# ---- the extension

nm = shutil.which("nm")
needs_nm = pytest.mark.skipif(nm is None or sys.platform != "linux", reason="needs nm, on Linux")


def symbols(library, *which):
    done = subprocess.run(
        [nm, "-D", "--demangle", *which, str(library)], capture_output=True, text=True, check=True
    )
    return [line.split(maxsplit=1) for line in done.stdout.splitlines()]


def taken_from_mlx():
    """Undefined functions of MLX's, by whether they are optional."""
    out = {"U": set(), "w": set(), "v": set()}
    for kind, name in symbols(_ext.__file__, "--undefined-only"):
        if name.startswith(("mlx::", "vtable for mlx", "typeinfo for mlx")):
            out[kind].add(name)
    return out


@needs_nm
def test_what_the_cpu_library_lacks_is_optional():
    taken = taken_from_mlx()
    assert len(taken["U"]) > 20
    assert taken["w"] | taken["v"] == OPTIONAL


@needs_nm
def test_mlx_s_cuda_library_has_everything(tmp_path):
    wheels = sorted(Path(os.environ.get(WHEELS_VARIABLE, ".")).glob("mlx_cuda_1*.whl"))
    if WHEELS_VARIABLE not in os.environ or not wheels:
        pytest.skip(f"needs MLX's wheel for CUDA in {WHEELS_VARIABLE}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            library = archive.extract("mlx/lib/libmlx.so", tmp_path)
        exported = {rest.split(maxsplit=1)[1] for _, rest in symbols(library, "--defined-only")}
        taken = taken_from_mlx()
        assert (taken["U"] | OPTIONAL) - exported == set()


@pytest.mark.skipif(not on_cuda(), reason="needs MLX with a CUDA GPU")
def test_chunks_do_not_pile_up(monkeypatch):
    """Of 64 chunks of 1 MB, and their products, at most eight are held at once."""
    monkeypatch.setenv("MLX_DEFORM_COLUMN_BUDGET_MB", "1")
    x = mx.random.normal((1, 128, 128, 32))
    offset, weight = mx.zeros((1, 128, 128, 98)), mx.random.normal((8, 7, 7, 32))
    mx.eval(x, offset, weight)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mlx_deform.deform_conv2d(x, offset, weight, padding=3))
    columns = 128 * 128 * 49 * 32 * 4
    assert mx.get_peak_memory() - before < columns / 3
