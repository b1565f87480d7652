"""What every detector is: a network that is evaluated step by step."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ..layers import BatchNorm, convert, last
from .config import DetectorConfig
from .layers import FrozenBatchNorm
from .outputs import DenoisingQueries, DetectorOutputs
from .preprocessing import ImageProcessor


class Detector(nn.Module):
    """The base of the families. A subclass has ``steps``, ``step_count`` and ``self.model``.

    ``processor``, an :class:`ImageProcessor`, makes pictures the model's input.
    """

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self._config = config
        self.processor = ImageProcessor.of(config.model_type)

    @property
    def config(self) -> DetectorConfig:
        return self._config

    @property
    def dtype(self) -> mx.Dtype:
        """The type it computes in."""
        return self.model.decoder.layers[0].fc1.weight.dtype

    def set_dtype(self, dtype: mx.Dtype) -> "Detector":
        """Converts the parameters, except those of batch normalisation, which stay float32."""
        convert(self, dtype)
        return self

    def unfreeze(self, *args, **kwargs) -> "Detector":
        """As of any module, but batch normalisation that is frozen stays so."""
        super().unfreeze(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm):
                module.freeze()
            elif isinstance(module, BatchNorm):
                module.freeze(keys=["running_mean", "running_var"])
        return self

    @property
    def step_count(self) -> int:
        raise NotImplementedError

    def steps(
        self,
        pixels: mx.array,
        mask: mx.array | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> Iterator[mx.array | DetectorOutputs]:
        """What a call computes, step by step; the last is the call's result.

        Evaluating each step before the next bounds the memory of a picture to that of the
        largest step, and tells how far it is. There are ``step_count`` steps.
        """
        raise NotImplementedError

    def __call__(
        self,
        pixels: mx.array,
        mask: mx.array | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> DetectorOutputs:
        return last(self.steps(pixels, mask, denoising))


def check_pixels(pixels: mx.array, multiple: int) -> None:
    """Raises an error unless they are pictures with sides that are multiples of a number."""
    misfit = pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape
    if misfit or any(side % multiple for side in pixels.shape[1:3]):
        rule = f" with H and W multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"[detr] pixels must have shape (N, H, W, 3){rule}; got {tuple(pixels.shape)}"
        )
