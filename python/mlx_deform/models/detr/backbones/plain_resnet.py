"""ResNet as it was first published, but for the stride, which is in the 3x3 convolutions.

He et al., "Deep Residual Learning", arXiv:1512.03385; the sizes and the place of the stride
are torchvision's and timm's.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from .layers import ConvLayer, max_pool
from .resnet import Block, ResNet, ResNetConfig, Shortcut


@dataclass(frozen=True)
class PlainResNetConfig(ResNetConfig):
    """Sizes of a ResNet; names and defaults are transformers', those of ResNet-50.

    dilation: the last stage keeps the size of its map and dilates its convolutions instead
    (DC5), as torchvision's ``replace_stride_with_dilation`` and timm's ``output_stride=16`` do.
    """

    model_type: ClassVar[str] = "resnet"

    dilation: bool = False


_BASIC = PlainResNetConfig(hidden_sizes=(64, 128, 256, 512), layer_type="basic")

# By the names of torchvision and timm.
RESNETS = {
    "resnet18": replace(_BASIC, depths=(2, 2, 2, 2)),
    "resnet34": replace(_BASIC, depths=(3, 4, 6, 3)),
    "resnet50": PlainResNetConfig(),
    "resnet101": PlainResNetConfig(depths=(3, 4, 23, 3)),
    "resnet152": PlainResNetConfig(depths=(3, 8, 36, 3)),
}


class PlainStem(nn.Module):
    """A convolution of 7x7 and a pooling, to a quarter of the picture's size."""

    def __init__(self, config: PlainResNetConfig, norm: type):
        super().__init__()
        self.embedder = ConvLayer(3, config.embedding_size, 7, 2, act=config.hidden_act, norm=norm)

    def __call__(self, x: mx.array) -> mx.array:
        return max_pool(self.embedder(x))


class PlainFirstBlock(Block):
    """The first block of a stage, with a shortcut where channels or size change."""

    def __init__(
        self,
        config: PlainResNetConfig,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: type,
    ):
        super().__init__(config, in_channels, out_channels, stride, norm)
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Shortcut(in_channels, out_channels, stride, norm)


class PlainResNet(ResNet):
    """The stem, then four stages of blocks, each but the first at half the size before it."""

    stem, first_block = PlainStem, PlainFirstBlock

    def __init__(self, config: PlainResNetConfig, norm: type):
        super().__init__(config, norm)
        if config.dilation:
            first, *others = self.encoder.stages[-1].layers
            for block in (first, *others):
                dilate(block, 1 if block is first else 2)


def dilate(block: Block, dilation: int) -> None:
    """Takes the stride from a block's convolutions, and dilates those of 3x3."""
    convolutions = [layer.convolution for layer in block.layer]
    if "shortcut" in block:
        convolutions.append(block.shortcut.convolution)
    for convolution in convolutions:
        convolution.stride = 1
        if convolution.weight.shape[1] == 3:
            convolution.dilation, convolution.padding = dilation, dilation
