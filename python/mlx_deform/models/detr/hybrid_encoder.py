"""The hybrid encoder: attention within the smallest map, convolutions across the maps.

"DETRs Beat YOLOs on Real-time Object Detection", arXiv:2304.08069, section 4.2.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from .config import HybridConfig
from .layers import ConvNorm, activation, chain, upsample
from .transformer import EncoderLayer, sine_positions


class AIFI(nn.Module):
    """Attention-based intra-scale feature interaction: a transformer on the pixels of a map."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.layers = [
            EncoderLayer(
                config.encoder_hidden_dim,
                config.encoder_attention_heads,
                config.encoder_ffn_dim,
                config.encoder_activation_function,
                dropout=config.dropout,
                activation_dropout=config.activation_dropout,
                eps=config.layer_norm_eps,
            )
            for _ in range(config.encoder_layers)
        ]
        self._temperature = config.positional_encoding_temperature

    def __call__(self, x: mx.array) -> mx.array:
        N, H, W, C = x.shape
        positions = sine_positions(H, W, C, self._temperature).astype(x.dtype)
        tokens = x.reshape(N, H * W, C)
        for layer in self.layers:
            tokens = layer(tokens, positions)
        return tokens.reshape(x.shape)


class RepVGGBlock(nn.Module):
    """A 3x3 and a 1x1 convolution beside each other ("RepVGG", arXiv:2101.03697)."""

    def __init__(self, channels: int, act: str | None, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, eps=eps)
        self.conv2 = ConvNorm(channels, channels, 1, eps=eps)
        self._activation = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        return self._activation(self.conv1(x) + self.conv2(x))


class CSPRepLayer(nn.Module):
    """Two ways through, one of them RepVGG blocks ("CSPNet", arXiv:1911.11929)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        num_blocks: int,
        act: str | None,
        eps: float,
    ):
        super().__init__()
        self.conv1 = ConvNorm(in_channels, hidden_channels, 1, act=act, eps=eps)
        self.conv2 = ConvNorm(in_channels, hidden_channels, 1, act=act, eps=eps)
        self.bottlenecks = [RepVGGBlock(hidden_channels, act, eps) for _ in range(num_blocks)]
        if hidden_channels != out_channels:
            self.conv3 = ConvNorm(hidden_channels, out_channels, 1, act=act, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = chain(self.bottlenecks, self.conv1(x)) + self.conv2(x)
        return self.conv3(x) if "conv3" in self else x


class HybridEncoder(nn.Module):
    """Refines the backbone's maps, all of ``encoder_hidden_dim`` channels, large to small.

    Attention within some maps; from small to large (FPN), then back from large to small (PAN),
    each map is fused with the one before. Subclasses build other blocks of the same places.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        fusions = range(len(config.encoder_in_channels) - 1)
        self.encoder = [AIFI(config) for _ in config.encode_proj_layers]
        self.lateral_convs = [self.lateral(config) for _ in fusions]
        self.fpn_blocks = [self.fusion(config) for _ in fusions]
        self.downsample_convs = [self.downsampling(config) for _ in fusions]
        self.pan_blocks = [self.fusion(config) for _ in fusions]
        self._attended = config.encode_proj_layers

    def lateral(self, config: HybridConfig) -> nn.Module:
        C = config.encoder_hidden_dim
        return ConvNorm(C, C, 1, act=config.activation_function, eps=config.batch_norm_eps)

    def downsampling(self, config: HybridConfig) -> nn.Module:
        C = config.encoder_hidden_dim
        return ConvNorm(C, C, 3, 2, act=config.activation_function, eps=config.batch_norm_eps)

    def fusion(self, config: HybridConfig) -> nn.Module:
        C = config.encoder_hidden_dim
        hidden = int(C * config.hidden_expansion)
        act, eps = config.activation_function, config.batch_norm_eps
        return CSPRepLayer(2 * C, C, hidden, 3, act, eps)

    @property
    def step_count(self) -> int:
        return len(self.encoder) + len(self.fpn_blocks) + len(self.pan_blocks)

    def steps(self, maps: list[mx.array]) -> Iterator[mx.array]:
        """Replaces the maps, (N, H, W, C) from large to small, by the refined ones."""
        for level, attention in zip(self._attended, self.encoder, strict=True):
            maps[level] = attention(maps[level])
            yield maps[level]

        for place, (lateral, fusion) in enumerate(
            zip(self.lateral_convs, self.fpn_blocks, strict=True)
        ):
            level = len(maps) - 2 - place
            maps[level + 1] = lateral(maps[level + 1])
            maps[level] = fusion(mx.concatenate([upsample(maps[level + 1]), maps[level]], axis=-1))
            yield maps[level]

        for level, (downsampling, fusion) in enumerate(
            zip(self.downsample_convs, self.pan_blocks, strict=True), start=1
        ):
            smaller = downsampling(maps[level - 1])
            maps[level] = fusion(mx.concatenate([smaller, maps[level]], axis=-1))
            yield maps[level]
