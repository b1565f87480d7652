"""Deformable convolution for PyTorch, computed by MLX: on MPS, whose memory they share, and on
the CPU.

A drop-in for torchvision's and mps-deform-conv's. :func:`patch_torchvision` switches code over
that calls torchvision.
"""

from . import _transforms  # noqa: F401  (registers itself)
from ._checks import InvalidArgument
from ._functional import deform_conv2d, is_available
from ._modules import DeformConv2d, ModulatedDeformConv2d
from ._patch import patch_torchvision

__all__ = [
    "DeformConv2d",
    "InvalidArgument",
    "ModulatedDeformConv2d",
    "deform_conv2d",
    "is_available",
    "patch_torchvision",
]
