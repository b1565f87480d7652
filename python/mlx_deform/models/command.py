"""What the models' commands share: `python -m mlx_deform.models.<model> picture.jpg ...`.

Nothing here but :func:`each_picture` needs a package besides MLX, so that a missing one can be
told of.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from PIL import Image

DTYPES = ("float32", "float16", "bfloat16")

# What the commands need besides MLX.
PACKAGES = {"numpy", "PIL", "tqdm"}


class CommandError(Exception):
    """The job cannot run; the message says why."""


def exit_status(job: Callable[[], bool], extra: str) -> int:
    """0 when a job is done, 1 when a part of it is not, 2 when it cannot run.

    extra: that of the distribution which installs the job's packages.
    """
    try:
        return 0 if job() else 1
    except CommandError as error:
        reason = str(error)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        reason = f'{error.name} is not installed; pip install "mlx-deform[{extra}]"'
    print(f"mlx_deform: {reason}", file=sys.stderr)
    return 2


def dtype_of(name: str | None) -> mx.Dtype:
    """By default what suits the device: CPUs have no fast halves."""
    if name is None:
        name = "float32" if mx.default_device().type == mx.cpu else "float16"
    return getattr(mx, name)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def output_paths(inputs: list[Path], folder: Path, *endings: str) -> list[tuple[Path, ...]]:
    """Where the results of each input go: its name with each ending, in a folder."""
    paths = [tuple(folder / f"{path.stem}{ending}" for ending in endings) for path in inputs]
    if len(set(paths)) < len(paths):
        names = [path.name for path in inputs]
        twice = sorted({n for n, own in zip(names, paths, strict=True) if paths.count(own) > 1})
        raise CommandError(f"pictures must have names of their own; got {', '.join(twice)}")
    return paths


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out can't be made: {error}") from None


def each_picture(
    paths: list[Path],
    steps: int,
    work: Callable[[int, "Image.Image", Callable[[], None]], str],
) -> int:
    """Works on pictures one after another, with a progress bar; those that fail are told.

    Args:
        paths: Of the pictures.
        steps: The number of steps of each.
        work: Called with the picture's index, the picture, and what to call after each step;
            gives what is to be printed.

    Returns:
        int: How many failed.
    """
    from tqdm import tqdm

    from .pictures import read_picture

    failed = 0
    with tqdm(total=len(paths) * steps, unit="step", disable=None) as bar:
        for index, path in enumerate(paths):
            bar.set_description(f"{path.name} ({index + 1} of {len(paths)})")
            try:
                told = work(index, read_picture(path), bar.update)
            except (OSError, ValueError) as error:
                failed += 1
                tqdm.write(f"mlx_deform: {path}: {error}", file=sys.stderr)
                bar.update((index + 1) * steps - bar.n)
            else:
                tqdm.write(told, file=sys.stdout)
    return failed
