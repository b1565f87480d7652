"""`python -m mlx_deform`: the op on a photograph, as a picture to judge by eye."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Runs deform_conv2d on a photograph and saves what it did as a PNG: the points that an
ordinary and a deformable 3x3 kernel sample, and the op's output for an offset field that
acts as a magnifying lens. The output and the offset gradient are checked against a NumPy
reference, and the call is timed, beside torchvision's where that is installed.
"""
EPILOG = """\
exit status: 0 when the op agrees with the reference, 1 when it does not, 2 when the job
cannot run (an unreadable picture, a missing package).
"""


def at_least(kind, low, high=float("inf")):
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m mlx_deform",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "picture",
        nargs="?",
        metavar="PICTURE",
        help="an image file (default: a cat, a photograph that ships with scikit-image)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mlx_deform.png"),
        metavar="PNG",
        help="where to save the result (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=at_least(int, 32, 4096),
        default=512,
        metavar="PIXELS",
        help="shrink the picture to this many pixels on its longer side (default: %(default)s)",
    )
    parser.add_argument(
        "--strength",
        type=at_least(float, 0, 0.8),
        default=0.55,
        metavar="S",
        help="of the lens: 0 changes nothing, 0.8 enlarges five times (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(int, 1),
        default=9,
        metavar="N",
        help="timed calls, of which the median is printed (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        from . import _demo

        return 0 if _demo.run(**vars(options)) else 1
    except ImportError as error:
        if (error.name or "").split(".")[0] not in {"matplotlib", "numpy", "PIL", "skimage"}:
            raise
        reason = f'{error.name} is not installed; pip install "mlx-deform[demo]"'
    except OSError as error:
        reason = str(error)
    print(f"mlx_deform: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
