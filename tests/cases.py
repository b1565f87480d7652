"""Configurations of deformable convolutions, and the arrays for them, from seeds."""

import math
from dataclasses import dataclass, replace

import numpy as np

import oracle

# What is drawn for the offsets: the standard deviation, or values rounded to integers,
# so that every sample sits on the border of a cell.
OFFSET_KINDS = (0, 0.7, 4, 50, "integer")

# Offsets are multiples of this unless asked otherwise: then the sum of an offset and a
# position in the image is exact in float32, and no implementation can round a sample
# into the neighbouring cell. 2**-10 leaves 13 bits of a float32 for the integer part.
OFFSET_GRID = 2.0**-10


@dataclass(frozen=True)
class Config:
    N: int = 2
    H: int = 7
    W: int = 9
    C: int = 12
    O: int = 10  # noqa: E741
    kH: int = 3
    kW: int = 2
    stride: tuple = (1, 2)
    padding: tuple = (2, 1)
    dilation: tuple = (2, 1)
    G: int = 2
    DG: int = 3
    has_mask: bool = True
    has_bias: bool = True
    offsets: float | str = 0.7

    @property
    def kernel(self):
        return (self.kH, self.kW)

    @property
    def Ho(self):
        return oracle.output_size(
            self.H, self.kH, self.stride[0], self.padding[0], self.dilation[0]
        )

    @property
    def Wo(self):
        return oracle.output_size(
            self.W, self.kW, self.stride[1], self.padding[1], self.dilation[1]
        )

    @property
    def shapes(self):
        pixels = (self.N, self.Ho, self.Wo)
        taps = self.kH * self.kW
        shapes = {
            "input": (self.N, self.H, self.W, self.C),
            "offset": (*pixels, 2 * self.DG * taps),
            "weight": (self.O, *self.kernel, self.C // self.G),
        }
        if self.has_bias:
            shapes["bias"] = (self.O,)
        if self.has_mask:
            shapes["mask"] = (*pixels, self.DG * taps)
        return shapes

    @property
    def output_shape(self):
        return (self.N, self.Ho, self.Wo, self.O)

    @property
    def columns_shape(self):
        return (self.N, self.Ho, self.Wo, self.kH * self.kW * self.C)

    @property
    def settings(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def but(self, **changes):
        return replace(self, **changes)


def random_config(seed, **fixed):
    """A small configuration with unequal axes and mostly distinct sizes.

    Swapped axes cannot hide: H, W, C and O differ, so do kH and kW where the kernel is
    larger than 1x1, and stride, padding and dilation in four of five draws.
    """
    rng = np.random.default_rng(seed)

    def pair(low, high):
        first, second = rng.integers(low, high + 1, 2)
        while first == second and rng.random() < 0.8:
            second = rng.integers(low, high + 1)
        return int(first), int(second)

    while True:
        G, DG = (int(g) for g in rng.integers(1, 5, 2))
        kH, kW = pair(1, 5)
        N = int(rng.choice([0, 1, 3, 33], p=[0.06, 0.44, 0.44, 0.06]))
        largest = 6 if N == 33 else 12
        H, W = (int(size) for size in rng.integers(1, largest + 1, 2))
        config = Config(
            N=N,
            H=H,
            W=W,
            C=math.lcm(G, DG) * int(rng.integers(1, 4)),
            O=G * int(rng.integers(1, 5)),
            kH=kH,
            kW=kW,
            stride=pair(1, 3),
            padding=pair(0, 3),
            dilation=pair(1, 3),
            G=G,
            DG=DG,
            has_mask=bool(rng.random() < 0.6),
            has_bias=bool(rng.random() < 0.6),
            offsets=OFFSET_KINDS[rng.integers(len(OFFSET_KINDS))],
        ).but(**fixed)
        distinct = len({config.H, config.W, config.C, config.O}) == 4
        unequal_kernel = config.kH != config.kW or config.kH == 1
        if distinct and unequal_kernel and min(config.Ho, config.Wo) > 0:
            return config


def random_offset(config, rng, grid=OFFSET_GRID):
    shape = config.shapes["offset"]
    if config.offsets == "integer":
        return np.round(2 * rng.standard_normal(shape))
    offset = config.offsets * rng.standard_normal(shape)
    return offset if grid is None else np.round(offset / grid) * grid


def random_arrays(config, seed, grid=OFFSET_GRID):
    """Float64 arrays by argument name (None for an absent one), and the cotangents."""
    rng = np.random.default_rng([seed, 1])
    arrays = dict.fromkeys(("input", "offset", "weight", "bias", "mask"))
    for name, shape in config.shapes.items():
        arrays[name] = rng.standard_normal(shape)
    arrays["offset"] = random_offset(config, rng, grid)
    arrays["cotangent"] = rng.standard_normal(config.output_shape)
    arrays["column_cotangent"] = rng.standard_normal(config.columns_shape)
    return arrays


# Shapes that make an implementation cut its work up: many tiles of pixels and a last one
# that is not full, many channels, sums over more pixels than fit in a cache, weight groups
# too small for a vector, and channels that are groups by themselves.
LARGE = Config(
    N=3,
    H=25,
    W=27,
    C=42,
    O=22,
    kH=3,
    kW=4,
    stride=(1, 1),
    padding=(1, 2),
    dilation=(1, 1),
    G=2,
    DG=3,
    offsets=4,
)
MANY_PIXELS = LARGE.but(H=73, W=71, C=2, O=3, G=1, DG=2)
MANY_CHANNELS = LARGE.but(N=2, H=5, W=7, C=1300, O=6, kH=2, kW=3, G=1, DG=4)
MANY_CHANNELS_PER_GROUP = MANY_CHANNELS.but(C=1206, G=2, DG=3)
MANY_GROUPS = LARGE.but(H=11, C=84, O=42, G=42, DG=4)
DEPTHWISE = LARGE.but(C=84, O=84, G=84, DG=4)
DEPTHWISE_MULTIPLIED = DEPTHWISE.but(H=11, O=168)
MANY_OUTPUTS = LARGE.but(N=1, H=9, C=6, O=700, kH=1, kW=2, DG=1)
# Rows of whole vectors, in several offset groups of a weight group, and sums that fill
# several panels: what is sampled beside a product.
WHOLE_VECTORS = LARGE.but(H=11, W=26, C=256, O=88, DG=2)
# More samples of a pixel than are planned at once: of many groups, and of part of the taps.
MANY_SAMPLES = LARGE.but(N=1, H=9, W=8, C=11, O=6, kH=8, kW=7, padding=(3, 4), G=1, DG=11)
MANY_TAPS = MANY_SAMPLES.but(H=5, W=6, C=1, O=3, kH=33, kW=34, padding=(15, 16), DG=1)
TILINGS = {
    "large": LARGE,
    "many-pixels": MANY_PIXELS,
    "many-channels": MANY_CHANNELS,
    "many-channels-per-group": MANY_CHANNELS_PER_GROUP,
    "many-groups": MANY_GROUPS,
    "depthwise": DEPTHWISE,
    "depthwise-multiplied": DEPTHWISE_MULTIPLIED,
    "many-outputs": MANY_OUTPUTS,
    "whole-vectors": WHOLE_VECTORS,
    "many-samples": MANY_SAMPLES,
    "many-taps": MANY_TAPS,
}
