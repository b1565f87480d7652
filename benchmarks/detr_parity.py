"""Every published size of every detector beside transformers', with the same random weights.

Weights, biases and batch statistics are drawn at random, so that none hides another. Names and
shapes of the whole state dict must be the same; differences are the largest of all layers of the
decoder, of logits and of boxes (in units of the picture). Deformable DETR gets two pictures, one of
them padded.
"""

import argparse
import sys
from pathlib import Path

# The twins are those of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

EPILOG = "exit status: 0; 1 when a size is not transformers'; 2 for wrong arguments."


def parse_arguments(arguments):
    from mlx_deform.models.detr.families import CONFIGS

    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    option = parser.add_argument
    option("names", nargs="*", metavar="NAME", help="sizes, or the beginnings of their names")
    option("--height", type=int, default=320, help="of the picture, a multiple of 32")
    option("--width", type=int, default=448, help="of the picture, a multiple of 32")
    option("--threads", type=int, default=1, metavar="N", help="of PyTorch (default: 1)")
    options = parser.parse_args(arguments)
    sizes = {}  # those of several names once
    for name, config in CONFIGS.items():
        if not options.names or name.startswith(tuple(options.names)):
            sizes.setdefault(repr(config), name)
    options.names = list(sizes.values())
    if not options.names:
        parser.error(f"NAME must begin one of {', '.join(CONFIGS)}")
    return options


def compare(config, height, width):
    """Parameters in millions, and the largest differences of logits and boxes."""
    import mlx.core as mx
    import torch
    import transformers
    from mlx.utils import tree_flatten

    import deformable_detr_twin as deformable
    from detr_twin import assert_same_state, channels_first, differences, pictures, twin

    theirs_config = transformers.AutoConfig.for_model(**config.to_json())
    if config.model_type == "deformable_detr":
        theirs, ours = deformable.deformable_twin(theirs_config)
        pixels, mask = deformable.padded(height, width)
        with torch.no_grad():
            reference = deformable.call(theirs, pixels, mask)
        found = deformable.deformable_differences(deformable.called(ours, pixels, mask), reference)
    else:
        theirs, ours = twin(theirs_config)
        pixels = pictures(height, width)
        theirs.model.decoder.training = True  # D-FINE's then gives every layer's predictions
        with torch.no_grad():
            reference = theirs(channels_first(pixels))
        found = differences(ours(mx.array(pixels)), reference)
    assert_same_state(ours, theirs)
    parameters = sum(array.size for _, array in tree_flatten(ours.parameters()))
    return parameters / 1e6, *found


def main(arguments=None):
    options = parse_arguments(arguments)
    import torch

    from detr_twin import TOLERANCE
    from mlx_deform.models.detr import config_of

    torch.set_num_threads(options.threads)
    print(f"{options.height}x{options.width}, float32; differences at most {TOLERANCE:g}")
    print(f"{'model':42} {'parameters':>10} {'logits':>8} {'boxes':>8}")
    fits = True
    for name in options.names:
        millions, logits, boxes = compare(config_of(name), options.height, options.width)
        same = logits <= TOLERANCE and boxes <= TOLERANCE
        fits &= same
        verdict = "" if same else "  differs"
        print(f"{name:42} {millions:9.1f}M {logits:8.1e} {boxes:8.1e}{verdict}", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
