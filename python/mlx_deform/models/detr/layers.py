"""The layers that the detectors are built of. Channels are last.

Sequences of layers are plain lists, so that their parameters are numbered as PyTorch numbers
those of an ``nn.Sequential``.
"""

import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..layers import BatchNorm

# By the names that the hub's configurations have.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "silu": nn.silu,
    "swish": nn.silu,
}


def activation(name: str | None) -> Callable[[mx.array], mx.array]:
    """The function of that name; the identity for None."""
    if name is None:
        return lambda x: x
    if name not in ACTIVATIONS:
        raise ValueError(
            f"[detr] an activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}"
        )
    return ACTIVATIONS[name]


def chain(layers: Sequence[Callable], x: mx.array) -> mx.array:
    """The layers one after another."""
    for layer in layers:
        x = layer(x)
    return x


class FrozenBatchNorm(BatchNorm):
    """Batch normalisation that stays what a checkpoint says, also in training."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        scale, shift = self.scale_and_shift()
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)


class ConvNorm(nn.Module):
    """A convolution without a bias, batch normalisation, an activation.

    The size of the map stays, or is halved by a stride of 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: str | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        self.norm = BatchNorm(out_channels, eps)
        self._activation = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        return self._activation(self.norm(self.conv(x)))


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, dims: Sequence[int], act: str = "relu"):
        super().__init__()
        self.layers = [nn.Linear(*pair) for pair in itertools.pairwise(dims)]
        self._activation = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = self._activation(layer(x))
        return self.layers[-1](x)


def box_head(dims: int, depth: int = 3) -> MLP:
    """Predicts four numbers of each query."""
    return MLP([dims] * depth + [4])


def upsample(x: mx.array) -> mx.array:
    """Twice the height and width, each pixel four times: (N, H, W, C) to (N, 2H, 2W, C)."""
    N, H, W, C = x.shape
    return mx.broadcast_to(x[:, :, None, :, None], (N, H, 2, W, 2, C)).reshape(N, 2 * H, 2 * W, C)


def flatten(maps: Sequence[mx.array]) -> tuple[mx.array, list[tuple[int, int]]]:
    """Maps (N, H, W, C), row by row and joined, (N, S, C), and the sizes (H, W) of each."""
    joined = [x.reshape(x.shape[0], -1, x.shape[3]) for x in maps]
    return mx.concatenate(joined, axis=1), [x.shape[1:3] for x in maps]
