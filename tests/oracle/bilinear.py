"""Samples between the pixels of images, and their derivatives, in float64 NumPy.

An image is extended by zeros without end and interpolated bilinearly between the four
corners of the cell (floor(y), floor(x)); derivatives are those of that cell's surface.
Three consequences are spelled out:

- A sample with no corner in the image, an infinite one too, is 0 and constant.
- A corner outside the image is 0 by definition and never read; a corner inside takes
  part even when its weight is 0, so an infinite pixel there gives NaN.
- A NaN coordinate has no cell: the sample is NaN, so are the derivatives by its
  position and by what it is multiplied with, and no pixel receives a gradient from it.
"""

from typing import NamedTuple

import numpy as np


class Corner(NamedTuple):
    """One of the pixels that each sample reads: its place, and its part in the value."""

    valid: np.ndarray  # of the shape of the samples: the corner lies in the image
    # Of the valid ones, one after the other:
    y: np.ndarray
    x: np.ndarray
    weight: np.ndarray
    slope_y: np.ndarray  # d weight / d y
    slope_x: np.ndarray  # d weight / d x


def cell_corners(y, x, H, W, absolute=False):
    """The four corners of every sample (y, x) of images of H by W pixels.

    `H` and `W` are numbers, or arrays that broadcast to the samples. `absolute=True` gives the
    magnitudes of the slopes.
    """
    # NaN is not near either; everywhere else all four corners are outside the image.
    near = (y >= -1) & (y < H) & (x >= -1) & (x < W)
    y, x = np.where(near, y, -1.0), np.where(near, x, -1.0)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    corners = []
    for below in (0, 1):
        for right in (0, 1):
            cy, cx = y0 + below, x0 + right
            valid = near & (cy >= 0) & (cy < H) & (cx >= 0) & (cx < W)
            ly, lx = (y - y0)[valid], (x - x0)[valid]
            weight_y = ly if below else 1 - ly
            weight_x = lx if right else 1 - lx
            sign_y = 1.0 if below or absolute else -1.0
            sign_x = 1.0 if right or absolute else -1.0
            corners.append(
                Corner(
                    valid=valid,
                    y=cy[valid],
                    x=cx[valid],
                    weight=weight_y * weight_x,
                    slope_y=sign_y * weight_x,
                    slope_x=sign_x * weight_y,
                )
            )
    return corners


class Samples:
    """The samples of one call, in arrays of any shape S; their values are (*S, channels)."""

    def __init__(self, pixels, corners, nan, place):
        """`place(corner)` indexes the leading axes of `pixels` (..., channels); `nan` is where
        a coordinate is NaN."""
        self.pixels = pixels
        self.corners = corners
        self.nan = nan
        self.places = [place(corner) for corner in corners]
        self.outside = ~np.logical_or.reduce([corner.valid for corner in corners])

    def value(self):
        return self._interpolate("weight")

    def vjp(self, cotangent):
        """The gradients of sum(cotangent * value) by the pixels, and by y and x of the samples."""
        by_pixels = np.zeros_like(self.pixels)
        for corner, place in zip(self.corners, self.places, strict=True):
            # Several samples may share a pixel: add.at adds them all.
            np.add.at(by_pixels, place, corner.weight[:, None] * cotangent[corner.valid])
        by_y, by_x = (
            self.summed(cotangent * self._interpolate(slope)) for slope in ("slope_y", "slope_x")
        )
        return by_pixels, by_y, by_x

    def summed(self, terms):
        """The gradient by one number of each sample, from the terms of the channels."""
        gradient = terms.sum(axis=-1)
        gradient[self.outside] = 0.0
        gradient[self.nan] = np.nan
        return gradient

    def _interpolate(self, factor):
        """The sum over the corners of pixel times `factor`, a field of Corner."""
        value = np.zeros((*self.nan.shape, self.pixels.shape[-1]))
        for corner, place in zip(self.corners, self.places, strict=True):
            value[corner.valid] += getattr(corner, factor)[:, None] * self.pixels[place]
        value[self.nan] = np.nan
        return value
