"""BiRefNet: the backbone at two scales, the squeeze block, the decoder.

"Bilateral Reference for High-Resolution Dichotomous Image Segmentation" (arXiv:2401.03407),
section 3.2; names and details follow BiRefNet's models/birefnet.py with the settings of its
config.py that every published checkpoint has: mul_scl_ipt "cat", three maps of context, one
BasicDecBlk to squeeze, ASPPDeformable, split patches of the image, gradient attention.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ..layers import convert, last
from .config import BiRefNetConfig
from .decoder import BasicDecBlk, Decoder, TrainingOutputs
from .layers import laplacian, resize
from .swin import SwinTransformer

# A map of the smallest size has one position for so many pixels a side.
MULTIPLE = 32


class BiRefNet(nn.Module):
    """Predicts the mask of what stands in the foreground of a picture.

    Args:
        config (BiRefNetConfig): The sizes, by default those of the published ``BiRefNet`` with
            Swin-L; see :func:`config_of`.

    Parameters:
        Named as in the official state dict; see :func:`load_weights`.

    Call:
        ``model(x)`` with ``x`` of shape ``(N, H, W, 3)``, ``H`` and ``W`` multiples of 32, colours
        normalised as :func:`mlx_deform.models.birefnet.inference.to_input` does. In inference
        (``model.eval()``) it gives the mask's logits, ``(N, H, W, 1)``; in training
        (``model.train()``, as a new model is) :class:`TrainingOutputs`, for which there must be
        more than one picture.

    Raises:
        ValueError: If the shape of ``x`` breaks a rule.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_deform.models.birefnet import BiRefNet, config_of
        >>> model = BiRefNet(config_of("BiRefNet_lite"))
        >>> model.eval()  # doctest: +ELLIPSIS
        BiRefNet(...
        >>> model(mx.zeros((1, 64, 96, 3))).shape
        (1, 64, 96, 1)

    References:
        Zheng et al., "Bilateral Reference for High-Resolution Dichotomous Image Segmentation",
        arXiv:2401.03407; github.com/ZhengPeng7/BiRefNet.
    """

    def __init__(self, config: BiRefNetConfig | None = None):
        super().__init__()
        config = config or BiRefNetConfig()
        # Of x4 to x1, twice the backbone's: it sees the picture at two scales.
        channels = [2 * config.backbone.channels << stage for stage in (3, 2, 1, 0)]
        self.bb = SwinTransformer(config.backbone, config.drop_path)
        self.squeeze_module = nn.Sequential(BasicDecBlk(sum(channels), channels[0], config.dropout))
        self.decoder = Decoder(channels, config.patch_order, config.dropout)
        self._config = config

    @property
    def config(self) -> BiRefNetConfig:
        return self._config

    def set_dtype(self, dtype: mx.Dtype) -> "BiRefNet":
        """Converts the parameters, except those of batch normalisation, which stay float32."""
        convert(self, dtype)
        return self

    def steps(self, x: mx.array) -> Iterator[mx.array | TrainingOutputs]:
        """What a call computes, step by step; the last is the call's result.

        Evaluating each step before the next bounds the memory of a picture to that of the
        largest step, and tells how far it is. There are ``model.step_count`` steps.
        """
        misfit = any(size % MULTIPLE for size in x.shape[1:3])
        if x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape or misfit:
            raise ValueError(
                f"[BiRefNet] x must have shape (N, H, W, 3) with H and W multiples of {MULTIPLE}; "
                f"got {tuple(x.shape)}"
            )
        maps, half = [], []
        yield from self.bb.steps(x, maps)
        height, width = x.shape[1:3]
        yield from self.bb.steps(resize(x, (height // 2, width // 2)), half)
        for index in range(len(maps)):
            enlarged = resize(half.pop(0), maps[index].shape[1:3])
            maps[index] = mx.concatenate([maps[index], enlarged], axis=-1)
            yield maps[index]
        del enlarged
        smallest = maps[-1].shape[1:3]
        context = [resize(feature, smallest) for feature in maps]
        for feature in self.squeeze_module.layers[0].steps(mx.concatenate(context, axis=-1)):
            yield feature
        maps[-1] = feature
        del context, feature
        gradient = laplacian(x.mean(-1, keepdims=True)) if self.training else None
        yield from self.decoder.steps(x, maps, gradient)

    @property
    def step_count(self) -> int:
        return 2 * self.bb.step_count + len(self.bb.layers) + BasicDecBlk.STEPS + Decoder.STEPS

    def __call__(self, x: mx.array) -> mx.array | TrainingOutputs:
        return last(self.steps(x))
