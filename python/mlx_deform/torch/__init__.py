"""Deformable convolution and attention for PyTorch, computed by MLX: on MPS, whose memory they
share, and on the CPU.

A drop-in for torchvision's and mps-deform-conv's, and for mmcv's and transformers' attention.
:func:`patch_torchvision` and :func:`patch_transformers` switch code over that calls these.
"""

from . import _transforms  # noqa: F401  (registers itself)
from ._attention import MMCVMultiScaleDeformableAttention
from ._checks import InvalidArgument
from ._functional import deform_conv2d, is_available
from ._modules import DeformConv2d, ModulatedDeformConv2d
from ._msda import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attention,
)
from ._patch import patch_torchvision
from ._transformers import patch_transformers

__all__ = [
    "DeformConv2d",
    "InvalidArgument",
    "MMCVMultiScaleDeformableAttention",
    "ModulatedDeformConv2d",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "deform_conv2d",
    "is_available",
    "multi_scale_deformable_attention",
    "patch_torchvision",
    "patch_transformers",
]
