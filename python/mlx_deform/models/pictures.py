"""Pictures from files, of any mode, as 8-bit colours."""

import os

import numpy as np
from PIL import Image, ImageOps


def read_picture(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, turned as its EXIF orientation says; the first of several frames.

    Raises:
        ValueError: If it can't be read; the message says why.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except Image.UnidentifiedImageError:
        raise ValueError("it is no picture that Pillow knows") from None
    except Exception as error:  # decoders of damaged files raise what they like
        raise ValueError(f"it can't be read: {error}") from None


def straight(picture: Image.Image) -> Image.Image:
    """Grey with premultiplied transparency, which Pillow converts to no other mode, without."""
    return picture.convert("LA") if picture.mode == "La" else picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """The colours of a picture of any mode in 8 bits, its transparency left out.

    Modes of more bits are scaled by the least of 1 (of floats), 255 and 65535 that holds their
    brightest pixel.
    """
    picture = straight(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(picture, np.float32)).clip(0)
        if picture.mode.startswith("I;16"):
            top = 65535
        else:
            tops = (1, 255, 65535) if picture.mode == "F" else (255, 65535)
            brightest = float(values.max(initial=0))
            top = next((top for top in tops if brightest <= top), brightest)
        picture = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if picture.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
    return picture.convert("RGB")
