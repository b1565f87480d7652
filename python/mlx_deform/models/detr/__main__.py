"""`python -m mlx_deform.models.detr`: finds and names the objects in pictures."""

import argparse
import sys
from pathlib import Path

from ..command import DTYPES, exit_status

DESCRIPTION = """\
Finds and names the objects in pictures with a detector of the DETR family. For each INPUT it
writes NAME_detections.png, the picture with boxes, labels and scores; for all of them
detections.json, in COCO's format.
"""
EPILOG = """\
exit status: 0 when objects were looked for in every picture, 1 when one cannot be read or
written, 2 when the job cannot run (wrong weights, a missing package).
"""
SMALLEST = "rtdetr_r18vd"


def share(text):
    try:
        number = float(text)
    except ValueError:
        number = None
    if number is None or not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return number


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m mlx_deform.models.detr",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="a picture")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="a checkpoint of the hub: a folder, or model.safetensors in it; config.json and "
        "preprocessor_config.json beside it are read",
    )
    source.add_argument(
        "--random-weights",
        nargs="?",
        const=SMALLEST,
        metavar="NAME",
        help="try the command without weights, after the pictures; NAME is a model's on the hub, "
        f"such as rtdetr_v2_r50vd (default: {SMALLEST})",
    )
    parser.add_argument(
        "--threshold",
        type=share,
        default=0.5,
        metavar="SCORE",
        help="what is told has a higher score, from 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type to compute in (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for the results, made if need be (default: the current one)",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    def job():
        options = parse_arguments(arguments)
        from .command import run

        return run(options)

    return exit_status(job, extra="detr")


if __name__ == "__main__":
    sys.exit(main())
