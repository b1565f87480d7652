"""Pictures in, masks and cut-outs out, as the official inference has them.

tutorials/BiRefNet_inference.ipynb and the model cards on the hub: the picture is resized with
Pillow's bilinear filter, normalised with ImageNet's mean and standard deviation; the mask goes
through 8 bits back to the picture's size with Pillow's bicubic filter.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image, ImageChops

from ..pictures import read_picture, straight, to_rgb
from .model import BiRefNet

__all__ = ["CutOut", "cut_out", "read_picture", "to_input", "to_mask", "to_rgb"]

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


class CutOut(NamedTuple):
    """mask: mode L, of the picture's size. picture: mode RGBA, the mask as its alpha."""

    mask: Image.Image
    picture: Image.Image


def to_input(picture: Image.Image, size: tuple[int, int], dtype: mx.Dtype = mx.float32) -> mx.array:
    """A picture as the model takes it.

    Args:
        picture (PIL.Image.Image): Of any mode.
        size (pair): Height and width for the model; multiples of 32.
        dtype (Dtype): The model's type.

    Returns:
        array: Of shape ``(1, *size, 3)``.
    """
    pixels = np.asarray(to_rgb(picture).resize(size[::-1], Image.Resampling.BILINEAR), np.float32)
    return mx.array((pixels / 255 - MEAN) / STD)[None].astype(dtype)


def to_mask(logits: mx.array, size: tuple[int, int]) -> Image.Image:
    """The mask of a picture of that width and height from what the model gives for it.

    logits: (1, H, W, 1).
    """
    opacity = np.array(mx.sigmoid(logits.astype(mx.float32))[0, :, :, 0])
    mask = Image.fromarray((opacity * 255).astype(np.uint8))  # cut off, as torchvision does
    return mask.resize(size, Image.Resampling.BICUBIC)


def cut_out(
    model: BiRefNet,
    picture: Image.Image,
    size: tuple[int, int] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> CutOut:
    """Removes the background of a picture.

    Args:
        model (BiRefNet): In evaluation mode; see :func:`load_model`.
        picture (PIL.Image.Image): Of any mode. Where it is transparent the cut-out is too.
        size (pair): Height and width for the model; multiples of 32. Default: the model's.
        on_step (callable): Called ``model.step_count`` times, after each step of the model.

    Returns:
        CutOut: The mask and the cut-out, both of the picture's size.

    Raises:
        ValueError: If the size breaks a rule, or the model is in training mode.

    Example:
        >>> from mlx_deform.models.birefnet import load_model
        >>> from mlx_deform.models.birefnet.inference import cut_out, read_picture
        >>> model = load_model("model.safetensors")  # doctest: +SKIP
        >>> cut_out(model, read_picture("cat.jpg")).picture.save("cat.png")  # doctest: +SKIP
    """
    if model.training:
        raise ValueError("[BiRefNet] the model must be in evaluation mode; call model.eval()")
    dtype = model.bb.patch_embed.proj.weight.dtype
    for result in model.steps(to_input(picture, size or model.config.size, dtype)):
        mx.eval(result)
        on_step()
    mask = to_mask(result, picture.size)
    alpha = mask
    if picture.has_transparency_data:
        own = straight(picture).convert("RGBA").getchannel("A")
        alpha = ImageChops.multiply(mask, own)
    coloured = to_rgb(picture)
    coloured.putalpha(alpha)
    return CutOut(mask, coloured)
