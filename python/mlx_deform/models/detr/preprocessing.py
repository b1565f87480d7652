"""Pictures as detectors take them, as a checkpoint's ``preprocessor_config.json`` says.

The numbers are those of transformers' image processors on Pillow, which made the published
results: 8-bit pixels are resized with Pillow's filter, then scaled, normalised and padded.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from PIL import Image

TAG = "[ImageProcessor]"

FILE = "preprocessor_config.json"

# The sets of keys that a size can have.
SIZES = (
    {"height", "width"},
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"max_height", "max_width"},
)

Colour = tuple[float, float, float]


class Inputs(NamedTuple):
    """pixels: (N, H, W, 3). mask: boolean, (N, H, W), True where padding is; None if none is."""

    pixels: mx.array
    mask: mx.array | None


@dataclass(frozen=True)
class ImageProcessor:
    """Makes pictures a model's input. Names and meanings are transformers'.

    size: ``height`` and ``width``, whatever the picture's proportions; or, keeping them,
    ``shortest_edge`` that the shorter side gets unless the longer one exceeded
    ``longest_edge``; or ``max_height`` and ``max_width`` to fit in. resample: Pillow's number
    of a filter; 2 is bilinear, which weighs all the pixels that a new one covers. pad_size: that
    a batch is padded to if do_pad, by default its largest height and width.
    """

    size: Mapping[str, int] = field(default_factory=lambda: {"height": 640, "width": 640})
    do_resize: bool = True
    resample: int = 2
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = False
    image_mean: Colour = (0.485, 0.456, 0.406)
    image_std: Colour = (0.229, 0.224, 0.225)
    do_pad: bool = False
    pad_size: Mapping[str, int] | None = None
    image_processor_type: str = "RTDetrImageProcessor"

    def __post_init__(self):
        if not isinstance(self.size, Mapping) or set(self.size) not in SIZES:
            rule = ", or ".join(" and ".join(sorted(keys)) for keys in SIZES)
            raise ValueError(f"{TAG} size must have {rule}; got {self.size!r}")
        if any(type(side) is not int or side < 1 for side in self.size.values()):
            raise ValueError(f"{TAG} size must be of positive integers; got {self.size!r}")
        if self.pad_size is not None and set(self.pad_size) != SIZES[0]:
            raise ValueError(f"{TAG} pad_size must have height and width; got {self.pad_size!r}")
        if self.resample not in range(6):
            raise ValueError(f"{TAG} resample must be one of Pillow's, 0 to 5; got {self.resample}")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{TAG} {name} must be of 3 colours; got {getattr(self, name)}")

    @classmethod
    def of(cls, model_type: str) -> "ImageProcessor":
        """That of the published checkpoints of a family."""
        return DEFORMABLE_DETR if model_type == "deformable_detr" else RT_DETR

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], model_type: str = "") -> "ImageProcessor":
        """What a ``preprocessor_config.json`` says.

        Args:
            settings (dict): Its contents. Sizes may be as in old files, a number beside
                ``max_size``.
            model_type (str): The family, whose defaults hold where the file names no processor.

        Raises:
            ValueError: If a setting breaks a rule.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"{TAG} settings must be a dictionary; got {settings!r}")
        settings = dict(settings)
        kind = settings.get("image_processor_type") or settings.pop("feature_extractor_type", None)
        if kind is None:
            base = cls.of(model_type)
        else:
            base = DEFORMABLE_DETR if kind.startswith(("DeformableDetr", "Detr")) else RT_DETR
        # A file of before transformers 5, and the classes' names of then.
        settings["image_processor_type"] = base.image_processor_type
        if "pad_and_return_pixel_mask" in settings:
            settings.setdefault("do_pad", settings["pad_and_return_pixel_mask"])
        if type(settings.get("size")) is int:
            shortest, longest = settings["size"], settings.get("max_size", 1333)
            settings["size"] = {"shortest_edge": shortest, "longest_edge": longest}
        elif isinstance(settings.get("size"), Mapping):
            settings["size"] = {key: side for key, side in settings["size"].items() if side}
        known = {entry.name for entry in fields(cls)}
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
            if name in known and (value is not None or name == "pad_size")
        }
        try:
            return replace(base, **given)
        except TypeError as error:
            raise ValueError(f"{TAG} settings must be of transformers' types: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """What transformers reads, and :meth:`from_json`."""
        return asdict(self)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture of that size is resized to."""
        size = self.size
        if "height" in size:
            return size["height"], size["width"]
        if "max_height" in size:
            scale = min(size["max_height"] / height, size["max_width"] / width)
            return int(height * scale), int(width * scale)
        shorter, longer = min(height, width), max(height, width)
        side: float = size["shortest_edge"]
        longest = size.get("longest_edge")
        if longest is not None and longer / shorter * side > longest:
            side = longest * shorter / longer
        # The shorter side is rounded, the longer one cut off, as there.
        sides = round(side), int(side * longer / shorter)
        if sides[0] == shorter:
            sides = shorter, longer
        return sides if height <= width else sides[::-1]

    def pixels(self, picture: "Image.Image") -> np.ndarray:
        """One picture, of any mode, as float32 of shape (H, W, 3), without padding."""
        from ..pictures import to_rgb  # only here is Pillow needed

        picture = to_rgb(picture)
        if self.do_resize:
            height, width = self.size_of(picture.height, picture.width)
            picture = picture.resize((width, height), self.resample)
        pixels = np.asarray(picture)
        if self.do_rescale:  # in double, as there, so that all numbers are the same
            pixels = np.multiply(pixels, self.rescale_factor, dtype=np.float64)
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            mean, std = np.float32(self.image_mean), np.float32(self.image_std)
            pixels = (pixels - mean) / std
        return pixels

    def __call__(self, pictures: Sequence["Image.Image"], dtype: mx.Dtype = mx.float32) -> Inputs:
        """A batch of pictures as a model takes it.

        Args:
            pictures (sequence of PIL.Image.Image): At least one, of any modes.
            dtype (Dtype): Of the pixels.

        Raises:
            ValueError: If there is no picture, they get several sizes without padding, or one
                is larger than ``pad_size``.
        """
        batch = [self.pixels(picture) for picture in pictures]
        if not batch:
            raise ValueError(f"{TAG} pictures must be at least one; got none")
        sizes = [pixels.shape[:2] for pixels in batch]
        height, width = np.max(sizes, axis=0).tolist()
        if self.do_pad and self.pad_size is not None:
            room = self.pad_size["height"], self.pad_size["width"]
            if height > room[0] or width > room[1]:
                raise ValueError(f"{TAG} pictures must fit pad_size, {room}; got {height, width}")
            height, width = room
        padded = any(size != (height, width) for size in sizes)
        if padded and not self.do_pad:
            raise ValueError(f"{TAG} pictures must get one size unless do_pad; got {sizes}")
        pixels = np.zeros((len(batch), height, width, 3), np.float32)
        mask = np.ones(pixels.shape[:3], bool)
        for index, (own, (h, w)) in enumerate(zip(batch, sizes, strict=True)):
            pixels[index, :h, :w] = own
            mask[index, :h, :w] = False
        return Inputs(mx.array(pixels).astype(dtype), mx.array(mask) if padded else None)


# RTDetrImageProcessor's defaults, which the published RT-DETR, RT-DETRv2 and D-FINE have, and
# DeformableDetrImageProcessor's.
RT_DETR = ImageProcessor()
DEFORMABLE_DETR = ImageProcessor(
    size={"shortest_edge": 800, "longest_edge": 1333},
    do_normalize=True,
    do_pad=True,
    image_processor_type="DeformableDetrImageProcessor",
)


def read_processor(folder: str | os.PathLike, model_type: str = "") -> ImageProcessor:
    """The image processor of the checkpoint in a folder.

    Args:
        folder (str or path): Where a ``preprocessor_config.json`` may be.
        model_type (str): The family, whose published processor it is if the file is missing.

    Raises:
        ValueError: If the file holds none.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return ImageProcessor.of(model_type)
    try:
        return ImageProcessor.from_json(json.loads(path.read_text()), model_type)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{TAG} {str(path)!r} must hold one: {error}") from None
