"""ResNet-D: three convolutions first, and shortcuts that average before they halve a map.

He et al., "Deep Residual Learning", arXiv:1512.03385; variant D of "Bag of Tricks for Image
Classification", arXiv:1812.01187, section 4.2, as PaddleDetection and RT-DETR have it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..layers import activation, chain
from .config import BackboneConfig
from .layers import ConvLayer, Stages, max_pool

# A bottleneck's inner convolution has so many times fewer channels.
REDUCTION = 4


@dataclass(frozen=True)
class ResNetConfig(BackboneConfig):
    """Sizes of a ResNet-D; names and defaults are transformers', those of ResNet-50."""

    model_type: ClassVar[str] = "rt_detr_resnet"

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the maps that are used."""
        return tuple((self.embedding_size, *self.hidden_sizes)[i] for i in self.out_indices)


def halve(x: mx.array) -> mx.array:
    """The mean of 2x2 pixels: (N, H, W, C) to (N, H / 2, W / 2, C)."""
    N, H, W, C = x.shape
    return x.reshape(N, H // 2, 2, W // 2, 2, C).mean((2, 4))


class Shortcut(nn.Module):
    """A 1x1 convolution that fits the channels and the size of a residual."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: type):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.normalization = norm(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.normalization(self.convolution(x))


class Block(nn.Module):
    """Convolutions with a residual around them: two 3x3, or a 3x3 between two 1x1."""

    def __init__(
        self, config: ResNetConfig, in_channels: int, out_channels: int, stride: int, norm: type
    ):
        super().__init__()
        if config.layer_type == "bottleneck":
            inner = out_channels // REDUCTION
            first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            self.layer = [
                ConvLayer(in_channels, inner, 1, first, norm=norm),
                ConvLayer(inner, inner, 3, second, norm=norm),
                ConvLayer(inner, out_channels, 1, act=None, norm=norm),
            ]
        else:
            self.layer = [
                ConvLayer(in_channels, out_channels, 3, stride, norm=norm),
                ConvLayer(out_channels, out_channels, 3, act=None, norm=norm),
            ]
        self._activation = activation(config.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        return self._activation(chain(self.layer, x) + self.residual(x))

    def residual(self, x: mx.array) -> mx.array:
        if "shortcut" not in self:
            return x
        return chain(self.shortcut, x) if isinstance(self.shortcut, list) else self.shortcut(x)


class FirstBlock(Block):
    """The first block of a stage, whose residual has other channels or another size."""

    def __init__(
        self, config: ResNetConfig, in_channels: int, out_channels: int, stride: int, norm: type
    ):
        super().__init__(config, in_channels, out_channels, stride, norm)
        pooled = stride == 2 and (config.layer_type == "bottleneck" or in_channels != out_channels)
        if pooled:
            self.shortcut = [halve, Shortcut(in_channels, out_channels, 1, norm)]
        else:
            self.shortcut = Shortcut(in_channels, out_channels, stride, norm)


class Stem(nn.Module):
    """Three convolutions and a pooling, to a quarter of the picture's size."""

    def __init__(self, config: ResNetConfig, norm: type):
        super().__init__()
        C, act = config.embedding_size, config.hidden_act
        self.embedder = [
            ConvLayer(3, C // 2, 3, 2, act=act, norm=norm),
            ConvLayer(C // 2, C // 2, 3, act=act, norm=norm),
            ConvLayer(C // 2, C, 3, act=act, norm=norm),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        return max_pool(chain(self.embedder, x))


class Stage(nn.Module):
    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.layers = blocks


class ResNet(nn.Module):
    """The stem, then four stages of blocks, each but the first at half the size before it."""

    stem, first_block = Stem, FirstBlock

    def __init__(self, config: ResNetConfig, norm: type):
        super().__init__()
        self.embedder = self.stem(config, norm)
        stages = []
        in_channels, stride = config.embedding_size, 2 if config.downsample_in_first_stage else 1
        for channels, depth in zip(config.hidden_sizes, config.depths, strict=True):
            blocks = [self.first_block(config, in_channels, channels, stride, norm)]
            blocks += [Block(config, channels, channels, 1, norm) for _ in range(depth - 1)]
            stages.append(Stage(blocks))
            in_channels, stride = channels, 2
        self.encoder = Stages(stages)
        self._out_indices = config.out_indices

    @property
    def step_count(self) -> int:
        return 1 + sum(len(stage.layers) for stage in self.encoder.stages)

    def steps(self, pixels: mx.array, maps: list[mx.array]) -> Iterator[mx.array]:
        """The stem and every block; appends the maps of the stages that are used."""
        x = self.embedder(pixels)
        yield x
        for index, stage in enumerate(self.encoder.stages, start=1):
            for block in stage.layers:
                x = block(x)
                yield x
            if index in self._out_indices:
                maps.append(x)
