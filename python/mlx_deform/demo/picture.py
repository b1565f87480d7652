"""What trained networks make of frames, and where the deformable one samples the neighbour."""

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure

from .frames import SIDE
from .networks import STRIDE, TAPS
from .training import psnr

EXAMPLES = (12, 24, 47)  # pairs to test on
PLACES = (6, 17)  # rows and columns of positions whose samples are drawn


def samples(network, batch):
    """Where the taps that align sample the neighbour, and where they would without offsets.

    Both are in pixels of the frame, (N, SIDE / STRIDE, SIDE / STRIDE, TAPS, 2).
    """
    neighbour, noisy, vectors = network.maps(batch)
    taps = np.indices(network.align.weight.shape[1:3]).reshape(2, TAPS).T - 1
    positions = np.indices(neighbour.shape[1:3]).transpose(1, 2, 0)[:, :, None]
    grid = np.broadcast_to(positions + taps, (len(batch), *neighbour.shape[1:3], TAPS, 2))
    offset = np.zeros(grid.shape)
    if "offset_conv" in network:
        offset = np.array(network.offset(neighbour, noisy, vectors)).reshape(grid.shape)
    middle = (STRIDE - 1) / 2  # of a position's pixels
    return STRIDE * (grid + offset) + middle, STRIDE * grid + middle


def show(axes, frame, title=None):
    axes.imshow(np.clip(np.array(frame), 0, 1), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
    if title:
        axes.set_title(title, fontsize=9)


def show_samples(axes, points, grid):
    """points, grid: of one pair, as samples gives them."""
    chosen = np.ix_(PLACES, PLACES)
    starts = grid[chosen][:, :, TAPS // 2].reshape(-1, 2)
    ends = points[chosen].mean(axis=2).reshape(-1, 2)
    taps = points[chosen].reshape(-1, 2)
    for start, end in zip(starts, ends, strict=True):
        axes.plot(*np.stack([start, end]).T[::-1], color="white", linewidth=1.5)
    axes.scatter(*taps.T[::-1], s=16, color="gold", edgecolors="black", linewidths=0.5)
    axes.scatter(
        *starts.T[::-1], s=55, color="limegreen", marker="P", edgecolors="white", linewidths=0.7
    )


def draw(networks, data, out):
    """networks: by kind; a row for each example."""
    batch = data.test[mx.array(EXAMPLES)]
    results = {kind: network(batch) for kind, network in networks.items()}
    points, grid = samples(networks["deformable"], batch)
    figure = Figure(figsize=(10.2, 2.2 * len(EXAMPLES) + 0.6), layout="constrained", dpi=90)
    rows = figure.subplots(len(EXAMPLES), 3 + len(results))
    scores = {kind: psnr(frames, batch.truth) for kind, frames in results.items()}
    noisy_scores = psnr(batch.noisy, batch.truth)
    for index, row in enumerate(rows):
        show(row[0], batch.noisy[index], f"noisy, {noisy_scores[index]:.1f} dB")
        show(row[1], batch.neighbour[index], "its neighbour, and samples")
        show_samples(row[1], points[index], grid[index])
        for axes, (kind, frames) in zip(row[2:], results.items(), strict=False):
            show(axes, frames[index], f"{kind}, {scores[kind][index]:.1f} dB")
        show(row[-1], batch.truth[index], "truth")
    figure.suptitle(
        "Frames restored with the help of a neighbour that moved\n"
        "Gold: where the trained deformable 3x3 kernel samples the neighbour for the frame's "
        "places in green",
        fontsize=10,
    )
    figure.savefig(out, format="png")
