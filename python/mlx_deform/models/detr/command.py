"""What `python -m mlx_deform.models.detr` does with its arguments."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx

from ..command import CommandError, dtype_of, each_picture, make_folder, megabytes, output_paths
from .coco import category_ids, dataset, image_ids, results_of
from .detector import Detector
from .drawing import draw
from .families import config_of, model_of
from .inference import detect
from .weights import load_model

RANDOM = "the weights are random (--random-weights): the boxes mean nothing"
JSON = "detections.json"


def build(options) -> Detector:
    dtype = dtype_of(options.dtype)
    try:
        if options.random_weights is None:
            return load_model(options.weights, dtype=dtype)
        config = config_of(options.random_weights)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    print(f"mlx_deform: warning: {RANDOM}", file=sys.stderr)
    mx.random.seed(0)
    model = model_of(config)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def write_json(path: Path, contents: dict) -> None:
    try:
        path.write_text(json.dumps(contents, indent=1) + "\n")
    except OSError as error:
        raise CommandError(f"{JSON} can't be written: {error}") from None


def run(options) -> bool:
    """Whether objects were looked for in every picture."""
    paths = output_paths(options.inputs, options.out, "_detections.png")
    model = build(options)
    make_folder(options.out)

    names = model.config.id2label
    held = mx.get_active_memory()
    print(
        f"model    {model.config.model_type}, {len(names)} classes, {megabytes(held)} of weights, "
        f"{str(model.dtype).rsplit('.', 1)[-1]}, on the {mx.default_device().type.name}"
    )
    images, results = [], []
    numbers, categories = image_ids(options.inputs), category_ids(names)

    def work(index, picture, on_step):
        mx.reset_peak_memory()
        begin = time.perf_counter()
        found = detect(model, picture, options.threshold, on_step)
        seconds = time.perf_counter() - begin
        (output,) = paths[index]
        draw(picture, found, names).save(output)
        name = options.inputs[index].name
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": numbers[index], "file_name": name, **size})
        results.extend(results_of(found, numbers[index], categories))
        count = len(found.labels)
        return (
            f"saved    {output}: {count} object{'s' * (count != 1)}, {seconds:.2f} s, "
            f"{megabytes(mx.get_peak_memory())} at the peak"
        )

    failed = each_picture(options.inputs, model.step_count, work)
    write_json(options.out / JSON, dataset(images, results, names))
    print(f"saved    {options.out / JSON}")
    if options.random_weights is not None:
        print(f"note     {RANDOM}")
    return failed == 0
