"""What `python -m mlx_deform.models.birefnet` does with its arguments."""

import re
import sys
from dataclasses import replace

import mlx.core as mx

from ..command import CommandError, dtype_of, each_picture, make_folder, megabytes, output_paths
from .config import config_of
from .inference import cut_out
from .model import MULTIPLE, BiRefNet
from .weights import load_model, save_weights

RANDOM = "the weights are random (--random-weights): the masks mean nothing"


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


def run(options) -> bool:
    """Whether every picture was cut out."""
    paths = output_paths(options.inputs, options.out, "_mask.png", "_cutout.png")
    model = build(options)
    size = options.size or model.config.size
    make_folder(options.out)
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

    def work(index, picture, on_step):
        results = cut_out(model, picture, size, on_step)
        for result, output in zip(results, paths[index], strict=True):
            result.save(output)
        return "\n".join(f"saved    {output}" for output in paths[index])

    failed = each_picture(options.inputs, model.step_count, work)
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
