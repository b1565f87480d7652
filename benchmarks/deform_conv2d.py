"""Times mlx_deform.deform_conv2d: every case is checked first, then raced with its peers.

The measure is the bare matrix products of the same size: one for a forward, three for a
forward with its backward (the gradients of all five arguments).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from named_cases import CASES, SETS, select

DTYPES = ("float32", "bfloat16", "float16")
EPILOG = """\
exit status: 0; 1 when results are not those of the reference; 2 for wrong arguments.
Peers that are not installed are left out. Nothing else should run on the machine.
"""


def cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def words(text):
    return [word for word in text.split(",") if word]


def dtypes(text):
    unknown = [word for word in words(text) if word not in DTYPES]
    if unknown or not words(text):
        raise argparse.ArgumentTypeError(f"{text} is not among {', '.join(DTYPES)}")
    return words(text)


def positive(kind):
    def convert(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = kind.__name__
    return convert


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--list", action="store_true", help="name the cases and sets, and stop")
    option(
        "--cases",
        type=words,
        metavar="NAMES",
        help=f"cases, patterns or sets ({', '.join(SETS)}), by commas (default: all)",
    )
    option(
        "--dtype",
        type=dtypes,
        default=["float32", "bfloat16"],
        metavar="TYPES",
        help=f"by commas, of {', '.join(DTYPES)} (default: float32,bfloat16)",
    )
    option("--quick", action="store_true", help="small cases, few samples, no peers' memory")
    option("--no-peers", action="store_true", help="the library and its bound alone")
    option("--device", choices=("cpu", "gpu"), help="where MLX computes (default: MLX's default)")
    option("--threads", type=positive(int), metavar="N", help="of everyone (default: all cores)")
    option("--scaling", action="store_true", help="one thread against --threads, and stop")
    option("--tf32", action="store_true", help="let NVIDIA GPUs round float32 products to TF32")
    option(
        "--seconds",
        type=positive(float),
        metavar="S",
        help="that a contender has for a pass of a case (default: 2; 0.2 with --quick)",
    )
    option(
        "--patience",
        type=positive(float),
        default=20.0,
        metavar="S",
        help="leave out peers whose single call would take longer (default: 20)",
    )
    option("--repeats", type=positive(int), metavar="N", help="samples (default: 15; 5)")
    option(
        "--memory-of",
        type=words,
        default=["mlx_deform"],
        metavar="WHO",
        help="mlx_deform,torchvision, one of them, or none (default: mlx_deform)",
    )
    option("--json", type=Path, metavar="FILE", help="write all the results")
    option("--chart", type=Path, metavar="PNG", help="draw the times in units of the bound's")
    option("--markdown", action="store_true", help="print the table as Markdown in the end")
    options = parser.parse_args(arguments)

    options.threads = options.threads or cores()
    options.seconds = options.seconds or (0.2 if options.quick else 2.0)
    options.repeats = options.repeats or (5 if options.quick else 15)
    options.memory_of = [who for who in options.memory_of if who != "none"]
    if not set(options.memory_of) <= {"mlx_deform", "torchvision"}:
        parser.error("--memory-of knows mlx_deform, torchvision and none")
    patterns = options.cases or (["quick"] if options.quick else list(CASES))
    try:
        options.cases = select(patterns)
    except ValueError as error:
        parser.error(str(error))
    return options


def set_environment(options):
    """What libraries read when they are loaded or first used."""
    os.environ["MLX_DEFORM_NUM_THREADS"] = str(options.threads)
    os.environ["MLX_ENABLE_TF32"] = "1" if options.tf32 else "0"


def progress(cases):
    """The cases with a bar on stderr, and a function that prints beside it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cases.items(), lambda text: print(text, flush=True)
    bar = tqdm(cases.items(), unit="case", file=sys.stderr, disable=None)

    def described():
        for name, config in bar:
            bar.set_description(name)
            yield name, config

    def write(text):
        bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    return described(), write


def measure(options):
    """Print the table as it grows; returns the exit status."""
    set_environment(options)
    import mlx.core as mx

    if options.device:
        mx.set_default_device(mx.Device(getattr(mx, options.device), 0))
    from problem import Mismatch
    from report import OURS, Table, describe, machine, markdown, write_json
    from suite import Options, Suite

    suite = Suite(
        Options(
            dtypes=options.dtype,
            threads=options.threads,
            budget_s=options.seconds,
            repeats=options.repeats,
            patience_s=options.patience,
            with_peers=not options.no_peers,
            memory_of=options.memory_of,
            tf32=options.tf32,
        )
    )
    about = machine(suite.kind, options.threads)
    if suite.kind == "cpu":
        about["instruction_sets"] = suite.instruction_sets()
    table = Table(list(options.cases), [peer.name for peer in suite.peers], suite.bound.name)
    print(describe(about))
    for who, isa in about.get("instruction_sets", {}).items():
        print(f"instruction set of {who}: {isa}")
    print(table.header(), flush=True)

    rows, status = [], 0
    cases, write = progress(options.cases)
    for name, config in cases:
        try:
            for row in suite.rows(name, config):
                rows.append(row)
                write(table.line(row))
        except Mismatch as mismatch:
            write(f"{name}: {OURS} disagrees with the reference: {mismatch}")
            status = 1
            break
    for note, where in suite.notes.items():
        everywhere = len(set(where)) == len(options.cases)
        print(f"note: {note}" + ("" if everywhere else f" ({', '.join(dict.fromkeys(where))})"))

    if options.markdown:
        print(f"\n{markdown(rows, table.peers)}")
    if options.json:
        write_json(options.json, about, rows, suite.notes)
    if options.chart and rows:
        from chart import draw

        draw(options.chart, rows, describe(about))
    return status


def scaling(options):
    """Times with one thread and with all, each in a process of its own."""
    counts = list(dict.fromkeys((1, options.threads)))
    print(f"ms with {' and '.join(map(str, counts))} threads", flush=True)
    for name in options.cases:
        times = {}
        for count in counts:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                arguments = [f"--cases={name}", f"--dtype={','.join(options.dtype)}"]
                arguments += [f"--threads={count}", f"--seconds={options.seconds}"]
                arguments += [f"--repeats={options.repeats}", f"--json={file.name}"]
                arguments += ["--no-peers", "--device=cpu", "--memory-of=none"]
                done = subprocess.run(
                    [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=False
                )
                if done.returncode != 0:
                    sys.stdout.buffer.write(done.stdout)
                    return done.returncode
                for row in json.loads(Path(file.name).read_text())["rows"]:
                    for who in ("mlx_deform", row["bound"]):
                        key = (row["dtype"], row["which"], who)
                        times.setdefault(key, []).append(1e3 * row["timings"][who]["median_s"])
        for (dtype, which, who), ms in times.items():
            line = " -> ".join(f"{value:.3g}" for value in ms)
            label = f"{name}  {dtype}  {which}  {who}"
            print(f"{label:<70}  {line:>18} ms  {ms[0] / ms[-1]:.2f}x", flush=True)
    return 0


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.list:
        for title, cases in SETS.items():
            print(f"{title}: {', '.join(cases)}")
        return 0
    return scaling(options) if options.scaling else measure(options)


if __name__ == "__main__":
    sys.exit(main())
