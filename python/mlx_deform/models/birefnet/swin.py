"""The Swin transformer, version 1, as the backbone: four maps of an image.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (arXiv:2103.14030);
names and details follow BiRefNet's models/backbones/swin_v1.py.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers import last
from .config import SwinConfig
from .layers import DropPath, in_pieces

MLP_RATIO = 4
PATCH = 4


class PatchEmbed(nn.Module):
    """(N, H, W, 3) to (N, H / 4, W / 4, C): a projection of 4x4 patches (section 3.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, PATCH)
        self.norm = nn.LayerNorm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.proj(_pad(x, PATCH)))


class PatchMerging(nn.Module):
    """Halves the map: 2x2 neighbours become one position of twice the channels (section 3.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = _pad(x, 2)
        count, height, width, channels = x.shape
        # A neighbour's column comes before its row in the order of the channels.
        x = x.reshape(count, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(count, height // 2, width // 2, 4 * channels)))


class Mlp(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        hidden = MLP_RATIO * x.shape[-1]
        return in_pieces(lambda row: self.fc2(nn.gelu(self.fc1(row))), rows, hidden).reshape(
            x.shape
        )


def relative_positions(window: int) -> np.ndarray:
    """(N, N) for the N = window^2 positions of a window: rows of the bias table (section 3.2)."""
    row, column = np.divmod(np.arange(window * window), window)
    return (row[:, None] - row + window - 1) * (2 * window - 1) + (
        column[:, None] - column + window - 1
    )


class WindowAttention(nn.Module):
    """Attention among the positions of each window, with a bias by relative position.

    Takes (windows, N, C), and for shifted windows a mask (windows, N, N) that is added to the
    scores.
    """

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        self.relative_position_bias_table = 0.02 * mx.random.truncated_normal(
            -2, 2, ((2 * window - 1) ** 2, heads)
        )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self._index = mx.array(relative_positions(window))

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        positions, channels = x.shape[1:]
        heads = self.relative_position_bias_table.shape[1]
        # (1, heads, N, N)
        bias = self.relative_position_bias_table[self._index].transpose(2, 0, 1)[None]

        def attend(x, *mask):
            q, k, v = (
                self.qkv(x)
                .reshape(len(x), positions, 3, heads, channels // heads)
                .transpose(2, 0, 3, 1, 4)
            )
            scores = bias + mask[0][:, None] if mask else bias
            y = mx.fast.scaled_dot_product_attention(
                q, k, v, scale=(channels // heads) ** -0.5, mask=scores.astype(x.dtype)
            )
            return self.proj(y.transpose(0, 2, 1, 3).reshape(x.shape))

        masks = () if mask is None else (mask,)
        return in_pieces(attend, x, positions * max(heads * positions, 3 * channels), *masks)


class SwinBlock(nn.Module):
    """Attention in windows, shifted by half a window in every second block (section 3.2)."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)
        self.drop_path = DropPath(drop_path)
        self._window, self._shift = window, shift

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.drop_path(self._attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: mx.array, mask: mx.array) -> mx.array:
        window, shift = self._window, self._shift
        height, width = x.shape[1:3]
        x = _pad(x, window)
        if shift:
            x = mx.roll(x, (-shift, -shift), (1, 2))
        shape = x.shape
        windows = _windows(x, window)
        if shift:
            mask = mx.broadcast_to(mask, (len(x), *mask.shape)).reshape(-1, *mask.shape[1:])
        windows = self.attn(windows, mask if shift else None)
        x = _unwindows(windows, window, shape)
        if shift:
            x = mx.roll(x, (shift, shift), (1, 2))
        return x[:, :height, :width]


class SwinStage(nn.Module):
    """Blocks at one resolution, then the merging that the next stage begins with."""

    def __init__(
        self, channels: int, heads: int, window: int, drop_paths: list[float], merges: bool
    ):
        super().__init__()
        self.blocks = [
            SwinBlock(channels, heads, window, index % 2 * (window // 2), drop_path)
            for index, drop_path in enumerate(drop_paths)
        ]
        if merges:
            self.downsample = PatchMerging(channels)
        self._window = window

    def steps(self, x: mx.array) -> Iterator[mx.array]:
        """The output of each block."""
        mask = mx.array(shift_mask(*x.shape[1:3], self._window)).astype(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
            yield x


class SwinTransformer(nn.Module):
    """(N, H, W, 3) to four maps, of 1/4 to 1/32 of the size and C to 8 C channels."""

    def __init__(self, config: SwinConfig, drop_path: float = 0.0):
        super().__init__()
        self.patch_embed = PatchEmbed(config.channels)
        drop_paths = iter(np.linspace(0, drop_path, sum(config.depths)).tolist())
        stages = list(zip(config.depths, config.heads, strict=True))
        self.layers = []
        for stage, (depth, heads) in enumerate(stages):
            channels = config.channels << stage
            chances = [next(drop_paths) for _ in range(depth)]
            merges = stage < len(stages) - 1
            self.layers.append(SwinStage(channels, heads, config.window, chances, merges))
            self[f"norm{stage}"] = nn.LayerNorm(channels)

    @property
    def step_count(self) -> int:
        return sum(len(stage.blocks) + 1 for stage in self.layers)

    def steps(self, x: mx.array, maps: list[mx.array]) -> Iterator[mx.array]:
        """The output of each block, and each map, which is also appended to ``maps``."""
        x = self.patch_embed(x)
        for index, stage in enumerate(self.layers):
            for x in stage.steps(x):  # noqa: B020, so that only the newest is in memory
                yield x
            maps.append(self[f"norm{index}"](x))
            yield maps[-1]
            if "downsample" in stage:
                x = stage.downsample(x)

    def __call__(self, x: mx.array) -> list[mx.array]:
        maps = []
        last(self.steps(x, maps))
        return maps


# ---------------------------------------------------------------------------
# Windows


def _pad(x: mx.array, multiple: int) -> mx.array:
    """Zeros after the last row and column, up to a multiple."""
    bottom, right = (-size % multiple for size in x.shape[1:3])
    return mx.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def _windows(x: mx.array, window: int) -> mx.array:
    """(N, H, W, C) to (N * windows, window^2, C)."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def _unwindows(x: mx.array, window: int, shape: tuple[int, ...]) -> mx.array:
    count, height, width, channels = shape
    x = x.reshape(count, height // window, width // window, window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)


def shift_mask(height: int, width: int, window: int) -> np.ndarray:
    """(windows, N, N): 0 between neighbours of the image, -inf across its wrapped-round edges.

    A shifted map is rolled, so a window of its last row or column holds pixels from opposite
    edges, which must not attend to each other.
    """
    regions = []
    for size in (height, width):
        padded = size + -size % window
        region = np.zeros(padded, np.int32)
        region[padded - window :] = 1
        region[padded - window // 2 :] = 2
        regions.append(region)
    labels = 3 * regions[0][:, None] + regions[1]
    rows, columns = labels.shape
    labels = labels.reshape(rows // window, window, columns // window, window)
    labels = labels.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return np.where(labels[:, :, None] == labels[:, None], 0, -np.inf).astype(np.float32)
