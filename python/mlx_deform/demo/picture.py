"""Where the kernels of trained networks sample, over digits."""

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure

from .networks import ModulatedDeformConv2d

LABELS = (0, 2, 3, 5, 7, 9)
STEM_STRIDE = 2  # pixels between positions of the stem's output


def layer_samples(layer, features):
    """Where the taps of a layer sample its input, and with what weights, at every position.

    features: (1, H, W, C). Returns (H_out, W_out, taps, 2), in positions of the input, and
    (H_out, W_out, taps).
    """
    taps = np.indices(layer.weight.shape[1:3]).reshape(2, -1).T
    if isinstance(layer, ModulatedDeformConv2d):
        offset, mask = (np.array(part[0]) for part in layer.offset_and_mask(features))
        offset = offset.reshape(*mask.shape, 2)
    else:
        height, width = layer(features).shape[1:3]
        mask = np.ones((height, width, len(taps)))
        offset = np.zeros((*mask.shape, 2))
    positions = np.indices(mask.shape[:2]).transpose(1, 2, 0)[:, :, None]
    return positions * layer.stride - np.array(layer.padding) + taps + offset, mask


def samples(network, image, position):
    """What one position of the last layer sees through both layers.

    image: (1, H, W, 1). Returns (taps * taps, 2) in pixels, and the weights (taps * taps,).
    """
    stem, middle, _ = network.features(image)
    outer, outer_mask = layer_samples(network.layers[1], middle)
    inner, inner_mask = layer_samples(network.layers[0], stem)
    places, weights = outer[position], outer_mask[position]
    points, products = [], []
    for place, weight in zip(places, weights, strict=True):
        # Samples lie between positions; the nearest one says how the first layer bends there.
        row, column = np.clip(np.round(place).astype(int), 0, np.array(inner.shape[:2]) - 1)
        points.append(inner[row, column] + place - (row, column))
        products.append(weight * inner_mask[row, column])
    return STEM_STRIDE * np.concatenate(points), np.concatenate(products)


def on_the_stroke(image, positions):
    """The position, of a grid of that many a side, that is nearest to the middle of the ink."""
    rows, columns = np.indices(image.shape)
    stride = image.shape[0] / positions
    middle = [(image * axis).sum() / image.sum() / stride for axis in (rows, columns)]
    return tuple(int(np.clip(np.round(value), 0, positions - 1)) for value in middle)


def draw(networks, data, out):
    """networks: by kind, of which each is one row."""
    chosen = [int(np.flatnonzero(data.test_labels == label)[0]) for label in LABELS]
    figure = Figure(
        figsize=(1.75 * len(LABELS), 1.9 * len(networks) + 0.7), layout="constrained", dpi=150
    )
    rows = figure.subplots(len(networks), len(LABELS))
    for row, (kind, network) in zip(rows, networks.items(), strict=True):
        row[0].set_ylabel(kind)
        for axes, index in zip(row, chosen, strict=True):
            image = data.test_images[index : index + 1]
            pixels = np.array(image[0, :, :, 0])
            last = network.features(image)[-1]
            position = on_the_stroke(pixels, last.shape[1])
            points, weights = samples(network, image, position)
            guess = int(mx.argmax(network(image), axis=-1).item())
            axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1.6)
            axes.scatter(
                points[:, 1],
                points[:, 0],
                s=5 + 9 * weights / weights.max(),
                c=weights,
                cmap="plasma",
                vmin=0,
                vmax=max(1.0, weights.max()),
                linewidths=0,
            )
            scale = pixels.shape[0] / last.shape[1]
            middle = (position[1] * scale, position[0] * scale)
            axes.plot(*middle, "P", color="tab:green", markeredgecolor="white", markersize=8)
            label = data.test_labels[index]
            axes.set_title(f"{label}" if guess == label else f"{label}, taken for {guess}")
            edge = pixels.shape[0] - 0.5
            axes.set(xticks=[], yticks=[], xlim=(-0.5, edge), ylim=(edge, -0.5))
            axes.title.set_fontsize(9)
    figure.suptitle(
        "What one position of the second 3x3 layer (green) samples through the first, over "
        "test digits\nLarger and brighter: of more weight",
        fontsize=10,
    )
    figure.savefig(out, format="png")
