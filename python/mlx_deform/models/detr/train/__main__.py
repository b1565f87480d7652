"""`python -m mlx_deform.models.detr.train`: trains a detector, beside one that samples fixedly."""

import argparse
import sys
from pathlib import Path

from ....__main__ import at_least

DESCRIPTION = """\
Trains a small RT-DETRv2 from scratch to find and name objects that are cut from photographs
and pasted on others, and prints COCO's mean average precision on held-out scenes: other
backgrounds, other coins. Beside it, with the same seed and steps, the same network with its
deformable sampling fixed to the reference points. Takes about three minutes for each on two
cores.

In the folder of --out it leaves the checkpoint of the first (model.safetensors, config.json,
preprocessor_config.json), detections.png, which shows what both find, and scene.png, a held-out
scene for
  python -m mlx_deform.models.detr DIR/scene.png --weights DIR
"""
EPILOG = "exit status: 0 when trained, 2 when the job cannot run (say, a missing package)."

PACKAGES = {"PIL", "numpy", "pycocotools", "scipy", "skimage", "sklearn", "tqdm"}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m mlx_deform.models.detr.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=at_least(int, 1),
        default=600,
        metavar="N",
        help="steps to train each network (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(int, 1, 1024),
        default=8,
        metavar="N",
        help="scenes in a step, which are seen once (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=at_least(float, 0, 1),
        default=2e-3,
        metavar="X",
        help="of AdamW, after a warm-up and before a decay (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(int, 0),
        default=0,
        metavar="N",
        help="of the weights and the scenes (default: %(default)s)",
    )
    parser.add_argument(
        "--scenes",
        type=at_least(int, 1),
        default=200,
        metavar="N",
        help="held-out scenes to test on (default: %(default)s)",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="train the deformable network alone",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("detr_demo"),
        metavar="DIR",
        help="folder for the checkpoint and the pictures, made if need be (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        from .experiment import run

        options.out.mkdir(parents=True, exist_ok=True)
        run(options)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in PACKAGES:
            raise
        reason = f'{package} is not installed; pip install "mlx-deform[detr-train]"'
        print(f"mlx_deform: {reason}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mlx_deform: --out can't be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
