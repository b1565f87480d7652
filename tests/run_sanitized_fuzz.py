"""Random calls with the extension under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the extension with clang's sanitizers into a folder of its own, beside the package's Python
files, and runs `python -m fuzz` there, the targets in parallel. Needs clang-22, on Linux.

    python tests/run_sanitized_fuzz.py --calls 20000
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx
import scipy_openblas32

from sanitizers import COMPILER, SYMBOLS, runtime

ROOT = Path(__file__).parents[1]
# A float that no int holds must not become one: that check is in no group. The virtual tables
# that the last one leaves out are in libmlx, which is not instrumented.
FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr "
    "-fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -shared-libsan"
)
OPTIONS = {
    # torch and MLX, not instrumented, leak at exit and free what others allocated. Where memory
    # was allocated takes a third of the time to note: repeat a call with a larger size to see it.
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0"
    ":malloc_context_size=1" + SYMBOLS,
    "UBSAN_OPTIONS": "print_stacktrace=1" + SYMBOLS,
    "OMP_NUM_THREADS": "1",  # of torch: targets run side by side
}


def build(folder: Path, jobs: int) -> Path:
    """The folder that holds the package with the instrumented extension."""
    made, package = folder / "build", folder / "package" / "mlx_deform"
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": f"-O1 {FLAGS}",
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", made, "-G", "Ninja", *defines], check=True)
    subprocess.run(["cmake", "--build", made, "--target", "_ext", "-j", str(jobs)], check=True)
    subprocess.run(["cmake", "--install", made, "--prefix", package.parent], check=True)
    shutil.copytree(
        ROOT / "python" / "mlx_deform",
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        dirs_exist_ok=True,
    )
    return package.parent


def fuzz(package: Path, target: str, calls: int, seed: int) -> subprocess.CompletedProcess:
    libraries = [Path(mlx.__path__[0]) / "lib", Path(scipy_openblas32.get_lib_dir())]
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": runtime("address"),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PYTHONPATH": os.pathsep.join(map(str, (package, ROOT / "tests"))),
        "PYTHONWARNINGS": "ignore",
        "MLX_DEFORM_NUM_THREADS": "2",
    }
    arguments = [target, "--calls", str(calls), "--seed", str(seed)]
    code = (
        "import runpy, sys; from mlx_deform import _ext; "
        f"assert _ext.__file__.startswith({str(package)!r}), 'another package comes first: ' "
        "+ _ext.__file__; runpy.run_module('fuzz', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main() -> int:
    targets = ("deform_conv2d", "deform_im2col", "multi_scale_deformable_attention", "bridge")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=targets)
    parser.add_argument("--calls", type=int, default=20_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if runtime("address") is None:
        raise SystemExit("needs clang-22 and libclang-rt-22-dev, on Linux")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        package = build(Path(folder), options.jobs)
        runs = pool.map(
            lambda target: fuzz(package, target, options.calls, options.seed), options.targets
        )
        failed = False
        for run in runs:
            print("\n".join(run.stdout.splitlines()[-40 if run.returncode else -1 :]), flush=True)
            failed |= run.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
