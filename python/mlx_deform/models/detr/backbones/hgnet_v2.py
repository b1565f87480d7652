"""HGNetV2: stages of convolutions whose every output is aggregated.

PaddleClas' PP-HGNetV2; light blocks have depthwise convolutions, learnable affine blocks an
additional factor and term after each activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..layers import chain
from .config import BackboneConfig
from .layers import ConvLayer, Stages


@dataclass(frozen=True)
class HGNetV2Config(BackboneConfig):
    """Sizes of an HGNetV2; names and defaults are transformers', those of B4 (D-FINE-L)."""

    model_type: ClassVar[str] = "hgnet_v2"

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    hidden_act: str = "relu"
    stem_channels: tuple[int, int, int] = (3, 32, 48)
    stem_strides: tuple[int, ...] = (2, 1, 1, 2, 1)
    stage_in_channels: tuple[int, ...] = (48, 128, 512, 1024)
    stage_mid_channels: tuple[int, ...] = (48, 96, 192, 384)
    stage_out_channels: tuple[int, ...] = (128, 512, 1024, 2048)
    stage_num_blocks: tuple[int, ...] = (1, 1, 3, 1)
    stage_downsample: tuple[bool, ...] = (False, True, True, True)
    stage_downsample_strides: tuple[int, ...] = (2, 2, 2, 2)
    stage_light_block: tuple[bool, ...] = (False, False, True, True)
    stage_kernel_size: tuple[int, ...] = (3, 3, 5, 5)
    stage_numb_of_layers: tuple[int, ...] = (6, 6, 6, 6)
    use_learnable_affine_block: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the maps that are used."""
        return tuple(
            (self.stem_channels[-1], *self.stage_out_channels)[i] for i in self.out_indices
        )


class LearnableAffineBlock(nn.Module):
    """One factor and one term for a whole map."""

    def __init__(self):
        super().__init__()
        self.scale = mx.ones(1)
        self.bias = mx.zeros(1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.scale * x + self.bias


class AffineConvLayer(ConvLayer):
    """A convolution with a learnable affine block behind its activation, where it has one."""

    def __init__(self, *sizes: int, affine: bool, act: str | None = "relu", **settings):
        super().__init__(*sizes, act=act, **settings)
        if affine and act:
            self.lab = LearnableAffineBlock()

    def __call__(self, x: mx.array) -> mx.array:
        x = super().__call__(x)
        return self.lab(x) if "lab" in self else x


class LightConvLayer(nn.Module):
    """A 1x1 convolution, then a depthwise one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **settings):
        super().__init__()
        self.conv1 = AffineConvLayer(in_channels, out_channels, 1, act=None, **settings)
        self.conv2 = AffineConvLayer(
            out_channels, out_channels, kernel_size, 1, out_channels, **settings
        )

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv2(self.conv1(x))


class Stem(nn.Module):
    """Two ways, convolutions and a pooling, to a quarter of the picture's size."""

    def __init__(self, config: HGNetV2Config, norm: type):
        super().__init__()
        colours, C, out_channels = config.stem_channels
        first, second, third, fourth, fifth = config.stem_strides
        settings = {
            "affine": config.use_learnable_affine_block,
            "act": config.hidden_act,
            "norm": norm,
        }
        self.stem1 = AffineConvLayer(colours, C, 3, first, **settings)
        self.stem2a = AffineConvLayer(C, C // 2, 2, second, **settings)
        self.stem2b = AffineConvLayer(C // 2, C, 2, third, **settings)
        self.stem3 = AffineConvLayer(2 * C, C, 3, fourth, **settings)
        self.stem4 = AffineConvLayer(C, out_channels, 1, fifth, **settings)
        self._pool = nn.MaxPool2d(2, stride=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = grown(self.stem1(x))
        convolved = self.stem2b(grown(self.stem2a(x)))
        return self.stem4(self.stem3(mx.concatenate([self._pool(x), convolved], axis=-1)))


def grown(x: mx.array) -> mx.array:
    """A row and a column of zeros more, which a 2x2 kernel takes off again."""
    return mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])


class Block(nn.Module):
    """Convolutions one after another; the input and all their outputs are aggregated."""

    def __init__(self, config: HGNetV2Config, stage: int, first: bool, norm: type):
        super().__init__()
        settings = {"affine": config.use_learnable_affine_block, "norm": norm}
        middle, out_channels = config.stage_mid_channels[stage], config.stage_out_channels[stage]
        in_channels = config.stage_in_channels[stage] if first else out_channels
        layer = LightConvLayer if config.stage_light_block[stage] else AffineConvLayer
        count, kernel_size = config.stage_numb_of_layers[stage], config.stage_kernel_size[stage]
        self.layers = [
            layer(middle if i else in_channels, middle, kernel_size, **settings)
            for i in range(count)
        ]
        half = out_channels // 2
        self.aggregation = [
            AffineConvLayer(in_channels + count * middle, half, 1, **settings),
            AffineConvLayer(half, out_channels, 1, **settings),
        ]
        self._residual = not first

    def __call__(self, x: mx.array) -> mx.array:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        aggregated = chain(self.aggregation, mx.concatenate(outputs, axis=-1))
        return aggregated + x if self._residual else aggregated


class Stage(nn.Module):
    """Blocks, at half the size of the stage before; the first block has no residual."""

    def __init__(self, config: HGNetV2Config, stage: int, norm: type):
        super().__init__()
        if config.stage_downsample[stage]:
            C, stride = config.stage_in_channels[stage], config.stage_downsample_strides[stage]
            self.downsample = ConvLayer(C, C, 3, stride, C, act=None, norm=norm)
        self.blocks = [
            Block(config, stage, index == 0, norm)
            for index in range(config.stage_num_blocks[stage])
        ]


class HGNetV2(nn.Module):
    """The stem, then the stages."""

    def __init__(self, config: HGNetV2Config, norm: type):
        super().__init__()
        self.embedder = Stem(config, norm)
        stages = range(len(config.stage_in_channels))
        self.encoder = Stages([Stage(config, stage, norm) for stage in stages])
        self._out_indices = config.out_indices

    @property
    def step_count(self) -> int:
        return 1 + sum(len(stage.blocks) for stage in self.encoder.stages)

    def steps(self, pixels: mx.array, maps: list[mx.array]) -> Iterator[mx.array]:
        """The stem and every block; appends the maps of the stages that are used."""
        x = self.embedder(pixels)
        yield x
        for index, stage in enumerate(self.encoder.stages, start=1):
            if "downsample" in stage:
                x = stage.downsample(x)
            for block in stage.blocks:
                x = block(x)
                yield x
            if index in self._out_indices:
                maps.append(x)
