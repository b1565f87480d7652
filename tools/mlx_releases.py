"""The releases of MLX that a released wheel has modules for, and what building for one takes."""

import importlib.metadata
import os
import platform
import re
import site
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SUPPORTED = (
    *("0.30.4", "0.30.5", "0.30.6"),
    *("0.31.0", "0.31.1", "0.31.2"),
    *("0.32.0", "0.32.1", "0.32.2", "0.32.3", "0.32.4"),
)
OLDEST, NEWEST = SUPPORTED[0], SUPPORTED[-1]

# An array passes between two extensions where both were built with a nanobind of the same
# internals, whose number stands in MLX's module.
NANOBIND = {17: "2.10.2", 18: "2.11.0", 19: "2.12.0", 20: "2.13.0", 21: "2.15.0", 22: "3.1.0"}
_INTERNALS = re.compile(rb"\bv(\d+)_system_lib|_a\d+_v(\d+)\0")

# Names releases to build for, as "0.31.2,0.32.4", or "all": a wheel with a module for each.
VARIABLE = "MLX_DEFORM_MLX_VERSION"

if sys.platform == "darwin":
    _PLATFORM, _BACKEND = "macosx_14_0_arm64", "mlx-metal"
else:
    _PLATFORM, _BACKEND = f"manylinux_2_35_{platform.machine()}", "mlx-cpu"


def _number(version):
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _installed():
    """The installed mlx, also where pip hides it from an isolated build, or None."""
    places = [*sys.path, *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        places.append(site.getusersitepackages())
    return next(iter(importlib.metadata.distributions(name="mlx", path=places)), None)


def named():
    """The releases that the environment variable names; none: build for what is installed."""
    value = os.environ.get(VARIABLE, "")
    return SUPPORTED if value == "all" else tuple(re.findall(r"[^,\s]+", value))


def at_hand():
    """The installed release, or the newest where there is none that the sources compile with."""
    found = _installed()
    usable = found and _number(found.version) >= _number(OLDEST)
    return found.version if usable else NEWEST


def nanobind_for(mlx):
    """The release of nanobind that fits the package in the folder ``mlx``."""
    for module in mlx.glob("core.*.so"):
        match = _INTERNALS.search(module.read_bytes())
        number = int(match[1] or match[2]) if match else None
        if number in NANOBIND:
            return NANOBIND[number]
    raise RuntimeError(f"no known nanobind has the internals of {mlx}/core.*.so")


def build_requirements():
    """What pip has to install to build for the release at hand."""
    version, found = at_hand(), _installed()
    nanobind = NANOBIND[max(NANOBIND)]
    if found and found.version == version:
        nanobind = nanobind_for(Path(found.locate_file("mlx")))
    backend = "[cpu]" if sys.platform == "linux" else ""
    return [f"mlx{backend}=={version}", f"nanobind=={nanobind}"]


def unpacked(version, folder):
    """A folder with the packages mlx and nanobind to build for a release, made in ``folder``.

    Nothing of it is imported, so that a container older than MLX's wheels can build.
    """

    def pip(command, *arguments):
        words = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
        subprocess.run(list(map(str, words)), check=True)

    tag = f"{sys.implementation.cache_tag}-{_PLATFORM}"
    site_packages = Path(folder).absolute() / f"{version}-{tag}"
    if not site_packages.exists():
        site_packages.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=site_packages.parent))
        pip(
            "download",
            "--only-binary=:all:",
            "--platform",
            _PLATFORM,
            "--dest",
            partial,
            f"mlx=={version}",
            f"{_BACKEND}=={version}",
        )
        for wheel in partial.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            wheel.unlink()
        nanobind = f"nanobind=={nanobind_for(partial / 'mlx')}"
        pip("install", "--target", partial, nanobind)
        partial.rename(site_packages)
    return site_packages
