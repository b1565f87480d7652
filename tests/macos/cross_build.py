"""Builds the extension for macOS on arm64, on Linux, with the project's own CMake files.

The headers and libmlx.dylib are those of MLX's macOS wheels, and the link is strict
(apple_clang.py). Of the libraries that macOS itself brings, only what MLX's own
binaries take from them is taken to exist: Apple's linker found those symbols, so they
are there. A symbol of libc++ or Accelerate that MLX does without is refused.

    python tests/macos/cross_build.py             build in a temporary folder and report
    python tests/macos/cross_build.py --download  fetch the wheels only
    python tests/macos/cross_build.py --mlx 0.31.2  against another release of MLX
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from apple_clang import NAMED_BY_U, text_stub
from macho import MachO

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import mlx_releases  # noqa: E402

MLX_VERSION = importlib.metadata.version("mlx")
# What the build asks of Python, beside the compiler.
MODULES = ("nanobind", "ziglang")
WHEELS = ("mlx", "mlx-metal")
NEEDED = re.compile(r"mlx/(include/|share/|lib/.*\.dylib|core\.)")
CACHE = Path(tempfile.gettempdir()) / f"mlx_deform-macos-{os.getuid()}"
# Symbols that exist beside those that MLX uses, in libc++ since macOS 10.13: to_string and
# ostream << for every number, new and delete with an alignment. The letters are the ABI's names
# of the numbers' types.
OSTREAM = "__ZNSt3__113basic_ostreamIcNS_11char_traitsIcEEEls"
MORE_SYMBOLS = {
    "libc++": {f"__ZNSt3__19to_stringE{number}" for number in "ijlmxyfde"}
    | {f"{OSTREAM}E{number}" for number in "bstijlmxyfde"}
    | {"__ZnwmSt11align_val_t", "__ZdlPvSt11align_val_t", "__ZdlPvmSt11align_val_t"}
}
# The variable that names a folder with the wheels, for machines without a network.
WHEELS_VARIABLE = "MLX_DEFORM_MACOS_WHEELS"


class Unavailable(Exception):
    """Something that the check needs is not on this machine; says what."""


def find_wheels(folder, version):
    found = []
    for name in WHEELS:
        pattern = f"{name.replace('-', '_')}-{version}-*macosx_14_0_arm64.whl"
        found += sorted(folder.glob(pattern))[:1]
    return found if len(found) == len(WHEELS) else None


def download_wheels(folder, version):
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--platform", "macosx_14_0_arm64"]
    command += ["--python-version", python, "--retries", "1", "--timeout", "15"]
    command += ["--dest", str(folder), *(f"{name}=={version}" for name in WHEELS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise Unavailable(f"MLX's macOS wheels cannot be had: {reason}")


def macos_wheels(version):
    """The paths of MLX's macOS wheels, downloaded if they are not there yet."""
    folder = Path(os.environ.get(WHEELS_VARIABLE, CACHE))
    if not find_wheels(folder, version):
        folder.mkdir(parents=True, exist_ok=True)
        download_wheels(folder, version)
    return find_wheels(folder, version)


def unpack_mlx(version):
    """The macOS package `mlx`: what a build needs of it, not its Python code and kernels.

    It stays in one place, so that zig's cache serves the next build.
    """
    site = CACHE / f"mlx-{version}"
    if not site.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unpacked = tempfile.mkdtemp(dir=CACHE)
        for wheel in macos_wheels(version):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, filter(NEEDED.match, archive.namelist()))
        try:
            os.rename(unpacked, site)
        except OSError:  # another process was faster
            shutil.rmtree(unpacked)
    return site / "mlx"


def nanobind_for(mlx):
    """The CMake files of the nanobind that this MLX was built with."""
    version = mlx_releases.nanobind_for(mlx)
    if version == importlib.metadata.version("nanobind"):
        return importlib.util.find_spec("nanobind").submodule_search_locations[0] + "/cmake"
    folder = CACHE / f"nanobind-{version}"
    if not folder.exists():
        partial = tempfile.mkdtemp(dir=CACHE)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        run([*command, "--target", partial, f"nanobind=={version}"])
        os.rename(partial, folder)
    return folder / "nanobind" / "cmake"


def write_sdk(mlx, sdk):
    """A .tbd file for each system library that MLX's own macOS binaries link."""
    symbols, paths = {}, {}
    for binary in (mlx / "lib" / "libmlx.dylib", *mlx.glob("core.*.so")):
        macho = MachO(binary)
        for path in macho.libraries:
            stem = Path(path).name.split(".")[0]
            if stem in ("libmlx", "libSystem"):
                continue  # the wheel holds the one, zig the other
            paths[stem] = path
            symbols.setdefault(stem, set()).update(macho.imports.get(path, ()))
    sdk.mkdir()
    for stem, path in paths.items():
        known = symbols[stem] | MORE_SYMBOLS.get(stem, set())
        (sdk / f"{stem}.tbd").write_text(text_stub(path, known))


def write_tools(tools, sdk):
    commands = {
        "clang++": [sys.executable, HERE / "apple_clang.py", sdk],
        "ar": [sys.executable, "-m", "ziglang", "ar"],
        "ranlib": [sys.executable, "-m", "ziglang", "ranlib"],
    }
    tools.mkdir()
    for name, command in commands.items():
        quoted = " ".join(f"'{word}'" for word in command)
        (tools / name).write_text(f'#!/bin/sh\nexec {quoted} "$@"\n')
        (tools / name).chmod(0o755)


def python_headers(folder):
    """Python's headers; where pyconfig.h picks a file by architecture, with that file."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise Unavailable(f"Python's headers are not installed in {include}")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    chosen = include.parent / multiarch / include.name / "pyconfig.h"
    if not multiarch or not chosen.exists():
        return include
    shutil.copytree(include, folder)
    shutil.copy(chosen, folder / "pyconfig.h")
    return folder


def find_program(name):
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    program = shutil.which(name, path=os.pathsep.join(folders))
    if not program:
        raise Unavailable(f"{name} is not installed")
    return program


def run(command, **options):
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-6000:]}")
    return done.stdout


class CrossBuild:
    """The project, configured for macOS in `folder`; `mlx` is the macOS package."""

    def __init__(self, folder, source=ROOT, version=MLX_VERSION):
        for module in MODULES:
            if importlib.util.find_spec(module) is None:
                raise Unavailable(f"{module} is not installed")
        self.cmake, self.ninja = find_program("cmake"), find_program("ninja")
        self.folder, self.source = Path(folder), source
        self.version, self.mlx = version, unpack_mlx(version)
        write_sdk(self.mlx, self.folder / "sdk")
        write_tools(self.folder / "tools", self.folder / "sdk")
        self.headers = python_headers(self.folder / "python")

    def configure(self, **variables):
        variables = {
            "CMAKE_TOOLCHAIN_FILE": HERE / "toolchain.cmake",
            "CMAKE_MAKE_PROGRAM": self.ninja,
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",  # the same symbols, sooner
            "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
            "MLX_DEFORM_MACOS_TOOLS": self.folder / "tools",
            "MLX_DEFORM_MLX_VERSION": self.version,
            "MLX_ROOT": self.mlx,
            "nanobind_ROOT": nanobind_for(self.mlx),
            "Python_EXECUTABLE": sys.executable,
            "Python_INCLUDE_DIR": self.headers,
            "SKBUILD_PROJECT_NAME": "mlx_deform",
            "SKBUILD_PROJECT_VERSION": "0.0.0",
            **variables,
        }
        definitions = [f"-D{name}={value}" for name, value in variables.items()]
        command = [self.cmake, "-G", "Ninja", "-S", self.source, "-B", self.folder / "build"]
        return run(command + definitions)

    def build(self):
        """The path of the extension."""
        run([self.cmake, "--build", self.folder / "build", "--parallel", "2"])
        (extension,) = (self.folder / "build").rglob("_ext*.so")
        return extension

    def sources(self):
        """The source files that were compiled, relative to the project."""
        commands = json.loads((self.folder / "build" / "compile_commands.json").read_text())
        files = {Path(command["file"]) for command in commands}
        return {
            str(file.relative_to(self.source)) for file in files if file.is_relative_to(self.source)
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--download", action="store_true", help="fetch MLX's macOS wheels only")
    parser.add_argument("--mlx", default=MLX_VERSION, help="the release; default: %(default)s")
    parser.add_argument("--keep", type=Path, help="build in this new folder and leave it there")
    options = parser.parse_args()
    try:
        if options.download:
            print(*macos_wheels(options.mlx), sep="\n")
            return
        with tempfile.TemporaryDirectory() as temporary:
            build = CrossBuild(options.keep or temporary, version=options.mlx)
            build.configure()
            extension = MachO(build.build())
            for library, symbols in extension.imports.items():
                print(f"{len(symbols):4} symbols from {library}".replace(NAMED_BY_U, "Python"))
    except Unavailable as reason:
        sys.exit(f"cross_build.py: {reason}")


if __name__ == "__main__":
    main()
