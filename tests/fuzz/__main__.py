import argparse
import faulthandler
from functools import partial

from tqdm import tqdm

from . import TARGETS, run
from .run import run_call

parser = argparse.ArgumentParser(prog="python -m fuzz", description="Calls at random.")
parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
parser.add_argument("--calls", type=int, default=20_000, help="of each target (default: 20000)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat this call alone")
options = parser.parse_args()
if unknown := set(options.targets) - set(TARGETS):
    parser.error(f"targets must be of {', '.join(TARGETS)}; got {', '.join(sorted(unknown))}")

faulthandler.enable()
for name in options.targets:
    target = TARGETS[name]
    if options.only is not None:
        print(name, run_call(target, options.seed, options.only))
        continue
    counts = run(target, options.calls, options.seed, partial(tqdm, desc=name, leave=False))
    print(
        f"{name}: {options.calls} calls", *(f"{n} {what}" for what, n in counts.items()), sep=", "
    )
