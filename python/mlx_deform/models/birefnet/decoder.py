"""The reconstruction of the mask from the backbone's maps and from the image itself.

"Bilateral Reference for High-Resolution Dichotomous Image Segmentation" (arXiv:2401.03407),
section 3.3; names and details follow BiRefNet's models/birefnet.py (Decoder, SimpleConvs) and
models/modules/ (aspp.py, decoder_blocks.py, lateral_blocks.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..layers import BatchNorm, last
from .layers import Conv2d, DeformableConv2d, on_cpu, piece, resize, same_rows

INTER_CHANNELS = 64  # of every decoder block
ASPP_CHANNELS = 256  # of every branch
ASPP_KERNELS = (1, 3, 7)  # beside a first branch of 1
IMAGE_CHANNELS = 64  # between the two convolutions on the image
GRADIENT_CHANNELS = 16


class TrainingOutputs(NamedTuple):
    """What the model gives in training; logits and maps have one channel.

    Attributes:
        predictions: the mask's logits at 1/32, 1/16, 1/8 and at the full size of the image.
        gradient_predictions: logits of where the image has fine detail, at 1/32, 1/16, 1/8.
        gradient_labels: what their sigmoids are compared with after a sigmoid: the Laplacian of
            the image times the mask's logits of the same level, at the full size.
    """

    predictions: list[mx.array]
    gradient_predictions: list[mx.array]
    gradient_labels: list[mx.array]


class GlobalAverage(nn.Module):
    """(N, H, W, C) to (N, 1, 1, C)."""

    def __call__(self, x: mx.array) -> mx.array:
        return x.mean((1, 2), keepdims=True)


class ASPPModule(nn.Module):
    """One branch: a deformable convolution (aspp.py, _ASPPModuleDeformable)."""

    def __init__(self, in_channels: int, kernel_size: int):
        super().__init__()
        self.atrous_conv = DeformableConv2d(in_channels, ASPP_CHANNELS, kernel_size)
        self.bn = BatchNorm(ASPP_CHANNELS)

    def __call__(self, x: mx.array) -> mx.array:
        if self.training:
            return nn.relu(self.bn(self.atrous_conv(x)))
        return nn.relu(self.atrous_conv.scaled(x, *self.bn.scale_and_shift()))


class ASPPDeformable(nn.Module):
    """Branches with receptive fields of several sizes, joined by a 1x1 convolution.

    The branches are never concatenated: each is multiplied by its part of the weight and the
    products are added, so that one branch at a time is in memory.
    """

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.aspp1 = ASPPModule(channels, 1)
        self.aspp_deforms = [ASPPModule(channels, size) for size in ASPP_KERNELS]
        self.global_avg_pool = nn.Sequential(
            GlobalAverage(),
            Conv2d(channels, ASPP_CHANNELS, 1, bias=False),
            BatchNorm(ASPP_CHANNELS),
            nn.ReLU(),
        )
        branches = 2 + len(ASPP_KERNELS)
        self.conv1 = Conv2d(branches * ASPP_CHANNELS, channels, 1, bias=False)
        self.bn1 = BatchNorm(channels)
        self.dropout = nn.Dropout(dropout)

    STEPS = 2 + len(ASPP_KERNELS) + 1

    def steps(self, x: mx.array) -> Iterator[mx.array]:
        """The sum after each branch, and the output."""
        branches = [self.aspp1, *self.aspp_deforms, self.global_avg_pool]
        weights = mx.split(self.conv1.weight, len(branches), axis=-1)
        joined = 0
        for branch, weight in zip(branches, weights, strict=True):
            joined = joined + mx.conv2d(branch(x), weight)
            yield joined
        yield self.dropout(nn.relu(self.bn1(joined)))

    def __call__(self, x: mx.array) -> mx.array:
        return last(self.steps(x))


class BasicDecBlk(nn.Module):
    """Two 3x3 convolutions around ASPPDeformable (decoder_blocks.py)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.conv_in = Conv2d(in_channels, INTER_CHANNELS, 3)
        self.bn_in = BatchNorm(INTER_CHANNELS)
        self.dec_att = ASPPDeformable(INTER_CHANNELS, dropout)
        self.conv_out = Conv2d(INTER_CHANNELS, out_channels, 3)
        self.bn_out = BatchNorm(out_channels)

    STEPS = ASPPDeformable.STEPS + 1

    def steps(self, x: mx.array) -> Iterator[mx.array]:
        x = nn.relu(self.bn_in(self.conv_in(x)))
        for x in self.dec_att.steps(x):  # noqa: B020, so that only the newest is in memory
            yield x
        yield self.bn_out(self.conv_out(x))

    def __call__(self, x: mx.array) -> mx.array:
        return last(self.steps(x))


class BasicLatBlk(nn.Module):
    """A 1x1 convolution of a map of the backbone (lateral_blocks.py)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x)


class SimpleConvs(nn.Module):
    """Two 3x3 convolutions of the image, with nothing between them."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = Conv2d(in_channels, IMAGE_CHANNELS, 3)
        self.conv_out = Conv2d(IMAGE_CHANNELS, out_channels, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv_out(self.conv1(x))

    def projected(self, x: mx.array, weight: mx.array) -> mx.array:
        """The output times a weight of shape (1, out_channels), without the output in memory.

        The weight goes into the second convolution, and both take a few rows at a time: at full
        resolution the channels between them would be the largest array of the model.
        """
        count, height, width, _ = x.shape
        second = mx.tensordot(weight, self.conv_out.weight, 1)  # (1, 3, 3, IMAGE_CHANNELS)
        unfolded = 9 if on_cpu() else 1  # see Conv2d
        rows = max(piece() // (count * width * IMAGE_CHANNELS * unfolded), 1)
        strips = []
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            low, high = max(start - 1, 0), min(stop + 1, height)
            between = same_rows(x, 0, height, self.conv1.weight, low, high) + self.conv1.bias
            strips.append(same_rows(between, low, height, second, start, stop))
        return mx.concatenate(strips, axis=1) + weight @ self.conv_out.bias


def image_patches(image: mx.array, size: tuple[int, int], order: str) -> mx.array:
    """The image cut into patches of that size, which are stacked as channels: the inward reference.

    (N, hg * h, wg * w, C) to (N, h, w, hg * wg * C); see BiRefNetConfig for the order.
    """
    count, height, width, channels = image.shape
    h, w = size
    image = image.reshape(count, height // h, h, width // w, w, channels)
    axes = (0, 2, 4, 5, 1, 3) if order == "channels" else (0, 2, 4, 3, 1, 5)
    return image.transpose(axes).reshape(count, h, w, -1)


class Decoder(nn.Module):
    """Four blocks from the smallest map to the largest, then the mask at full size.

    channels: of the maps from the smallest, x4, to the largest, x1.
    """

    def __init__(self, channels: list[int], patch_order: str, dropout: float):
        super().__init__()
        outputs = [*channels[1:], channels[-1] // 2]
        images = [channels[0] // 8, *(count // 8 for count in channels)]
        for index, level in enumerate((4, 3, 2, 1)):
            # A map of level i has 1 / 2^(i + 1) of the image's height and width.
            self[f"ipt_blk{level + 1}"] = SimpleConvs(3 * 4 ** (level + 1), images[index])
            self[f"decoder_block{level}"] = BasicDecBlk(
                channels[index] + images[index], outputs[index], dropout
            )
        for level, count in zip((4, 3, 2), outputs, strict=False):
            self[f"lateral_block{level}"] = BasicLatBlk(count, count)
            self[f"conv_ms_spvn_{level}"] = Conv2d(count, 1, 1)
            self[f"gdt_convs_{level}"] = nn.Sequential(
                Conv2d(count, GRADIENT_CHANNELS, 3), BatchNorm(GRADIENT_CHANNELS), nn.ReLU()
            )
            self[f"gdt_convs_pred_{level}"] = nn.Sequential(Conv2d(GRADIENT_CHANNELS, 1, 1))
            self[f"gdt_convs_attn_{level}"] = nn.Sequential(Conv2d(GRADIENT_CHANNELS, 1, 1))
        self.ipt_blk1 = SimpleConvs(3, images[-1])
        self.conv_out1 = nn.Sequential(Conv2d(outputs[-1] + images[-1], 1, 1))
        self._patch_order = patch_order

    STEPS = 4 * BasicDecBlk.STEPS + 3 * 2 + 1

    def steps(
        self, image: mx.array, maps: list[mx.array], gradient: mx.array | None = None
    ) -> Iterator[mx.array | TrainingOutputs]:
        """The feature of each block as soon as it is described, and at last what the model gives.

        image: (N, H, W, 3).
        maps: x1 to x4, which are taken out of the list, so that each is freed after its use.
        gradient: the Laplacian of the image, (N, H, W, 1), in training.
        """
        size = image.shape[1:3]
        outputs = TrainingOutputs([], [], [])
        feature = maps.pop()
        for level in (4, 3, 2):
            p = self._with_image(feature, image, level)
            for p in self[f"decoder_block{level}"].steps(p):  # noqa: B020
                yield p
            edges = self[f"gdt_convs_{level}"](p)
            if self.training:
                prediction = self[f"conv_ms_spvn_{level}"](p)
                outputs.predictions.append(prediction)
                outputs.gradient_predictions.append(self[f"gdt_convs_pred_{level}"](edges))
                outputs.gradient_labels.append(gradient * resize(prediction, size))
            p = p * mx.sigmoid(self[f"gdt_convs_attn_{level}"](edges))
            lateral = maps.pop()
            feature = resize(p, lateral.shape[1:3])
            yield feature
            feature = feature + self[f"lateral_block{level}"](lateral)
            del lateral
            yield feature
        p = self._with_image(feature, image, 1)
        del feature
        for p in self.decoder_block1.steps(p):  # noqa: B020
            yield p
        logits = self._full_size(p, image)
        if self.training:
            outputs.predictions.append(logits)
        yield outputs if self.training else logits

    def _with_image(self, feature: mx.array, image: mx.array, level: int) -> mx.array:
        patches = image_patches(image, feature.shape[1:3], self._patch_order)
        return mx.concatenate([feature, self[f"ipt_blk{level + 1}"](patches)], axis=-1)

    def _full_size(self, p: mx.array, image: mx.array) -> mx.array:
        """conv_out1 of p, resized to the image, beside ipt_blk1 of the image.

        A 1x1 convolution and a resizing may change places, so that one channel is resized in
        the place of all.
        """
        head = self.conv_out1.layers[0]
        channels = p.shape[-1]
        weight = head.weight.reshape(1, -1)
        mask = p @ weight[:, :channels].T
        return (
            resize(mask, image.shape[1:3])
            + self.ipt_blk1.projected(image, weight[:, channels:])
            + head.bias
        )
