"""BiRefNet."""

from .config import BiRefNetConfig, SwinConfig, config_of
from .decoder import TrainingOutputs
from .model import BiRefNet

__all__ = ["BiRefNet", "BiRefNetConfig", "SwinConfig", "TrainingOutputs", "config_of"]
