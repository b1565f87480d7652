"""Rows of results as a table, as Markdown, and as JSON; and what machine made them."""

import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from timing import Timing

OURS = "mlx_deform"
VERSIONS_OF = ("mlx-deform", "mlx", "torch", "torchvision", "onnxruntime", "scipy-openblas32")


@dataclass(frozen=True)
class Row:
    """One pass of one case in one type: Timings by contender, `bound` being one of them."""

    case: str
    dtype: str
    which: str
    gflop: float
    bound: str
    timings: dict[str, Timing]
    error: float | None = None  # against the reference, where it was run at full size
    extra_mb: dict[str, float] = field(default_factory=dict)

    @property
    def ours_s(self):
        return self.timings[OURS].median_s

    @property
    def gflops(self):
        return self.gflop / self.ours_s

    def to_bound(self, name=OURS):
        """Its time in units of the bare matrix products' time."""
        return self.timings[name].median_s / self.timings[self.bound].median_s

    def speedup(self, name):
        """How many times faster than this contender the library is."""
        return self.timings[name].median_s / self.ours_s


def milliseconds(seconds):
    value = 1e3 * seconds
    return f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def factor(value):
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _headings(peers):
    return ["case", "type", "pass", "ms", "GFLOP/s", "of bound", "extra MB", *peers]


def _cells(row, peers):
    def peer_cell(name):
        if name not in row.timings:
            return "-"
        return f"{milliseconds(row.timings[name].median_s)} ({factor(row.speedup(name))})"

    extra = [f"{row.extra_mb[who]:.1f}" for who in (OURS, "torchvision") if who in row.extra_mb]
    return [
        row.case,
        row.dtype,
        row.which,
        milliseconds(row.ours_s),
        f"{row.gflops:.3g}",
        factor(row.to_bound()),
        " / ".join(extra) or "-",
        *(peer_cell(name) for name in peers),
    ]


LEGEND = (
    "ms: median. of bound: our time over that of the bare matrix products ({bound}).\n"
    "extra MB: memory beside arguments and results (of ours / torchvision, if measured).\n"
    "Others: their ms (their time over ours)."
)


class Table:
    """Lines of fixed width, printed as the rows come."""

    def __init__(self, cases, peers, bound):
        self.peers = peers
        self.legend = LEGEND.format(bound=bound)
        longest = max(len(case) for case in cases)
        self.widths = [longest, 8, 16, 8, 8, 8, 12, *(max(15, len(name)) for name in peers)]

    def _line(self, cells):
        pairs = enumerate(zip(cells, self.widths, strict=True))
        aligned = (cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in pairs)
        return "  ".join(aligned).rstrip()

    def header(self):
        return f"{self.legend}\n\n{self._line(_headings(self.peers))}"

    def line(self, row):
        return self._line(_cells(row, self.peers))


def markdown(rows, peers):
    """The README's table."""
    headings = _headings(peers)
    rule = ["---"] * 3 + ["---:"] * (len(headings) - 3)
    lines = [headings, rule, *(_cells(row, peers) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(kind, threads):
    import mlx.core as mx

    versions = {}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": kind if kind == "cpu" else f"{kind}: {mx.device_info().get('device_name')}",
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(machine):
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['system']}, {machine['processor']}, device {machine['device']}, "
        f"{machine['threads']} threads; {versions}"
    )


def write_json(path, machine, rows, notes):
    document = {
        "command": shlex.join(sys.argv),
        "machine": machine,
        "rows": [
            {
                **asdict(row),
                "gflops": row.gflops,
                "to_bound": {name: row.to_bound(name) for name in row.timings},
            }
            for row in rows
        ],
        "notes": notes,
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
