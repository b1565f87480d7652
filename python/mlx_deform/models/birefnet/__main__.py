"""`python -m mlx_deform.models.birefnet`: removes the background of pictures."""

import argparse
import sys
from pathlib import Path

from ..command import DTYPES, exit_status

DESCRIPTION = """\
Removes the background of pictures with BiRefNet. For each INPUT it writes NAME_mask.png, the
mask, and NAME_cutout.png, the picture with the mask as its transparency.
"""
EPILOG = """\
exit status: 0 when every picture is cut out, 1 when one cannot be read or written, 2 when the
job cannot run (wrong weights, a missing package).
"""


def size(text):
    from .command import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a multiple of 32, or two of them as WIDTHxHEIGHT"
        ) from None


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m mlx_deform.models.birefnet",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="a picture")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="an official checkpoint, .safetensors or .pth, or one of --save-weights",
    )
    source.add_argument(
        "--random-weights", action="store_true", help="try the command without weights"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the model's name on the hub, such as BiRefNet, BiRefNet_lite or RMBG-2.0 "
        "(default: what the backbone in the weights tells)",
    )
    parser.add_argument(
        "--size",
        type=size,
        metavar="PIXELS",
        help="side that the picture is resized to for the model, or WIDTHxHEIGHT (default: the "
        "model's, 1024 for most)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type to compute in (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--patch-order",
        choices=("channels", "columns"),
        help="how the decoder stacks patches of the picture (default: the model's; columns is "
        "that of BiRefNet's code before November 2024 and of RMBG-2.0)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for the results, made if need be (default: the current one)",
    )
    parser.add_argument(
        "--save-weights",
        type=Path,
        metavar="FILE",
        help="also write the weights as MLX has them, .safetensors, which load faster",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    def job():
        options = parse_arguments(arguments)
        from .command import run

        return run(options)

    return exit_status(job, extra="birefnet")


if __name__ == "__main__":
    sys.exit(main())
