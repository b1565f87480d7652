"""The sizes of the published models, by their names on the hub.

Swin's sizes are those of "Swin Transformer" (arXiv:2103.14030, section 3.3) with the window
sizes of BiRefNet's models/backbones/swin_v1.py; the rest of its config.py is the same for
every published checkpoint and stands as constants where it is used.
"""

from dataclasses import dataclass, replace

# The order in which the pixels of an image become channels of the decoder's patches.
PATCH_ORDERS = ("channels", "columns")


@dataclass(frozen=True)
class SwinConfig:
    """A Swin backbone: channels of the first stage, blocks and heads of each, window's side."""

    channels: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    window: int


BACKBONES = {
    "swin_v1_t": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_v1_s": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_v1_b": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_v1_l": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


@dataclass(frozen=True)
class BiRefNetConfig:
    """What differs between the published models.

    Attributes:
        backbone: the sizes of the Swin transformer.
        size: height and width that pictures are resized to; multiples of 32.
        patch_order: how the decoder's patches of the image are stacked as channels: "channels"
            is (c hg wg), BiRefNet's own since November 2024; "columns" is (wg hg c), that of
            its earlier code and of RMBG-2.0. A checkpoint doesn't say which it was trained with.
        drop_path: the last block's chance to be skipped in training; earlier ones have less.
        dropout: of the decoder's features in training.
    """

    backbone: SwinConfig = BACKBONES["swin_v1_l"]
    size: tuple[int, int] = (1024, 1024)
    patch_order: str = "channels"
    drop_path: float = 0.2
    dropout: float = 0.5

    def __post_init__(self):
        if self.patch_order not in PATCH_ORDERS:
            raise ValueError(
                f"[BiRefNetConfig] patch_order must be one of {', '.join(PATCH_ORDERS)}; "
                f"got {self.patch_order!r}"
            )

    @property
    def backbone_name(self) -> str:
        """The published name of the backbone, such as "swin_v1_l"."""
        names = [name for name, backbone in BACKBONES.items() if backbone == self.backbone]
        return names[0] if names else "another backbone"


_LARGE = BiRefNetConfig()
_TINY = replace(_LARGE, backbone=BACKBONES["swin_v1_t"])

# The patch order is that of the code published beside each checkpoint.
CONFIGS = {
    "BiRefNet": _LARGE,
    "BiRefNet_512x512": replace(_LARGE, size=(512, 512)),
    "BiRefNet_HR": replace(_LARGE, size=(2048, 2048)),
    "BiRefNet_HR-matting": replace(_LARGE, size=(2048, 2048)),
    "BiRefNet_dynamic": _LARGE,
    "BiRefNet-matting": _LARGE,
    "BiRefNet-portrait": _LARGE,
    "BiRefNet-DIS5K": _LARGE,
    "BiRefNet-HRSOD": _LARGE,
    "BiRefNet-COD": _LARGE,
    "BiRefNet_lite": _TINY,
    "BiRefNet_lite-2K": replace(_TINY, size=(1440, 2560)),
    "RMBG-2.0": replace(_LARGE, patch_order="columns"),
    "swin_s": replace(_LARGE, backbone=BACKBONES["swin_v1_s"]),
    "swin_b": replace(_LARGE, backbone=BACKBONES["swin_v1_b"]),
}
ALIASES = {"swin_l": "BiRefNet", "swin_t": "BiRefNet_lite", "lite": "BiRefNet_lite"}


def config_of(name: str) -> BiRefNetConfig:
    """The configuration of a published model.

    Args:
        name (str): Its name on the hub, such as ``"BiRefNet"``, ``"BiRefNet_lite"`` or
            ``"RMBG-2.0"``, also with its owner's in front; or the backbone alone, ``"swin_t"``
            to ``"swin_l"``. Upper and lower case are the same.

    Raises:
        ValueError: If no model has that name.

    Example:
        >>> from mlx_deform.models.birefnet import config_of
        >>> config_of("ZhengPeng7/BiRefNet_lite").backbone.channels
        96
    """
    by_name = {key.lower(): value for key, value in CONFIGS.items()}
    by_name |= {key: CONFIGS[value] for key, value in ALIASES.items()}
    try:
        return by_name[name.rsplit("/", 1)[-1].lower()]
    except KeyError:
        raise ValueError(
            f"[BiRefNet] a model must be one of {', '.join([*CONFIGS, *ALIASES])}; got {name!r}"
        ) from None
