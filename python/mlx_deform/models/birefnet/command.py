"""What `python -m mlx_deform.models.birefnet` does with its arguments."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from .config import config_of
from .inference import cut_out, read_picture
from .model import MULTIPLE, BiRefNet
from .weights import load_model, save_weights

RANDOM = "the weights are random (--random-weights): the masks mean nothing"


class CommandError(Exception):
    """The job cannot run; the message says why."""


def output_paths(inputs: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Where the mask and the cut-out of each input go."""
    pairs = [
        (folder / f"{path.stem}_mask.png", folder / f"{path.stem}_cutout.png") for path in inputs
    ]
    if len(set(pairs)) < len(pairs):
        names = [path.name for path in inputs]
        twice = sorted({n for n, pair in zip(names, pairs, strict=True) if pairs.count(pair) > 1})
        raise CommandError(f"pictures must have names of their own; got {', '.join(twice)}")
    return pairs


def dtype_of(name: str | None) -> mx.Dtype:
    """By default what suits the device: CPUs have no fast halves."""
    if name is None:
        name = "float32" if mx.default_device().type == mx.cpu else "float16"
    return getattr(mx, name)


def build(options) -> BiRefNet:
    dtype = dtype_of(options.dtype)
    try:
        if not options.random_weights:
            return load_model(
                options.weights, options.model, dtype=dtype, patch_order=options.patch_order
            )
        config = config_of(options.model or "BiRefNet")
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    print(f"mlx_deform: warning: {RANDOM}", file=sys.stderr)
    mx.random.seed(0)
    model = BiRefNet(replace(config, patch_order=options.patch_order or config.patch_order))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def run(options) -> bool:
    """Whether every picture was cut out."""
    paths = output_paths(options.inputs, options.out)
    model = build(options)
    size = options.size or model.config.size
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out can't be made: {error}") from None
    if options.save_weights:
        try:
            save_weights(model, options.save_weights)
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandError(str(error)) from None
        print(f"saved    {options.save_weights}")

    dtype = model.bb.patch_embed.proj.weight.dtype
    print(
        f"model    {model.config.backbone_name}, {size[1]}x{size[0]}, "
        f"{str(dtype).rsplit('.', 1)[-1]}, on the {mx.default_device().type.name}"
    )
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    failed = 0
    with tqdm(total=len(paths) * model.step_count, unit="step", disable=None) as bar:
        for index, (path, outputs) in enumerate(zip(options.inputs, paths, strict=True)):
            bar.set_description(f"{path.name} ({index + 1} of {len(paths)})")
            try:
                results = cut_out(model, read_picture(path), size, bar.update)
                for result, output in zip(results, outputs, strict=True):
                    result.save(output)
            except (OSError, ValueError) as error:
                failed += 1
                tqdm.write(f"mlx_deform: {path}: {error}", file=sys.stderr)
                bar.update((index + 1) * model.step_count - bar.n)
            else:
                tqdm.write(f"saved    {outputs[0]}\nsaved    {outputs[1]}", file=sys.stdout)
    if failed < len(paths):
        peak = mx.get_peak_memory()
        print(f"memory   {megabytes(peak)} at the peak, of which {megabytes(held)} are weights")
    if options.random_weights:
        print(f"note     {RANDOM}")
    return failed == 0


def parse_size(text: str) -> tuple[int, int]:
    """ "1024", or "2560x1440", width first, to height and width."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text, re.ASCII)
    if not match:
        raise ValueError
    size = (int(match[2] or match[1]), int(match[1]))
    if any(side < MULTIPLE or side % MULTIPLE for side in size):
        raise ValueError
    return size
