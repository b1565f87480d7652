"""What the models share: batch normalisation in half types, and computing step by step."""

import collections
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


def last(steps: Iterable):
    return collections.deque(steps, maxlen=1).pop()


class BatchNorm(nn.BatchNorm):
    """Batch normalisation whose statistics are float32 beside a half input, as PyTorch's are.

    In inference it is one multiplication and one addition.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self.training:
            return super().__call__(x.astype(mx.float32)).astype(x.dtype)
        scale, shift = self.scale_and_shift()
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)

    def scale_and_shift(self) -> tuple[mx.array, mx.array]:
        """What inference multiplies with and adds, float32 of shape (C,)."""
        scale = self.weight * mx.rsqrt(self.running_var.astype(mx.float32) + self.eps)
        return scale, self.bias - self.running_mean * scale


def convert(model: nn.Module, dtype: mx.Dtype) -> None:
    """Converts the parameters, except those of batch normalisation, which stay float32."""

    def convert_own(_, module):
        own = mx.float32 if isinstance(module, BatchNorm) else dtype
        arrays = {k: v for k, v in module.items() if isinstance(v, mx.array) and k[0] != "_"}
        module.update(tree_map(lambda array: array.astype(own), arrays))

    model.apply_to_modules(convert_own)
