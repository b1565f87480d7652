"""Backbones by the names that a ``backbone_config`` has.

A backbone is built as ``model(config, norm)``, with the class of its batch normalisation. Its
``steps(pixels, maps)`` yields what to evaluate one by one, ``step_count`` times, and appends the
maps of the stages ``config.out_indices`` to the list.
"""

from typing import NamedTuple

from .hgnet_v2 import HGNetV2, HGNetV2Config
from .plain_resnet import PlainResNet, PlainResNetConfig
from .resnet import ResNet, ResNetConfig


class Backbone(NamedTuple):
    config: type
    model: type


BACKBONES = {
    "resnet": Backbone(PlainResNetConfig, PlainResNet),
    "hgnet_v2": Backbone(HGNetV2Config, HGNetV2),
    "rt_detr_resnet": Backbone(ResNetConfig, ResNet),
}
