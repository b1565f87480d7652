"""`python -m mlx_deform.demo`: trains with and without a deformable convolution, side by side."""

import argparse
import sys
from pathlib import Path

import mlx.core as mx

from ..__main__ import at_least
from . import training

DESCRIPTION = """\
Trains two small networks to restore noisy frames with the help of a neighbouring frame that
moved by several pixels. One aligns the neighbour by a deformable convolution, the other has
an ordinary one; both see both frames and the motion vectors of 16x16 blocks, as a video
stream holds them, and have about as many parameters. Prints how close both come to the truth
on pictures that neither has seen, and saves a picture of the results and of where the trained
kernels sample. Takes about a minute on two cores.

Also trains data-parallel, on N processes of this machine or of several:
  mlx.launch -n N -- python -m mlx_deform.demo
"""
EPILOG = "exit status: 0 when trained, 2 when the job cannot run (say, a missing package)."

PACKAGES = {"matplotlib", "skimage", "tqdm"}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m mlx_deform.demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds",
        type=at_least(int, 1),
        default=3,
        metavar="N",
        help="how often to train each network, from other initial weights (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=at_least(int, 1),
        default=200,
        metavar="N",
        help="of training, for each network (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(int, 1, 1024),
        default=8,
        metavar="N",
        help="pairs of frames in a step, of all processes together (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=at_least(float, 0, 1),
        default=3e-3,
        metavar="X",
        help="of Adam, after a warm-up and before a decay (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mlx_deform_demo.png"),
        metavar="PNG",
        help="where to save the picture (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists; got {options.out}")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    group = mx.distributed.init()
    try:
        training.check_batch_size(options.batch_size, group)
    except ValueError as error:
        print(f"mlx_deform: {error}", file=sys.stderr)
        return 2
    try:
        from . import experiment

        experiment.run(options, group)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in PACKAGES:
            raise
        reason = f'{package} is not installed; pip install "mlx-deform[demo]"'
        print(f"mlx_deform: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
