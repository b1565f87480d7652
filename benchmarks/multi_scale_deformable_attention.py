"""Times mlx_deform.multi_scale_deformable_attention: every case is checked, then raced.

Its peers are the form of grid_sample that models in PyTorch use, the same op in MLX's own
primitives, and mmcv's and deformops' kernels where these can be imported. GB/s count every
argument, result and gradient once for each time that a perfect cache would move it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from deform_conv2d import cores, dtypes, positive, set_environment, words

# Sizes, arrays, oracle and tolerances are those of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

EPILOG = """\
exit status: 0; 1 when results are not those of the reference; 2 for wrong arguments.
Peers that are not installed are left out. Nothing else should run on the machine.
"""
# Peers whose call would take longer than they may are found out with this part of the queries.
TRIAL = 16


def named_cases():
    """The op as four models call it, for one image. Encoders ask at every pixel."""
    from msda_cases import Config

    def case(shapes, points, Q=None, ragged=False):
        config = Config(N=1, shapes=shapes, M=8, D=32, points=points, ragged=ragged, kind="model")
        return config.but(Q=Q or config.S)

    pyramid = ((80, 80), (40, 40), (20, 20))
    return {
        "rt-detr-decoder": case(pyramid, (4, 4, 4), Q=300),
        "d-fine-decoder": case(pyramid, (3, 6, 3), Q=300, ragged=True),
        "deformable-detr-encoder": case(((100, 134), (50, 67), (25, 34), (13, 17)), (4,) * 4),
        "mask2former-pixel-decoder": case(((32, 32), (64, 64), (128, 128)), (4,) * 3),
    }


def make_problem(name, config, seed=0):
    """Samples of a pixel's query lie some 2 pixels around it on every level, those of another
    query within a tenth of the map."""
    import numpy as np

    from msda_cases import LOCATION_GRID
    from problem import Problem, _held_by_bfloat16

    rng = np.random.default_rng(seed)
    sizes = np.array([shape[::-1] for shape in config.shapes], np.float32)
    samples = (config.N, config.Q, config.M, config.K)
    noise = rng.standard_normal((*samples, 2), dtype=np.float32)
    if config.Q == config.S:
        centres = [
            np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1)
            for h, w in config.shapes
        ]
        centres = np.concatenate([c.reshape(-1, 2) for c in centres])[None]
        noise *= 2 / np.repeat(sizes, config.points, 0)
    else:
        centres = rng.random((config.N, config.Q, 2))
        noise *= 0.1
    locations = centres[:, :, None, None] + noise
    weights = rng.random(samples, dtype=np.float32)
    arrays = {
        "value": _held_by_bfloat16(
            rng.standard_normal((config.N, config.S, config.M, config.D), dtype=np.float32)
        ),
        # Exact in every implementation: none rounds a sample into another cell.
        "locations": (np.round(locations / LOCATION_GRID) * LOCATION_GRID).astype(np.float32),
        "weights": weights / weights.sum(-1, keepdims=True),
        "cotangent": _held_by_bfloat16(rng.standard_normal(config.output_shape, dtype=np.float32)),
    }
    return Problem(name, config, arrays)


def gigabytes(problem, dtype, which):
    from problem import FORWARD

    elements = {name: array.size for name, array in problem.arrays.items()}
    item = 4 if dtype == "float32" else 2
    value, output = item * elements["value"], item * elements["cotangent"]
    samples = 4 * (elements["locations"] + elements["weights"])
    once = value + samples + output
    if which == FORWARD:
        return once / 1e9
    return (once + 2 * (value + samples) + output) / 1e9  # read again, and the gradients


def contender_classes():
    """Ours, and its peers; each is built from (problem, dtype, threads)."""
    import mlx.core as mx

    import mlx_deform
    from contenders import _Mlx, device_kind
    from msda_cases import ARGUMENTS, call
    from numerics import to_mx
    from peers import TORCH_DEVICES, Torch, imported

    class Ours(_Mlx):
        name = "mlx_deform"

        def __init__(self, problem, dtype, threads):
            super().__init__(problem, dtype, threads, ARGUMENTS)
            # Beside a half value, locations and weights stay what they are in models.
            self.values[1:] = [to_mx(problem.arrays[name], "float32") for name in ARGUMENTS[1:]]
            mx.eval(self.values)

        def function(self, *values):
            return call(self.config, *values)

    class Portable(Ours):
        name = "MLX primitives"

        def function(self, *values):
            with mlx_deform.portable():
                return super().function(*values)

    class _Torch(Torch):
        names = ARGUMENTS

        def __init__(self, problem, dtype, threads):
            super().__init__(problem, dtype, threads, TORCH_DEVICES[device_kind()])

        def layout(self, name, array):
            return array

        def from_layout(self, name, array):
            return array

    class GridSample(_Torch):
        name = "torch grid_sample"

        def function(self, value, locations, weights):
            config, torch = self.config, self.torch
            N, M, D, Q = config.N, config.M, config.D, config.Q
            maps = value.split([h * w for h, w in config.shapes], dim=1)
            grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).split(config.points, dim=2)
            samples = [
                torch.nn.functional.grid_sample(
                    pixels.flatten(2).transpose(1, 2).reshape(N * M, D, h, w),
                    grid,
                    mode="bilinear",
                    padding_mode="zeros",
                    align_corners=False,
                )
                for (h, w), pixels, grid in zip(config.shapes, maps, grids, strict=True)
            ]
            shares = weights.transpose(1, 2).reshape(N * M, 1, Q, config.K)
            output = (torch.cat(samples, dim=-1) * shares).sum(-1)
            return output.view(N, M * D, Q).transpose(1, 2).contiguous()

    class _Kernels(_Torch):
        """CUDA kernels by their common call; as many points on every level only."""

        def __init__(self, problem, dtype, threads):
            self.op = self.find()
            super().__init__(problem, dtype, threads)
            shapes = self.torch.tensor(self.config.shapes, device=self.device)
            areas = shapes.prod(1)
            self.levels = (shapes, areas.cumsum(0) - areas)

        def function(self, value, locations, weights):
            equal = (len(self.config.shapes), self.config.points[0])
            return self.op(
                value, *self.levels, locations.unflatten(3, equal), weights.unflatten(3, equal), 64
            )

    class Mmcv(_Kernels):
        name = "mmcv"

        def find(self):
            return imported("mmcv.ops").MultiScaleDeformableAttnFunction.apply

    class DeformOps(_Kernels):
        name = "deformops"

        def find(self):
            return imported("deformops").multi_scale_deformable_attention

    return Ours, (GridSample, Portable, Mmcv, DeformOps)


def runner(contender, which):
    return lambda count=1: contender.run(which, count)


def built(peers, problem, dtype, options, note):
    """The peers that can take part, by name, and the passes that they are given."""
    from problem import PASSES, Problem
    from timing import timed

    few = max(1, problem.config.Q // TRIAL)
    small = {
        name: array if name == "value" else array[:, :few] for name, array in problem.arrays.items()
    }
    trial_problem = Problem(problem.name, problem.config.but(Q=few), small)
    contenders, passes = {}, {}
    for peer in peers:
        try:
            trial = peer(trial_problem, dtype, options.threads)
            allowed = []
            for which in PASSES:
                timed(runner(trial, which))
                seconds = timed(runner(trial, which)) * problem.config.Q / few
                if seconds > options.patience:
                    note(f"{peer.name}, {which}: a call would take some {seconds:.0f} s")
                    break
                allowed.append(which)
            if allowed:
                contenders[peer.name] = peer(problem, dtype, options.threads)
                passes[peer.name] = allowed
        except Exception as error:  # not installed, or doesn't do this case
            text = str(error).strip() or type(error).__name__
            note(f"{peer.name}: {text.splitlines()[0][:120]}")
    return contenders, passes


def check(problem, dtype, ours, reference):
    """Against the oracle on small maps, and against grid_sample at full size."""
    from msda_cases import check_against_oracle, random_arrays
    from problem import BACKWARD, Mismatch, check_against

    small = problem.config.but(
        N=2, Q=9, M=3, shapes=((5, 7), (3, 4), (4, 2), (1, 6))[: len(problem.config.shapes)],
        kind="near",
    )  # fmt: skip
    try:
        check_against_oracle(small, random_arrays(small, seed=0), dtype)
    except AssertionError as error:
        raise Mismatch(str(error)) from None
    if reference is not None:
        want = reference.as_numpy(reference.run(BACKWARD))
        check_against(want, ours.as_numpy(ours.run(BACKWARD)), dtype, tf32=False)


def memory_worker(name, batch, dtype, threads):
    """Print {pass: MB} beside arguments and results, of a process that does nothing else."""
    import mlx.core as mx

    from memory import MB, ResidentPeak
    from problem import PASSES

    mx.set_default_device(mx.cpu)
    config = named_cases()[name].but(N=batch)
    ours = contender_classes()[0]
    small = ours(make_problem(name, named_cases()["rt-detr-decoder"].but(Q=10)), dtype, threads)
    subject = ours(make_problem(name, config), dtype, threads)
    for which in PASSES:
        small.run(which)
    mx.clear_cache()
    peak, measured = ResidentPeak(), {}
    for which in PASSES:
        peak.reset()
        results = subject.run(which)
        measured[which] = max(0, peak.rise() - sum(r.nbytes for r in results)) / MB
        del results
        mx.clear_cache()
    print(json.dumps(measured))


def extra_megabytes(name, batch, dtype, options):
    arguments = ["--memory-worker", name, str(batch), dtype, str(options.threads)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def rows(name, config, dtype, options, note):
    """One line of text for each pass."""
    from contenders import device_kind
    from problem import PASSES
    from report import factor, milliseconds
    from timing import race

    problem = make_problem(name, config)
    ours_class, peers = contender_classes()
    ours = ours_class(problem, dtype, options.threads)
    others, passes = built(() if options.no_peers else peers, problem, dtype, options, note)
    complete = passes.get("torch grid_sample") == list(PASSES) and dtype == "float32"
    check(problem, dtype, ours, others["torch grid_sample"] if complete else None)
    extra = {}
    if device_kind() == "cpu":
        extra = extra_megabytes(name, config.N, dtype, options)
    for which in PASSES:
        runs = {ours.name: runner(ours, which)}
        runs |= {who: runner(c, which) for who, c in others.items() if which in passes[who]}
        timings = race(runs, options.seconds, options.repeats)
        ours_s = timings.pop(ours.name).median_s
        cells = [
            f"{milliseconds(ours_s):>8} ms",
            f"{gigabytes(problem, dtype, which) / ours_s:6.1f} GB/s",
            f"{extra[which]:6.1f} MB extra" if which in extra else "",
            *(
                f"{who} {milliseconds(t.median_s)} ms ({factor(t.median_s / ours_s)})"
                for who, t in timings.items()
            ),
        ]
        yield f"{name:<26} x{config.N}  {dtype:<8}  {which:<16}  {'  '.join(cells)}"


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--cases", type=words, metavar="NAMES", help="by commas (default: all)")
    option("--list", action="store_true", help="name the cases, and stop")
    option(
        "--batch",
        type=lambda text: [positive(int)(word) for word in words(text)],
        default=[1, 8],
        metavar="N",
        help="images at once, by commas (default: 1,8)",
    )
    option("--dtype", type=dtypes, default=["float32"], metavar="TYPES", help="default: float32")
    option("--no-peers", action="store_true", help="the library alone")
    option("--device", choices=("cpu", "gpu"), help="where MLX computes (default: MLX's default)")
    option("--threads", type=positive(int), default=cores(), metavar="N", help="of everyone")
    option("--seconds", type=positive(float), default=2.0, metavar="S",
           help="that a contender has for a pass of a case (default: 2)")  # fmt: skip
    option("--patience", type=positive(float), default=20.0, metavar="S",
           help="leave out peers whose single call would take longer (default: 20)")  # fmt: skip
    option("--repeats", type=positive(int), default=15, metavar="N", help="samples (default: 15)")
    options = parser.parse_args(arguments)
    options.tf32 = False
    known = named_cases()
    options.cases = options.cases or list(known)
    for name in options.cases:
        if name not in known:
            parser.error(f"no case is named {name}; there are {', '.join(known)}")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(options.cases))
        return 0
    set_environment(options)
    import mlx.core as mx

    if options.device:
        mx.set_default_device(mx.Device(getattr(mx, options.device), 0))
    from contenders import device_kind
    from problem import Mismatch
    from report import describe, machine

    print(describe(machine(device_kind(), options.threads)), flush=True)
    notes = {}
    for name in options.cases:
        for batch in options.batch:
            for dtype in options.dtype:
                config = named_cases()[name].but(N=batch)
                where = f"{name} x{batch} {dtype}"
                try:
                    for line in rows(
                        name, config, dtype, options,
                        lambda text, where=where: notes.setdefault(text, []).append(where),
                    ):  # fmt: skip
                        print(line, flush=True)
                except Mismatch as mismatch:
                    print(f"{where}: mlx_deform disagrees with the reference: {mismatch}")
                    return 1
    total = len(options.cases) * len(options.batch) * len(options.dtype)
    for note, where in notes.items():
        print(f"note: {note}" + ("" if len(where) == total else f" ({', '.join(where)})"))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-worker"]:
        case, batch_text, dtype_name, threads_text = sys.argv[2:]
        memory_worker(case, int(batch_text), dtype_name, int(threads_text))
    else:
        sys.exit(main())
