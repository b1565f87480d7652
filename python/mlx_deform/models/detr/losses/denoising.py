"""Denoising queries: noisy copies of the objects, from which the decoder learns to repair boxes.

Each group has a copy of every object that lies near it and is to become it, and one that lies
farther off and is to become nothing. Zhang et al., "DINO: DETR with Improved DeNoising Anchor
Boxes", arXiv:2203.03605, section 3.3; in RT-DETR and D-FINE.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..boxes import inverse_sigmoid, to_centres, to_corners
from ..outputs import DenoisingQueries, Target
from .matching import Match, check_targets


class Noise(NamedTuple):
    """Random numbers of D queries for each of N pictures.

    flips: uniform in [0, 1), (N, D): small ones change the label. labels: the new ones, integers
    (N, D). signs: -1 or 1, (N, D, 4). shifts: uniform in [0, 1), (N, D, 4), of a box's corners.
    """

    flips: np.ndarray
    labels: np.ndarray
    signs: np.ndarray
    shifts: np.ndarray


def draw_noise(
    pictures: int, queries: int, num_labels: int, rng: np.random.Generator | int | None = None
) -> Noise:
    """Noise from a generator or a seed; anew each time without."""
    rng = np.random.default_rng(rng)
    shape = (pictures, queries)
    return Noise(
        flips=rng.random(shape, np.float32),
        labels=rng.integers(num_labels, size=shape),
        signs=rng.choice(np.array([-1, 1], np.float32), size=(*shape, 4)),
        shifts=rng.random((*shape, 4), np.float32),
    )


def denoising_layout(targets: Sequence[Target], num_denoising: int) -> tuple[int, int]:
    """The number of groups, at least 1, and the places D that they take together.

    A group has twice as many places as the picture with the most objects has objects; 0, 0 if
    there is nothing to copy.
    """
    most = max((len(target.labels) for target in targets), default=0)
    if most == 0 or num_denoising <= 0:
        return 0, 0
    groups = max(num_denoising // most, 1)
    return groups, 2 * most * groups


def denoising_queries(
    targets: Sequence[Target],
    config,
    *,
    rng: np.random.Generator | int | None = None,
    noise: Noise | None = None,
) -> DenoisingQueries | None:
    """Denoising queries for a batch, drawn anew for each training step.

    Corners move by up to half the box's size times ``box_noise_scale``, those of the copies that
    are to become nothing by one to two times that. ``label_noise_ratio / 2`` of the labels become
    random ones.

    Args:
        targets (list(Target)): The objects of each picture.
        config: Its num_labels, num_queries, num_denoising, label_noise_ratio and box_noise_scale.
        rng (Generator or int, optional): Where the noise comes from.
        noise (Noise, optional): The noise itself, as :func:`draw_noise` gives it, of the D that
            :func:`denoising_layout` says.

    Returns:
        DenoisingQueries or None: None if ``config.num_denoising`` is 0 or there are no objects.

    Example:
        >>> queries = denoising_queries(targets, model.config, rng=step)
        >>> outputs = model(pixels, denoising=queries)
        >>> loss, parts = criterion(outputs, targets, queries)
    """
    targets = check_targets(targets, config.num_labels)
    groups, places = denoising_layout(targets, config.num_denoising)
    if groups == 0:
        return None
    if noise is None:
        noise = draw_noise(len(targets), places, config.num_labels, rng)
    if noise.flips.shape != (len(targets), places):
        raise ValueError(
            f"[denoising_queries] noise must be of {len(targets)} pictures and {places} queries; "
            f"got {noise.flips.shape}"
        )

    group = places // groups
    most = group // 2
    labels = np.full((len(targets), most), config.num_labels)
    boxes = np.zeros((len(targets), most, 4), np.float32)
    for i, target in enumerate(targets):
        labels[i, : len(target.labels)], boxes[i, : len(target.labels)] = target
    labels, boxes = np.tile(labels, (1, 2 * groups)), np.tile(boxes, (1, 2 * groups, 1))
    place = np.arange(places)

    flipped = (noise.flips < config.label_noise_ratio / 2) & (labels < config.num_labels)
    labels = np.where(flipped, noise.labels, labels)

    far = (place % group >= most)[:, None]
    shifts = noise.signs * (noise.shifts + far) * config.box_noise_scale
    half_size = mx.array(np.tile(boxes[..., 2:] / 2, 2))
    corners = to_corners(mx.array(boxes)) + mx.array(shifts.astype(np.float32)) * half_size

    of_group = np.append(place // group, np.full(config.num_queries, -1))
    # Nobody looks into a group from outside; into the queries proper everybody does.
    blocked = (of_group[:, None] != of_group) & (of_group >= 0)
    return DenoisingQueries(
        labels=mx.array(labels.astype(np.int32)),
        boxes=inverse_sigmoid(to_centres(mx.clip(corners, 0, 1))),
        blocked=mx.array(blocked),
        positives=[place[place % group < len(target.labels)] for target in targets],
        groups=groups,
    )


def denoising_matches(queries: DenoisingQueries, targets: Sequence[Target]) -> list[Match]:
    """The positive copies and the objects that they are copies of, for each picture."""
    return [
        (places, np.tile(np.arange(len(target.labels)), queries.groups))
        for places, target in zip(queries.positives, targets, strict=True)
    ]
