"""BiRefNet in MLX: what stands in the foreground of a picture, as a mask.

Zheng et al., "Bilateral Reference for High-Resolution Dichotomous Image Segmentation",
arXiv:2401.03407. `python -m mlx_deform.models.birefnet` removes the background of pictures.
"""

from .config import BiRefNetConfig, SwinConfig, config_of
from .decoder import TrainingOutputs
from .model import BiRefNet
from .weights import load_model, load_weights, save_weights

__all__ = [
    "BiRefNet",
    "BiRefNetConfig",
    "SwinConfig",
    "TrainingOutputs",
    "config_of",
    "load_model",
    "load_weights",
    "save_weights",
]
