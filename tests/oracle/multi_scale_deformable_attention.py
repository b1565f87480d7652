"""Multi-scale deformable attention and its gradients in float64 NumPy: as plain as the definition.

Shapes: value (N, S, M, D), locations (N, Q, M, K, 2) with (x, y) in units of the map, weights
(N, Q, M, K), output (N, Q, M * D); `points` gives the samples of each level, K in all. Samples
follow the rules of bilinear.py, discrete ones with the nearest pixel for their only corner.
"""

from typing import NamedTuple

import numpy as np

from .bilinear import Corner, Samples, cell_corners


class Gradients(NamedTuple):
    value: np.ndarray
    locations: np.ndarray
    weights: np.ndarray


class _Problem:
    """The arrays of one call, and its samples (N, Q, M, K), whose values are (..., D)."""

    def __init__(
        self,
        value,
        spatial_shapes,
        locations,
        weights,
        points,
        method,
        coordinate_dtype,
        absolute,
    ):
        assert sum(h * w for h, w in spatial_shapes) == value.shape[1]
        assert sum(points) == locations.shape[3]
        self.discrete = method == "discrete"
        self.prepare = np.abs if absolute else np.asarray
        self.weights = self.prepare(np.asarray(weights, np.float64))
        # Of each sample's level, (K,): its size, and where its pixels start.
        start = np.cumsum([0, *(h * w for h, w in spatial_shapes)])[:-1]
        self.H, self.W, start = (
            np.repeat(np.array(of_level, int), points)
            for of_level in (*zip(*spatial_shapes, strict=True), start)
        )
        real = coordinate_dtype
        shift = real(0.5 if self.discrete else -0.5)
        x, y = np.moveaxis(locations.astype(real), -1, 0)
        y = (y * self.H.astype(real) + shift).astype(np.float64)
        x = (x * self.W.astype(real) + shift).astype(np.float64)
        nan = np.isnan(y) | np.isnan(x)

        def place(corner):
            n, _, head, k = np.nonzero(corner.valid)
            return n, start[k] + corner.y * self.W[k] + corner.x, head

        find = self._nearest if self.discrete else cell_corners
        self.samples = Samples(
            self.prepare(np.asarray(value, np.float64)),
            find(y, x, self.H, self.W, absolute),
            nan,
            place,
        )

    @staticmethod
    def _nearest(y, x, H, W, absolute):
        """The pixel that a discrete sample takes, as its only corner: constant in y and x."""
        valid = ~(np.isnan(y) | np.isnan(x))
        y, x = np.where(valid, y, 0.0), np.where(valid, x, 0.0)
        cy = np.clip(np.trunc(y), 0, H - 1).astype(int)[valid]
        cx = np.clip(np.trunc(x), 0, W - 1).astype(int)[valid]
        one = np.ones(cy.shape)
        return [Corner(valid, cy, cx, one, 0 * one, 0 * one)]

    def output(self, value):
        N, Q, M, _, D = value.shape
        return np.einsum("nqmk,nqmkd->nqmd", self.weights, value).reshape(N, Q, M * D)

    def vjp(self, cotangent):
        """The output, and the gradients of sum(cotangent * output)."""
        value = self.samples.value()
        N, Q, M, _, D = value.shape
        grad = self.prepare(np.asarray(cotangent, np.float64)).reshape(N, Q, M, 1, D)
        by_value, by_y, by_x = self.samples.vjp(grad * self.weights[..., None])
        by_locations = np.stack([self.W * by_x, self.H * by_y], axis=-1)
        if self.discrete:
            by_locations = np.zeros_like(by_locations)
        by_weights = self.samples.summed(grad * value)
        return self.output(value), Gradients(by_value, by_locations, by_weights)


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
    with np.errstate(invalid="ignore", over="ignore"):
        problem = _Problem(
            value, spatial_shapes, locations, weights, points, method, coordinate_dtype, absolute
        )
        return problem.output(problem.samples.value())


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
    """The output, and gradients of sum(cotangent * output)."""
    with np.errstate(invalid="ignore", over="ignore"):
        problem = _Problem(
            value, spatial_shapes, locations, weights, points, method, coordinate_dtype, absolute
        )
        return problem.vjp(cotangent)
