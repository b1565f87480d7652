"""Tests one wheel beside several releases of MLX, each in a virtual environment of its own.

    python tools/mlx_matrix.py dist/mlx_deform-*.whl                   every one it has a module for
    python tools/mlx_matrix.py dist/mlx_deform-*.whl --refused 0.29.4  and one that it has not
    python tools/mlx_matrix.py dist/mlx_deform-*.whl --cross-link      and link for macOS

The environment first holds what ``pip install`` of the wheel and of that MLX brings, and runs
the self-test with no compiler in reach; beside a release that no module fits, the import must
say so in one sentence. Then it borrows pytest, torch and the like from the environment that
runs this script, MLX and what belongs to it excepted, for the tests. Give --no-tests where
they are not installed.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE_TESTS = (
    "package",
    "deform_conv2d_forward",
    "deform_conv2d_gradients",
    "deform_conv2d_transforms",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_transforms",
    "dispatch_plan",
    "nn_layers",
    "nn_attention",
    "portable",
    "torch_values",
    "torch_modules",
    "torch_runtime",
)
MODULE = re.compile(r"mlx_deform/_mlx_(\w+)/_ext\.")
PIP_INSTALL = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
BACKEND = "[cpu]" if sys.platform == "linux" else ""


def run(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, **options)


def modules(wheel):
    """The releases of MLX that the wheel has modules for, oldest first."""
    with zipfile.ZipFile(wheel) as archive:
        found = {match[1] for match in map(MODULE.match, archive.namelist()) if match}
    return [".".join(map(str, n)) for n in sorted(tuple(map(int, f.split("_"))) for f in found)]


def environment_with(folder, wheel, version):
    """The interpreter of a new environment with the wheel and an MLX, and nothing else."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run(python, *PIP_INSTALL, wheel)
    run(python, *PIP_INSTALL, f"mlx{BACKEND}=={version}")  # complains of one that is refused
    return python


def borrow_packages(python):
    """Links the packages of this environment that the other lacks, without MLX's."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = run(python, "-c", script, capture_output=True, text=True)
    to = Path(done.stdout.strip())
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            its_own = entry.name.startswith(("mlx", "_mlx")) or entry.suffix == ".pth"
            if not its_own and not (to / entry.name).exists():
                (to / entry.name).symlink_to(entry)


def selftest(python):
    """As on a machine without a compiler: no program is in reach but the interpreter."""
    environment = {**os.environ, "PATH": str(python.parent)}
    run(python, "-m", "mlx_deform.selftest", cwd="/", env=environment, stdout=subprocess.DEVNULL)


def refusal(python):
    done = subprocess.run(
        [python, "-c", "import mlx_deform"], cwd="/", capture_output=True, text=True
    )
    last = done.stderr.strip().rpartition("\n")[2]
    if not last.startswith("ImportError: mlx_deform") or "pip install" not in last:
        raise RuntimeError(f"expected one sentence, got:\n{done.stderr}")
    return last


def check(wheel, version, options):
    with tempfile.TemporaryDirectory() as folder:
        python = environment_with(Path(folder), wheel, version)
        if version in options.refused:
            return refusal(python)
        selftest(python)
        if not options.no_tests:
            borrow_packages(python)
            files = [ROOT / "tests" / f"test_{name}.py" for name in CORE_TESTS]
            run(python, "-m", "pytest", "-q", *files, cwd=ROOT)
        if options.cross_link:
            run(sys.executable, ROOT / "tests" / "macos" / "cross_build.py", "--mlx", version)
        return "passed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--mlx", action="append", metavar="VERSION", help="these only")
    parser.add_argument("--refused", action="append", default=[], metavar="VERSION")
    parser.add_argument("--no-tests", action="store_true", help="the self-test only")
    parser.add_argument("--cross-link", action="store_true", help="link for macOS too")
    options = parser.parse_args()
    wheel, report = options.wheel.resolve(), []
    for version in [*(options.mlx or modules(wheel)), *options.refused]:
        began = time.monotonic()
        try:
            result = check(wheel, version, options)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            result = f"FAILED: {error}"
        report.append(f"mlx {version:8} {time.monotonic() - began:5.0f} s  {result}")
        print(report[-1], flush=True)
    print("", *report, sep="\n")
    sys.exit(any("FAILED" in line for line in report))


if __name__ == "__main__":
    main()
