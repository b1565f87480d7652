"""Time in units of the bare matrix products' time, as a bar chart."""

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from report import OURS, factor

COLORS = {
    OURS: "#d1495b",
    "torchvision": "#30638e",
    "onnxruntime": "#8ab17d",
    "torch conv2d": "#b8b8b8",
    "mlx conv2d": "#8d8d8d",
    "mps-deform-conv": "#8ab17d",
    "deformops": "#8ab17d",
}
BAR = 0.19  # inches


def _panel(axes, rows, names):
    """A group of bars for every row, from top to bottom, in the order of the names."""
    names = [name for name in names if any(name in row.timings for row in rows)]
    height = 0.84 / len(names)
    ratios = [row.to_bound(name) for row in rows for name in names if name in row.timings]
    for i, name in enumerate(names):
        drawn = [(y, row.to_bound(name)) for y, row in enumerate(rows) if name in row.timings]
        positions = [y + (i - (len(names) - 1) / 2) * height for y, _ in drawn]
        lengths = [length for _, length in drawn]
        axes.barh(positions, lengths, height, color=COLORS[name], label=name)
        for position, length in zip(positions, lengths, strict=True):
            weight = "bold" if name == OURS else "normal"
            label = axes.text(length * 1.04, position, factor(length), weight=weight)
            label.set(va="center", fontsize=7, bbox={"color": "white", "alpha": 0.8, "pad": 0.3})
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, 0.7 * min(ratios)), 2 * max(ratios))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())  # short axes would label these too
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.case for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"time / {rows[0].bound} (log scale; shorter is better)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{rows[0].which}, {rows[0].dtype}", fontsize=10)


def draw(path, rows, description):
    """One panel for every type and pass among the rows."""
    names = [name for name in COLORS if any(name in row.timings for row in rows)]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    passes = list(dict.fromkeys(row.which for row in rows))
    cases = len(dict.fromkeys(row.case for row in rows))
    inches = cases * len(names) * BAR + 1.1
    figure = Figure(figsize=(6.2 * len(passes), inches * len(dtypes) + 0.6), layout="constrained")
    panels = figure.subplots(len(dtypes), len(passes), squeeze=False)
    for dtype, line in zip(dtypes, panels, strict=True):
        for which, axes in zip(passes, line, strict=True):
            _panel(axes, [r for r in rows if (r.dtype, r.which) == (dtype, which)], names)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    figure.supxlabel(description, fontsize=7, color="#555555", wrap=True)
    figure.savefig(path, dpi=130)
