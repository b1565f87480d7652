"""Deformable convolution as `mlx.nn` layers, and the loading of PyTorch's weights into them."""

from .checkpoints import load_torch_weights
from .layers import DeformConv2d, ModulatedDeformConv2d

__all__ = ["DeformConv2d", "ModulatedDeformConv2d", "load_torch_weights"]
