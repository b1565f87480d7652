"""Two small networks that differ in their convolutions alone, with about equal parameters."""

import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import nn as deformable
from ..nn.ordinary import Conv2d
from .digits import CANVAS

CLASSES = 10
MEAN, DEVIATION = 0.11, 0.24  # of the images' values
WIDTHS = {"ordinary": (16, 40, 46), "deformable": (16, 32, 32)}


class ModulatedDeformConv2d(deformable.ModulatedDeformConv2d):
    """The library's layer, with that convolution to predict its offsets and masks.

    With this mask_scale it starts as an ordinary convolution.
    """

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options, mask_scale=2)
        weights = self.offset_conv.parameters()
        channels = self.offset_conv.weight.shape[0]
        self.offset_conv = Conv2d(
            self.in_channels, channels, self.kernel_size, self.stride, self.padding
        )
        self.offset_conv.update(weights)


class Network(nn.Module):
    """A stem and two layers, all of 3x3 kernels, and a linear one.

    kind: "ordinary" or "deformable", which says what the two layers are.
    """

    def __init__(self, kind):
        super().__init__()
        stem, middle, last = WIDTHS[kind]
        layer = {"ordinary": Conv2d, "deformable": ModulatedDeformConv2d}[kind]
        self.stem = Conv2d(1, stem, 3, stride=2, padding=1)
        self.layers = [
            layer(stem, middle, 3, stride=1, padding=1),
            layer(middle, last, 3, stride=2, padding=1),
        ]
        self.head = nn.Linear(last * (CANVAS // 4) ** 2, CLASSES)

    def features(self, images):
        """The input of each layer, and the output of the last."""
        maps = [nn.relu(self.stem((images - MEAN) / DEVIATION))]
        for layer in self.layers:
            maps.append(nn.relu(layer(maps[-1])))
        return maps

    def __call__(self, images):
        return self.head(self.features(images)[-1].flatten(1))


def count(network):
    return sum(array.size for _, array in tree_flatten(network.parameters()))


def predictor_count(network):
    """The parameters that predict offsets and masks."""
    parameters = tree_flatten(network.parameters())
    return sum(array.size for name, array in parameters if "offset_conv" in name)
