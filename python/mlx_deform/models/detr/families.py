"""The families of detectors, by the ``model_type`` of a ``config.json``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...nn.ordinary import use_fast_products
from . import (
    d_fine_config,
    d_fine_weights,
    deformable_detr_config,
    deformable_detr_weights,
    rt_detr_config,
    rt_detr_weights,
)
from .config import DetectorConfig
from .d_fine import DFINE
from .d_fine_config import DFINEConfig
from .deformable_detr import DeformableDETR
from .deformable_detr_config import DeformableDETRConfig
from .detector import Detector
from .rt_detr import RTDETR
from .rt_detr_config import RTDETRConfig, RTDETRv2Config

State = Mapping[str, Any]


class Family(NamedTuple):
    """A family.

    config, model: its classes. names: gives a checkpoint the model's names, and leaves out
    what the model has once. inferred: the configuration that a checkpoint, so named, has.
    """

    config: type[DetectorConfig]
    model: type[Detector]
    names: Callable[[State], dict[str, Any]]
    inferred: Callable[[State], DetectorConfig]


FAMILIES = {
    "rt_detr": Family(RTDETRConfig, RTDETR, rt_detr_weights.hub_names, rt_detr_weights.inferred),
    "rt_detr_v2": Family(
        RTDETRv2Config, RTDETR, rt_detr_weights.hub_names, rt_detr_weights.inferred
    ),
    "deformable_detr": Family(
        DeformableDETRConfig,
        DeformableDETR,
        deformable_detr_weights.hub_names,
        deformable_detr_weights.inferred,
    ),
    "d_fine": Family(DFINEConfig, DFINE, d_fine_weights.hub_names, d_fine_weights.inferred),
}

# Published models by their names on the hub.
CONFIGS: dict[str, DetectorConfig] = {
    **rt_detr_config.PUBLISHED,
    **d_fine_config.PUBLISHED,
    **deformable_detr_config.PUBLISHED,
}


def model_type_of(state: State) -> str:
    """The family whose weights a checkpoint without a configuration holds."""
    if any(name.endswith(".level_embed") for name in state):
        return "deformable_detr"
    if any(".lqe_layers." in name for name in state):
        return "d_fine"
    if any(name.endswith(("n_points_scale", "num_points_scale")) for name in state):
        return "rt_detr_v2"
    return "rt_detr"


def config_of(name: str) -> DetectorConfig:
    """The configuration of a published model.

    Args:
        name (str): Its name on the hub, such as ``"rtdetr_r18vd"`` or ``"rtdetr_v2_r50vd"``,
            also with its owner's in front. Upper and lower case are the same.

    Raises:
        ValueError: If no model has that name.

    Example:
        >>> from mlx_deform.models.detr import config_of
        >>> config_of("PekingU/rtdetr_r18vd").decoder_layers
        3
    """
    by_name = {key.lower(): config for key, config in CONFIGS.items()}
    try:
        return by_name[name.rsplit("/", 1)[-1].lower()]
    except KeyError:
        raise ValueError(
            f"[detr] a model must be one of {', '.join(CONFIGS)}; got {name!r}"
        ) from None


def model_of(config: DetectorConfig) -> Detector:
    """A new model, with random weights and the products that suit the device."""
    return use_fast_products(FAMILIES[config.model_type].model(config))
