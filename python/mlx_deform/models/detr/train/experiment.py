"""The whole demo: both networks, the table, the checkpoint, the pictures."""

import time

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..weights import save_model
from . import picture
from .evaluation import Precision, average_precision, find
from .scenes import CLASSES, SIDE, Scenes
from .training import KINDS, Recipe, count, network, train

SHOWN = 8  # scenes of the picture
HELD_OUT_SEED = 2**32 - 1
TITLES = {
    "deformable": "deformable sampling",
    "fixed": "sampling fixed to the reference points",
}


def print_table(precisions: dict[str, Precision], seconds: dict[str, float]) -> None:
    print(f"\n{'held-out scenes':<40}{'mAP':>7}{'mAP50':>8}{'trained in':>12}")
    for kind, precision in precisions.items():
        row = f"{precision.mean:7.3f}{precision.half:8.3f}{seconds[kind]:10.0f} s"
        print(f"{TITLES[kind]:<40}{row}")
    print(f"\n{'AP at IoU 0.5':<40}" + "".join(f"{name:>12}" for name in CLASSES))
    for kind, precision in precisions.items():
        row = "".join(f"{precision.by_class[name]:12.3f}" for name in CLASSES)
        print(f"{TITLES[kind]:<40}{row}")


def run(options) -> dict[str, Precision]:
    """Gives the precisions by kind of network."""
    recipe = Recipe(options.steps, options.batch_size, options.learning_rate)
    kinds = KINDS[:1] if options.alone else KINDS
    rng = np.random.default_rng(HELD_OUT_SEED)
    tests = Scenes(held_out=True)
    held_out = [tests.scene(rng) for _ in range(options.scenes)]
    scenes = Scenes()
    print(f"data      scenes of {SIDE}x{SIDE} pixels with 1 to 5 of {', '.join(CLASSES)}")
    print(f"          {recipe.steps * recipe.batch_size} to train on, {len(held_out)} held out")

    found, precisions, seconds = {}, {}, {}
    with tqdm(total=len(kinds) * recipe.steps, unit="step", disable=None, mininterval=0.5) as bar:
        for kind in kinds:
            model = network(kind, options.seed)
            tqdm.write(f"network   {TITLES[kind]}, {count(model)} parameters")
            bar.set_description(kind)

            def progress(loss):
                bar.set_postfix(loss=f"{loss:.1f}", refresh=False)
                bar.update()

            start = time.perf_counter()
            train(model, scenes, recipe, options.seed, progress)
            seconds[kind] = time.perf_counter() - start
            found[kind] = find(model, held_out)
            precisions[kind] = average_precision(held_out, found[kind])
            if kind == "deformable":
                save_model(model, options.out)
    print_table(precisions, seconds)

    titled = {
        f"{TITLES[kind]}: mAP50 {precisions[kind].half:.2f}": found[kind][:SHOWN] for kind in kinds
    }
    picture.save(held_out[:SHOWN], titled, options.out / "detections.png")
    Image.fromarray(held_out[0].picture).save(options.out / "scene.png")
    print(f"\nsaved     {options.out}: the checkpoint, detections.png, scene.png")
    print(f"try       python -m mlx_deform.models.detr {options.out / 'scene.png'} ", end="")
    print(f"--weights {options.out}")
    return precisions
