"""Deformable convolution and attention as `mlx.nn` layers, and the loading of PyTorch's weights."""

from .attention import MultiScaleDeformableAttention
from .checkpoints import load_torch_weights
from .layers import DeformConv2d, ModulatedDeformConv2d

__all__ = [
    "DeformConv2d",
    "ModulatedDeformConv2d",
    "MultiScaleDeformableAttention",
    "load_torch_weights",
]
