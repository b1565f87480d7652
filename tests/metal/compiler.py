"""Builds translated kernels with clang, and refuses what Metal would refuse.

The compiler is the environment's MSL_CXX, or PyPI's ziglang, or clang++-22. Results are
kept in a folder of the system's temporary directory, named by everything that went in.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .launch import Kernels
from .lint import lint
from .translate import MslError, translate

SHIM = Path(__file__).parent / "shim"
CACHE = Path(tempfile.gettempdir()) / f"mlx_deform_msl_{getattr(os, 'getuid', int)()}"

LANGUAGE = ["-x", "c++", "-std=c++17", f"-I{SHIM}"]
STRICTNESS = [
    "-Werror=vla-extension",
    "-Werror=double-promotion",
    "-Werror=implicit-float-conversion",
    "-Werror=return-type",
    "-Wno-c++20-extensions",
    "-Wno-undefined-internal",
]
# Every operation on a half type rounds, nothing is fused, as Metal's safe mode promises.
ARITHMETIC = [
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-ffp-contract=off",
]
BUILD = ["-fPIC", "-fno-exceptions", "-fno-rtti", "-g1"]


def compiler_command():
    """The compiler to use, as a list of words; None if there is none."""
    if "MSL_CXX" in os.environ:
        return shlex.split(os.environ["MSL_CXX"])
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    return ["clang++-22"] if shutil.which("clang++-22") else None


def is_zig(compiler):
    return "ziglang" in compiler or Path(compiler[0]).name.startswith("zig")


def run(command, text=None):
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise MslError("\n".join(errors[:10]) or result.stderr)
    return result.stdout


def preprocess(source, compiler):
    """Macros expanded and conditions decided, as for Metal 3.1; comments vanish."""
    if not source.isascii():
        raise MslError("a Metal source must be ASCII, as MLX passes it to the compiler")
    text = re.sub(r"^#include <metal_stdlib>$", "", source, flags=re.MULTILINE)
    if unknown := re.search(r"^\s*#\s*include.*", text, re.MULTILINE):
        raise MslError(f"an include was not resolved: {unknown[0]}")
    macros = ["-undef", "-D__METAL_VERSION__=310"]
    return run([*compiler, "-x", "c++", "-E", *macros, "-"], text)


def translated(source, compiler):
    text = preprocess(source, compiler)
    if complaints := lint(text):
        raise MslError("\n".join(complaints))
    return translate(text)


def cached(parts, suffix, make):
    """The file that `make(path)` writes, made once for all runs with equal `parts`."""
    shim = [path.read_text() for path in sorted(SHIM.iterdir())]
    key = hashlib.sha256("\0".join(map(str, [*parts, *shim])).encode()).hexdigest()[:20]
    CACHE.mkdir(mode=0o700, exist_ok=True)
    path = CACHE / (key + suffix)
    if not path.exists():
        # Several test processes may build the same file: the last one to rename wins.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / ("made" + suffix)
            make(made)
            made.replace(path)
    return path


def compile_object(code, flags, compiler):
    def make(path):
        run([*compiler, *LANGUAGE, *flags, "-c", "-", "-o", str(path)], code)

    return cached([code, flags, compiler], ".o", make)


def check(source, compiler=None):
    """Raises MslError where the source breaks a rule of Metal that can be seen here."""
    compiler = compiler or compiler_command()
    code = translated(source, compiler).code
    compile_object(code, ["-DMSL_STRICT", *STRICTNESS, "-O0", *BUILD], compiler)


class Build(NamedTuple):
    library: str  # path of a shared library
    names: list[str]
    constants: dict[str, str]


def build(source, sanitize=None, compiler=None):
    """A Metal source as a shared library for this machine: see build_code."""
    compiler = compiler or compiler_command()
    code, names, constants = translated(source, compiler)
    return build_code(code, names, constants, sanitize, compiler)


def build_code(code, names, constants, sanitize=None, compiler=None):
    """C++ with a launcher for each of `names`, and the scheduler, as a shared library.

    `sanitize` may be "address" or "thread"; only a process that was started with the
    sanitizer's runtime can load the library then.
    """
    compiler = compiler or compiler_command()
    flags = [*STRICTNESS, *ARITHMETIC, "-O1" if sanitize else "-O2", *BUILD]
    link = ["-shared"]
    if is_zig(compiler):
        # zig would build its own C++ library and the runtime of a sanitizer: minutes.
        flags.append("-fno-sanitize=undefined")
        link += ["-fno-sanitize=undefined", "-nostdlib++"]
    if sanitize:
        flags.append(f"-fsanitize={sanitize}")
        link += [f"-fsanitize={sanitize}", "-shared-libsan"]
    objects = [
        compile_object(code, flags, compiler),
        compile_object((SHIM / "scheduler.cpp").read_text(), flags, compiler),
    ]

    def make(path):
        run([*compiler, *link, *map(str, objects), "-o", str(path)])

    library = cached([*objects, link, compiler], ".so", make)
    return Build(str(library), names, constants)


def load(source, compiler=None):
    """The kernels of a Metal source, ready to run."""
    return Kernels(*build(source, compiler=compiler))
