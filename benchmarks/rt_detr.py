"""Times an RT-DETR on one picture: the whole model, and the deformable attention in it.

Predictions are checked against transformers' with the same random weights, then timed: the model
with the native op, with the op's sampling in MLX's own primitives, with plain convolutions and
linear layers in them too, and transformers' model in PyTorch; and the model's calls of the op
alone, with what it calls them with.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from unittest import mock

from deform_conv2d import cores, positive, set_environment

# The twins are those of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

EPILOG = "exit status: 0; 1 when predictions are not transformers'; 2 for wrong arguments."
MODEL, PEER = "the model", "transformers, torch"
SAMPLING, PRIMITIVES = "with sampling in MLX primitives", "with everything in MLX primitives"
OP, OP_IN_PRIMITIVES = "the op", "the op in MLX primitives"


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    option = parser.add_argument
    option("--model", default="rtdetr_r18vd", metavar="NAME", help="default: rtdetr_r18vd")
    option("--size", type=positive(int), default=640, metavar="N", help="a side (default: 640)")
    option("--threads", type=positive(int), default=cores(), metavar="N", help="of everyone")
    option("--seconds", type=positive(float), default=20.0, metavar="S",
           help="that a contender has (default: 20)")  # fmt: skip
    option("--repeats", type=positive(int), default=7, metavar="N", help="samples (default: 7)")
    options = parser.parse_args(arguments)
    options.tf32 = False
    return options


def calls_of_op(run):
    """The arguments of every call of the op in ``run()``, evaluated."""
    import mlx.core as mx

    from mlx_deform.nn import attention

    op, calls = attention.multi_scale_deformable_attention, []

    def recorded(*arguments, **settings):
        calls.append((arguments, settings))
        return op(*arguments, **settings)

    with mock.patch.object(attention, op.__name__, recorded):
        run()
    arrays = [a for arguments, _ in calls for a in arguments if isinstance(a, mx.array)]
    mx.eval(arrays)
    return calls


def repeated(call):
    def run(count=1):
        for _ in range(count):
            call()

    return run


@contextlib.contextmanager
def sampling_in_primitives():
    import mlx_deform
    from mlx_deform.nn import attention

    op = attention.multi_scale_deformable_attention

    def portable(*arguments, **settings):
        with mlx_deform.portable():
            return op(*arguments, **settings)

    with mock.patch.object(attention, op.__name__, portable):
        yield


def contenders(theirs, ours, pixels):
    """By name: calls that compute everything before they return."""
    import mlx.core as mx
    import torch

    import mlx_deform
    from detr_twin import channels_first

    picture, tensor = mx.array(pixels), channels_first(pixels)

    def model(context=contextlib.nullcontext):
        with context():
            outputs = ours(picture)
        mx.eval(outputs.logits, outputs.boxes)
        return outputs

    def peer():
        with torch.no_grad():
            return theirs(tensor)

    calls = calls_of_op(model)

    def op(context=contextlib.nullcontext):
        with context():
            mx.eval([mlx_deform.multi_scale_deformable_attention(*a, **s) for a, s in calls])

    return {
        MODEL: model,
        SAMPLING: lambda: model(sampling_in_primitives),
        PRIMITIVES: lambda: model(mlx_deform.portable),
        PEER: peer,
        OP: op,
        OP_IN_PRIMITIVES: lambda: op(mlx_deform.portable),
    }


def main(arguments=None):
    options = parse_arguments(arguments)
    set_environment(options)
    import mlx.core as mx
    import torch
    import transformers

    from contenders import device_kind
    from detr_twin import TOLERANCE, differences, pictures, twin
    from mlx_deform.models.detr import config_of
    from report import describe, factor, machine, milliseconds
    from timing import race

    mx.set_default_device(mx.cpu)
    torch.set_num_threads(options.threads)
    config = config_of(options.model)
    theirs, ours = twin(transformers.AutoConfig.for_model(**config.to_json()))
    runs = contenders(theirs, ours, pictures(options.size, options.size))

    print(describe(machine(device_kind(), options.threads)))
    reference = runs[PEER]()
    for name in (MODEL, SAMPLING, PRIMITIVES):
        found = differences(runs[name](), reference)
        if not max(found) <= TOLERANCE:
            print(f"{name} disagrees with transformers: {max(found):.1e} > {TOLERANCE:.1e}")
            return 1
    timings = race({n: repeated(r) for n, r in runs.items()}, options.seconds, options.repeats)
    seconds = {name: timing.median_s for name, timing in timings.items()}
    print(f"{options.model}, one picture of {options.size}x{options.size}, float32; ms: median")
    pairs = ((SAMPLING, MODEL), (PRIMITIVES, MODEL), (PEER, MODEL), (OP_IN_PRIMITIVES, OP))
    for name, own in pairs:
        print(
            f"{own} {milliseconds(seconds[own])} ms; {name} {milliseconds(seconds[name])} ms "
            f"({factor(seconds[name] / seconds[own])})"
        )
    print(f"share of the op: {100 * seconds[OP] / seconds[MODEL]:.1f}% of the model's time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
