"""The configurations that are timed, by name. The tests check every one of them too."""

import fnmatch
import sys
from pathlib import Path

# Sizes, arrays, oracle and tolerances are those of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from cases import Config


def _config(C, O, k, size, **changes):  # noqa: E741
    """A k x k convolution that keeps the map's size, with mask and bias."""
    return Config(
        N=1,
        H=size,
        W=size,
        C=C,
        O=O,
        kH=k,
        kW=k,
        stride=(1, 1),
        padding=(k // 2, k // 2),
        dilation=(1, 1),
        G=1,
        DG=1,
        offsets=1.0,
    ).but(**changes)


def _named(C, O, k, size, **changes):  # noqa: E741
    name = f"{C}to{O}-k{k}-{size}x{size}"
    for field, value in changes.items():
        name += f"-{field.lower()}{value}"
    return name, _config(C, O, k, size, **changes)


def _set(*cases):
    return dict(cases)


# candle's pull request reports times for these.
CANDLE = _set(_named(64, 64, 3, 32), _named(256, 256, 3, 64))

# The decoder blocks of BiRefNet at 1024x1024 pixels have 1x1, 3x3 and 7x7 kernels on maps
# of 32 to 256 pixels.
BIREFNET = _set(*(_named(64, 256, k, size) for size in (32, 64, 128, 256) for k in (1, 3, 7)))

# What the README's table shows.
TABLE = _set(
    _named(64, 64, 3, 32),
    _named(64, 64, 3, 64),
    _named(256, 256, 3, 64),
    _named(64, 256, 3, 128),
    _named(64, 256, 7, 64),
    _named(64, 64, 7, 128),
    _named(256, 256, 7, 64),
)

# Groups, batches, and what is too small or too odd for a vector or a matrix unit.
GROUPS = _set(_named(64, 64, 3, 64, DG=4), _named(64, 64, 3, 64, G=4), _named(64, 64, 3, 32, N=8))
ODD = _set(
    _named(3, 64, 3, 64),
    _named(20, 32, 3, 32, DG=4),
    _named(64, 1, 3, 64),
    _named(64, 64, 3, 64, G=64),
    _named(256, 256, 1, 32),
    _named(512, 512, 3, 7),
)

QUICK = _set(_named(64, 64, 3, 32), _named(20, 32, 3, 32, DG=4), _named(64, 256, 3, 32))

SETS = {
    "candle": CANDLE,
    "birefnet": BIREFNET,
    "table": TABLE,
    "groups": GROUPS,
    "odd": ODD,
    "quick": QUICK,
}
CASES = {name: config for cases in SETS.values() for name, config in cases.items()}

# For the tests alone: nothing in it takes time.
CASES_FOR_TESTS = _set(_named(4, 6, 3, 5))


def select(patterns):
    """The cases whose name or set matches one of the patterns, without repetition."""
    everything = {**CASES, **CASES_FOR_TESTS}
    selected = {}
    for pattern in patterns:
        names = SETS.get(pattern) or fnmatch.filter(everything, pattern)
        if not names:
            known = ", ".join([*SETS, *everything])
            raise ValueError(f"no case or set is named {pattern}; there are {known}")
        selected.update({name: everything[name] for name in names})
    return selected


def cropped(config, H=11, W=13):
    """The same convolution on a map small enough for the oracle, with its gradients."""
    return config.but(N=min(config.N, 2), H=min(config.H, H), W=min(config.W, W))
