"""Detectors of the DETR family in MLX: RT-DETR, RT-DETRv2, D-FINE and Deformable DETR."""

from .d_fine import DFINE
from .d_fine_config import DFINEConfig
from .deformable_detr import DeformableDETR
from .deformable_detr_config import DeformableDETRConfig
from .families import config_of, model_of
from .outputs import DenoisingQueries, DetectorOutputs, LayerOutputs, Target
from .preprocessing import ImageProcessor
from .rt_detr import RTDETR
from .rt_detr_config import RTDETRConfig, RTDETRv2Config
from .weights import load_model, load_weights, read_config, save_model

__all__ = [
    "DFINE",
    "RTDETR",
    "DFINEConfig",
    "DeformableDETR",
    "DeformableDETRConfig",
    "DenoisingQueries",
    "DetectorOutputs",
    "ImageProcessor",
    "LayerOutputs",
    "RTDETRConfig",
    "RTDETRv2Config",
    "Target",
    "config_of",
    "load_model",
    "load_weights",
    "model_of",
    "read_config",
    "save_model",
]
