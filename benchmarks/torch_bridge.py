"""Times mlx_deform.torch: what a call costs beside the op's own, and torchvision beside it.

Each case is checked against torchvision, output and every gradient, before it is timed. Where
torch and MLX have a Metal device the tensors are on MPS, where torchvision has no backward.
"""

import argparse
import sys

from deform_conv2d import cores, positive, set_environment, words
from named_cases import CASES_FOR_TESTS, select

EPILOG = "exit status: 0; 1 when results are not torchvision's; 2 for wrong arguments."


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    option = parser.add_argument
    option(
        "--cases",
        type=words,
        default=["birefnet"],
        metavar="NAMES",
        help="cases, patterns or sets, by commas (default: birefnet)",
    )
    option("--threads", type=positive(int), default=cores(), metavar="N", help="of everyone")
    option(
        "--seconds",
        type=positive(float),
        default=2.0,
        metavar="S",
        help="that a contender has for a pass of a case (default: 2)",
    )
    option("--repeats", type=positive(int), default=15, metavar="N", help="samples (default: 15)")
    options = parser.parse_args(arguments)
    options.tf32 = False
    try:
        options.cases = select(options.cases)
    except ValueError as error:
        parser.error(str(error))
    return options


def contenders(problem, threads, device):
    """The op itself, the bridge with contiguous and with channels_last tensors, torchvision."""
    import torch

    import mlx_deform.torch
    from contenders import MlxDeform
    from peers import Torchvision

    class Bridge(Torchvision):
        name = "bridge"
        memory_format = torch.contiguous_format

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.op = mlx_deform.torch.deform_conv2d

        def tensor(self, array):
            tensor = super().tensor(array)
            if tensor.dim() != 4:
                return tensor
            return tensor.contiguous(memory_format=self.memory_format)

    class ChannelsLast(Bridge):
        name = "channels_last"
        memory_format = torch.channels_last

    kinds = (Bridge, ChannelsLast, Torchvision)
    made = {"op": MlxDeform(problem, "float32", threads)}
    return made | {kind.name: kind(problem, "float32", threads, device) for kind in kinds}


def check(made, reference):
    """Against torchvision on the CPU, which has a backward."""
    from problem import BACKWARD, check_against

    want = reference.as_numpy(reference.run(BACKWARD))
    for name in ("bridge", "channels_last"):
        check_against(want, made[name].as_numpy(made[name].run(BACKWARD)), "float32", tf32=False)


def runner(contender, which):
    return lambda count=1: contender.run(which, count)


def measure(options):
    set_environment(options)
    import mlx.core as mx

    from contenders import Unavailable
    from peers import Torchvision
    from problem import FORWARD, PASSES, Mismatch, make_problem
    from report import describe, factor, machine, milliseconds
    from timing import race

    try:
        import mlx_deform.torch
    except ImportError as error:
        print(f"needs torch and torchvision: {error}")
        return 2
    device = "mps" if mlx_deform.torch.is_available() else "cpu"
    mx.set_default_device(mx.gpu if device == "mps" else mx.cpu)
    print(describe(machine("metal" if device == "mps" else "cpu", options.threads)))

    def timings(name, config):
        problem = make_problem(name, config)
        made = contenders(problem, options.threads, device)
        reference = made["torchvision"]
        if device != "cpu":
            reference = Torchvision(problem, "float32", options.threads, "cpu")
        check(made, reference)
        for which in PASSES:
            if device != "cpu" and which != FORWARD:
                del made["torchvision"]
            runs = {who: runner(contender, which) for who, contender in made.items()}
            yield which, race(runs, options.seconds, options.repeats)

    try:
        print("\noverhead of the bridge: its time less that of the op, us")
        for name, config in CASES_FOR_TESTS.items():
            for which, times in timings(name, config):
                pairs = ((times["bridge"], times["op"]), (times["channels_last"], times["op"]))
                least = [f"{1e6 * (a.min_s - b.min_s):.0f}" for a, b in pairs]
                median = [f"{1e6 * (a.median_s - b.median_s):.0f}" for a, b in pairs]
                print(f"{name}  {which:<16}  least {least[0]}, median {median[0]}", end="")
                print(f"  (channels_last: least {least[1]}, median {median[1]})", flush=True)

        print("\nms: median (torchvision: its time over the bridge's)")
        print(f"{'case':<19}  {'pass':<16} {'op':>9} {'bridge':>9} {'channels_last':>14}", end="")
        print(f" {'torchvision':>20}", flush=True)
        for name, config in options.cases.items():
            for which, times in timings(name, config):
                cells = [milliseconds(times[who].median_s) for who in ("op", "bridge")]
                last = milliseconds(times["channels_last"].median_s)
                theirs = times.get("torchvision")
                ratio = "-"
                if theirs:
                    gain = factor(theirs.median_s / times["bridge"].median_s)
                    ratio = f"{milliseconds(theirs.median_s)} ({gain})"
                print(f"{name:<19}  {which:<16} {cells[0]:>9} {cells[1]:>9} {last:>14}", end="")
                print(f" {ratio:>20}", flush=True)
    except Unavailable as reason:
        print(f"needs torch and torchvision: {reason}")
        return 2
    except Mismatch as mismatch:
        print(f"the bridge disagrees with torchvision: {mismatch}")
        return 1
    return 0


def main(arguments=None):
    return measure(parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
