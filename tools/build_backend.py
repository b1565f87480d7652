"""The build backend: scikit-build-core's, for the release of MLX that is there, or for many.

A build from source fits the installed release, or the newest. What is made by
``MLX_DEFORM_MLX_VERSION=all pip wheel --no-deps .`` has a module for every supported one, each
compiled against that release and the nanobind of its ABI, which are downloaded.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import mlx_releases
from scikit_build_core import build as backend
from scikit_build_core.build import (  # noqa: F401, the other hooks
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_OPENBLAS = ["scipy-openblas32==0.3.34.481.3"] if sys.platform == "linux" else []


def get_requires_for_build_wheel(config_settings=None):
    mlx = ["pip", "wheel"] if mlx_releases.named() else mlx_releases.build_requirements()
    return [*backend.get_requires_for_build_wheel(config_settings), *mlx, *_OPENBLAS]


def get_requires_for_build_editable(config_settings=None):
    mlx = mlx_releases.build_requirements()
    return [*backend.get_requires_for_build_editable(config_settings), *mlx, *_OPENBLAS]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    versions = mlx_releases.named()
    if not versions:
        return backend.build_wheel(wheel_directory, config_settings, metadata_directory)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = []
        for version in versions:
            packages = mlx_releases.unpacked(version, "build/mlx")
            settings = {
                **(config_settings or {}),
                "build-dir": f"build/{{wheel_tag}}-mlx-{version}",
                "cmake.define.MLX_DEFORM_MLX_VERSION": version,
                "cmake.define.MLX_ROOT": str(packages / "mlx"),
                "cmake.define.nanobind_ROOT": str(packages / "nanobind" / "cmake"),
            }
            folder = Path(temporary) / version
            folder.mkdir()
            wheels.append(folder / backend.build_wheel(str(folder), settings, metadata_directory))
        return _merge(wheels, wheel_directory)


def _merge(wheels, wheel_directory):
    """One wheel with the files of all, which have the same name and differ in modules only."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        command = [sys.executable, "-m", "wheel", "pack", folder, "--dest-dir", wheel_directory]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return wheels[0].name


class Dependencies:
    """The provider of the metadata's dependencies: the releases of MLX that the wheel fits."""

    def __init__(self):
        self.state = None

    def build_state(self, build_state):
        self.state = build_state

    def dynamic_metadata(self, settings, project):
        if self.state == "sdist":
            versions = mlx_releases.SUPPORTED
        else:
            many = mlx_releases.named() if "wheel" in self.state else ()
            versions = many or [mlx_releases.at_hand()]
        exact = f"mlx=={versions[0]}"
        mlx = f"mlx>={versions[0]},<={versions[-1]}" if len(versions) > 1 else exact
        return {"dependencies": [mlx, *settings["others"]]}

    def dynamic_wheel(self, settings):
        return {"dependencies": True}
