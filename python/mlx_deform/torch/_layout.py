"""Torch's (N, C, H, W) and MLX's (N, H, W, C): views where the memory allows, else one copy."""

import torch
from torch import Tensor

from .._ext import _transpose

# From this many elements an image on, transposing matrices pays for the calls: torch copies
# permuted images element by element.
LARGE = 2**14


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a result of this layer should be channels_last, as torch decides it."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _transposed(images: Tensor) -> Tensor:
    """A row-contiguous (N, A, B) as a row-contiguous (N, B, A)."""
    N, A, B = images.shape
    out = images.new_empty((N, B, A))
    if images.device.type == "cpu":
        # Torch's copy takes one core, and half the time are the page faults of fresh memory.
        _transpose(images.data_ptr(), out.data_ptr(), N, A, B, images.element_size())
    else:
        for n in range(N):
            out[n].copy_(images[n].t())
    return out


def channels_last(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as a row-contiguous (N, H, W, C)."""
    N, C, H, W = tensor.shape
    if C * H * W < LARGE or not tensor.is_contiguous():
        return tensor.permute(0, 2, 3, 1).contiguous()
    return _transposed(tensor.view(N, C, H * W)).view(N, H, W, C)


def channels_first(rows: Tensor, like: Tensor) -> Tensor:
    """A row-contiguous (N, H, W, C) as (N, C, H, W) in the memory format of ``like``."""
    tensor = rows.permute(0, 3, 1, 2)
    if is_channels_last(like):
        return tensor
    N, C, H, W = tensor.shape
    if C * H * W < LARGE:
        # Not contiguous(), which keeps odd strides of axes of length 1.
        return tensor.new_empty((N, C, H, W)).copy_(tensor)
    return _transposed(rows.view(N, H * W, C)).view(N, C, H, W)
