"""Backbones by the names that a ``backbone_config`` has.

A backbone is built as ``model(config, norm)``, with the class of its batch normalisation. Its
``steps(pixels, maps)`` yields what to evaluate one by one, ``step_count`` times, and appends the
maps of the stages ``config.out_indices`` to the list.
"""

from typing import NamedTuple

from .plain_resnet import PlainResNet, PlainResNetConfig
from .resnet import ResNet, ResNetConfig


class Backbone(NamedTuple):
    config: type
    model: type


BACKBONES = {
    "resnet": Backbone(PlainResNetConfig, PlainResNet),
    "rt_detr_resnet": Backbone(ResNetConfig, ResNet),
}
