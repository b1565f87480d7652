"""Multi-scale deformable attention and its gradients in float64 NumPy: slow and obvious.

Shapes: value (N, S, M, D), locations (N, Q, M, K, 2) with (x, y) in units of the map, weights
(N, Q, M, K), output (N, Q, M * D); `points` gives the samples of each level, K in all.
"""

from typing import NamedTuple

import numpy as np


class Gradients(NamedTuple):
    value: np.ndarray
    locations: np.ndarray
    weights: np.ndarray


class _Corner(NamedTuple):
    """One of the pixels that a sample reads, for all images, queries and heads."""

    exists: np.ndarray  # (N, Q, M): it lies on the map
    pixel: tuple  # index arrays into value, where it exists
    weight: np.ndarray  # (N, Q, M)
    slope_y: np.ndarray  # d weight / d y, y in pixels
    slope_x: np.ndarray


def _corners(y, x, size, start, method, absolute):
    """The corners around (y, x), each (N, Q, M) in float64, and where either is NaN."""
    H, W = size
    nan = np.isnan(y) | np.isnan(x)
    n, m = np.indices(y.shape)[[0, 2]]

    def corner(cy, cx, on_map, *weights):
        row = start + cy * W + cx
        return _Corner(on_map, (n[on_map], row[on_map], m[on_map]), *weights)

    if method == "discrete":
        y, x = np.where(nan, 0.0, y), np.where(nan, 0.0, x)
        cy = np.clip(np.trunc(y), 0, H - 1).astype(int)
        cx = np.clip(np.trunc(x), 0, W - 1).astype(int)
        zero = np.zeros_like(y)
        return [corner(cy, cx, ~nan, zero + 1, zero, zero)], nan
    near = ~nan & (y >= -1) & (y < H) & (x >= -1) & (x < W)
    y, x = np.where(near, y, -1.0), np.where(near, x, -1.0)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    corners = []
    for below in (0, 1):
        for right in (0, 1):
            cy, cx = y0 + below, x0 + right
            on_map = near & (cy >= 0) & (cy < H) & (cx >= 0) & (cx < W)
            weight_y = y - y0 if below else 1 - (y - y0)
            weight_x = x - x0 if right else 1 - (x - x0)
            sign_y = 1 if below or absolute else -1
            sign_x = 1 if right or absolute else -1
            weights = (weight_y * weight_x, sign_y * weight_x, sign_x * weight_y)
            corners.append(corner(cy, cx, on_map, *weights))
    return corners, nan


def _samples(value, spatial_shapes, locations, points, method, coordinate_dtype, absolute):
    """Yield (k, size, corners, nan) for every sample k of a query and head."""
    assert sum(h * w for h, w in spatial_shapes) == value.shape[1]
    assert sum(points) == locations.shape[3]
    shift = 0.5 if method == "discrete" else -0.5
    real = coordinate_dtype
    start = k = 0
    for (H, W), count in zip(spatial_shapes, points, strict=True):
        for _ in range(count):
            x, y = np.moveaxis(locations[:, :, :, k].astype(real), -1, 0)
            y = (y * real(H) + real(shift)).astype(np.float64)
            x = (x * real(W) + real(shift)).astype(np.float64)
            yield k, (H, W), *_corners(y, x, (H, W), start, method, absolute)
            k += 1
        start += H * W


def _prepared(value, weights, absolute):
    prepare = np.abs if absolute else np.asarray
    return prepare(np.asarray(value, np.float64)), prepare(np.asarray(weights, np.float64))


def multi_scale_deformable_attention(
    value,
    spatial_shapes,
    locations,
    weights,
    points,
    method="bilinear",
    *,
    coordinate_dtype=np.float64,
    absolute=False,
):
    """The sum over all samples of weight times sample."""
    value, weights = _prepared(value, weights, absolute)
    N, _, M, D = value.shape
    Q = locations.shape[1]
    output = np.zeros((N, Q, M, D))
    with np.errstate(invalid="ignore", over="ignore"):
        for k, _, corners, nan in _samples(
            value, spatial_shapes, locations, points, method, coordinate_dtype, absolute
        ):
            sample = np.zeros((N, Q, M, D))
            for corner in corners:
                at = corner.exists
                sample[at] += corner.weight[at][:, None] * value[corner.pixel]
            sample[nan] = np.nan
            output += weights[:, :, :, k, None] * sample
    return output.reshape(N, Q, M * D)


def multi_scale_deformable_attention_vjp(
    cotangent,
    value,
    spatial_shapes,
    locations,
    weights,
    points,
    method="bilinear",
    *,
    coordinate_dtype=np.float64,
    absolute=False,
):
    """Gradients of sum(cotangent * output)."""
    value, weights = _prepared(value, weights, absolute)
    cotangent, _ = _prepared(cotangent, weights, absolute)
    N, _, M, D = value.shape
    cotangent = cotangent.reshape(N, locations.shape[1], M, D)
    grads = Gradients(np.zeros(value.shape), np.zeros(locations.shape), np.zeros(weights.shape))
    with np.errstate(invalid="ignore", over="ignore"):
        for k, (H, W), corners, nan in _samples(
            value, spatial_shapes, locations, points, method, coordinate_dtype, absolute
        ):
            weight = weights[:, :, :, k]
            sample, slope_y, slope_x = (np.zeros(cotangent.shape) for _ in range(3))
            for corner in corners:
                at = corner.exists
                pixel = value[corner.pixel]
                sample[at] += corner.weight[at][:, None] * pixel
                slope_y[at] += corner.slope_y[at][:, None] * pixel
                slope_x[at] += corner.slope_x[at][:, None] * pixel
                # Several samples may share a pixel: add.at adds them all.
                share = (weight * corner.weight)[at][:, None] * cotangent[at]
                np.add.at(grads.value, corner.pixel, share)
            grads.weights[:, :, :, k] = (cotangent * sample).sum(-1)
            grads.locations[:, :, :, k, 0] = W * weight * (cotangent * slope_x).sum(-1)
            grads.locations[:, :, :, k, 1] = H * weight * (cotangent * slope_y).sum(-1)
            outside = ~np.logical_or.reduce([corner.exists for corner in corners])
            for gradient in (grads.weights[:, :, :, k], grads.locations[:, :, :, k]):
                gradient[outside] = 0
                gradient[nan] = np.nan
            if method == "discrete":
                grads.locations[:, :, :, k] = 0
    return grads
