"""Two small networks that differ in one convolution alone, with about equal parameters."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import nn as deformable
from ..nn.ordinary import use_fast_products
from .frames import BLOCK

STRIDE = 2  # pixels between positions of the networks' maps
PIXELS = 3 * STRIDE**2  # channels of a frame, of which a position holds STRIDE * STRIDE pixels
CHANNELS = PIXELS + 12  # and of its map: the pixels, and features
TAPS = 9
WIDTHS = {"ordinary": 15, "deformable": 12}  # of the layers that restore


def fold(frames):
    """(N, H, W, C) to (N, H / STRIDE, W / STRIDE, STRIDE * STRIDE * C)."""
    n, height, width, channels = frames.shape
    parts = frames.reshape(n, height // STRIDE, STRIDE, width // STRIDE, STRIDE, channels)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(*parts.shape[:2], parts.shape[3], -1)


def unfold(maps):
    """The inverse of fold."""
    n, height, width, channels = maps.shape
    parts = maps.reshape(n, height, width, STRIDE, STRIDE, channels // STRIDE**2)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(n, height * STRIDE, width * STRIDE, -1)


def start_as_identity(layer):
    """Its middle tap hands over the first channels, and the rest adds little."""
    channels, height, width, inputs = layer.weight.shape
    layer.weight = 0.3 * layer.weight
    layer.weight[:, height // 2, width // 2] += mx.eye(channels, inputs)


def set_zero(layer):
    layer.update({name: mx.zeros_like(array) for name, array in layer.parameters().items()})


class Network(nn.Module):
    """Aligns the neighbour with the noisy frame, and restores the frame from both.

    kind: "ordinary" or "deformable", which says what convolution aligns. Both kinds see both
    frames and the motion vectors: the ordinary one as its input, the deformable one to predict
    from them where it samples the neighbour.
    """

    def __init__(self, kind):
        super().__init__()
        width = WIDTHS[kind]
        seen = 2 * CHANNELS + 2
        self.encode = nn.Conv2d(PIXELS, CHANNELS - PIXELS, 3, padding=1)
        if kind == "deformable":
            self.offset_conv = nn.Conv2d(seen, 2 * TAPS, 3, padding=1)
            self.align = deformable.DeformConv2d(CHANNELS, CHANNELS, 3, padding=1)
            set_zero(self.offset_conv)
        else:
            self.align = nn.Conv2d(seen, CHANNELS, 3, padding=1)
        start_as_identity(self.align)
        self.restore = [
            nn.Conv2d(seen, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, PIXELS, 3, padding=1),
        ]
        set_zero(self.restore[-1])
        use_fast_products(self)

    def maps(self, batch):
        """Of the neighbour, of the noisy frame, and of the motion vectors, in pixels."""
        pixels = 4 * (fold(mx.concatenate([batch.neighbour, batch.noisy])) - 0.5)
        frames = mx.concatenate([pixels, nn.relu(self.encode(pixels))], axis=-1)
        repeats = BLOCK // STRIDE
        vectors = mx.repeat(mx.repeat(batch.vectors, repeats, axis=1), repeats, axis=2)
        return *mx.split(frames, 2), vectors

    def offset(self, neighbour, noisy, vectors):
        """Where each tap of the deformable layer samples the neighbour's map."""
        # What frames say weighs little while little is learnt.
        return self.offset_conv(mx.concatenate([0.2 * neighbour, 0.2 * noisy, vectors], axis=-1))

    def __call__(self, batch):
        neighbour, noisy, vectors = self.maps(batch)
        if "offset_conv" in self:
            aligned = self.align(neighbour, self.offset(neighbour, noisy, vectors))
        else:
            aligned = self.align(mx.concatenate([neighbour, noisy, vectors], axis=-1))
        x = mx.concatenate([aligned, noisy, vectors], axis=-1)
        first, second, last = self.restore
        x = nn.relu(first(x))
        x = x + nn.relu(second(x))
        return unfold(aligned[..., :PIXELS] + last(x)) / 4 + 0.5


def count(network):
    return sum(array.size for _, array in tree_flatten(network.parameters()))


def predictor_count(network):
    """The parameters that predict offsets."""
    parameters = tree_flatten(network.parameters())
    return sum(array.size for name, array in parameters if "offset_conv" in name)
