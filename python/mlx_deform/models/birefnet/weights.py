"""Checkpoints of the official models, and MLX's own."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...nn import load_torch_weights
from .config import BACKBONES
from .model import BiRefNet
