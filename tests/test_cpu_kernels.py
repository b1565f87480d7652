"""The CPU's vector loops for machines that this one may not be, against loops in float64.

The kernels for AVX-512 as they are, and lowered to AVX2's instructions, which tests their
text; those for arm64 by qemu's user mode (Debian: qemu-user). What can't run is compiled all
the same. MLX_DEFORM_AVX512_EMULATOR names a command that runs an x86-64 program with AVX-512,
such as tests/cpu_kernels/in_bochs.py.
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import mlx_deform._ext
from metal.compiler import compiler_command, is_zig

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "cpu_kernels" / "values.cpp"
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=fast", "-fno-trapping-math", f"-I{ROOT}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]
IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64")

# By name: the instruction set's sources, flags, and the machine that they are for.
BUILDS = {
    "avx512": ("avx512", AVX512, "x86_64"),
    "avx512-lowered": ("avx512", [*AVX2, "-Wno-psabi"], "x86_64"),
    "arm64": ("baseline", [], "aarch64"),
}


def compiler_for(machine):
    """The system's compiler or Debian's cross compiler, else zig, or a skip."""
    if (machine == "x86_64") == IS_X86 and (native := shutil.which("c++")):
        return [native]
    if machine == "aarch64" and (cross := shutil.which("aarch64-linux-gnu-g++")):
        return [cross]
    zig = compiler_command()
    if zig is None or not is_zig(zig):
        pytest.skip(f"no compiler for {machine}")
    return [*zig, "-target", f"{machine}-linux-musl", "-fno-sanitize=undefined"]


def way_to_run(name):
    """The command before the program, or a reason why it can't run here."""
    isas = mlx_deform._ext._isas()
    if name == "arm64":
        if IS_ARM and platform.system() == "Linux":
            return []
        qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        return [qemu] if qemu else "no qemu-aarch64 to run it"
    if name == "avx512" and name not in isas:
        emulator = os.environ.get("MLX_DEFORM_AVX512_EMULATOR")
        return shlex.split(emulator) if emulator else "this machine has no avx512"
    return [] if "avx2" in isas else "this machine has no avx2"


@pytest.mark.parametrize("name", BUILDS)
def test_values(name, tmp_path):
    isa, flags, machine = BUILDS[name]
    program = tmp_path / "values"
    kernels = f'-DKERNELS="mlx_ops/cpu/tile_kernels_{isa}.cpp"'
    way = way_to_run(name)
    # An emulator need not have this system's libraries.
    static = ["-static"] if isinstance(way, list) and way else []
    command = [*compiler_for(machine), *static, *FLAGS, *flags, f"-DISA={isa}", "-DHAS_PRODUCTS"]
    built = subprocess.run(
        [*command, kernels, str(SOURCE), "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    if isinstance(way, str):
        pytest.skip(f"only compiled: {way}")
    done = subprocess.run([*way, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
