"""Which compiled module to load: MLX's C++ API has no stable ABI, so each fits one version.

The package holds a folder for every version of MLX that it was built for, ``_mlx_0_32_4``
for 0.32.4, with a module ``_ext`` in it. A released wheel has several, a build from source
one.
"""

import re
from collections.abc import Iterable
from pathlib import Path

# The oldest MLX that the sources compile with, as tools/mlx_releases.py has it.
OLDEST = "0.30.4"


def _folder_name(mlx_version: str) -> str:
    return "_mlx_" + re.sub(r"\W", "_", mlx_version)


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in re.split(r"\W|_", version)]


def _versions(package: Iterable[str]) -> list[str]:
    """The versions of MLX that there is a module for, oldest first."""
    folders = {folder.name for path in package for folder in Path(path).glob("_mlx_*")}
    versions = [name.removeprefix("_mlx_").replace("_", ".") for name in folders]
    return sorted(versions, key=_numbers)


def module_folder(package: Iterable[str], version: str, mlx_version: str) -> str:
    """The folder of the module ``_ext`` for this version of MLX.

    ``package``: the folders of the package; ``version``: its own. Raises ImportError, with
    what to install, where no module fits.
    """
    package = list(package)
    for path in package:
        folder = Path(path) / _folder_name(mlx_version)
        if folder.is_dir():
            return str(folder)
    versions = _versions(package) or ["none"]
    built_for, install = versions[0], f"mlx=={versions[0]}"
    if len(versions) > 1:
        built_for = f"{', '.join(versions[:-1])} and {versions[-1]}"
        install = f"mlx=={versions[-1]}"
    advice = f'run pip install "{install}"'
    if _numbers(mlx_version) >= _numbers(OLDEST):
        advice += (
            f", or build it for mlx {mlx_version} with pip install --no-binary mlx-deform "
            "--no-cache-dir --force-reinstall --no-deps mlx-deform"
        )
    raise ImportError(
        f"mlx_deform {version} was built for mlx {built_for} but found mlx {mlx_version}; {advice}."
    )
