"""Wrong arguments of multi_scale_deformable_attention: one sentence that says which and why."""

import re

import mlx.core as mx
import pytest

from mlx_deform import multi_scale_deformable_attention

SHAPES = [(4, 5), (2, 3)]


def arguments(**changes):
    """N=2, S=26, M=3, D=8, Q=7, L=2, P=4."""
    return {
        "value": mx.zeros((2, 26, 3, 8)),
        "spatial_shapes": SHAPES,
        "sampling_locations": mx.zeros((2, 7, 3, 2, 4, 2)),
        "attention_weights": mx.zeros((2, 7, 3, 2, 4)),
        **changes,
    }


def ragged(**changes):
    return arguments(
        **{
            "sampling_locations": mx.zeros((2, 7, 3, 8, 2)),
            "attention_weights": mx.zeros((2, 7, 3, 8)),
            "points": (3, 5),
            **changes,
        }
    )


CASES = {
    "rank of value": (
        arguments(value=mx.zeros((26, 3, 8))),
        "value must have 4 axes, (N, S, M, D); got shape (26, 3, 8)",
    ),
    "no channels": (
        arguments(value=mx.zeros((2, 26, 3, 0))),
        "value must have no empty axis but the batch; got shape (2, 26, 3, 0)",
    ),
    "integer value": (
        arguments(value=mx.zeros((2, 26, 3, 8), mx.int32)),
        "value must be float16, bfloat16, float32 or float64; got int32",
    ),
    "complex locations": (
        arguments(sampling_locations=mx.zeros((2, 7, 3, 2, 4, 2), mx.complex64)),
        "sampling_locations must be float16, bfloat16, float32 or float64; got complex64",
    ),
    "boolean weights": (
        arguments(attention_weights=mx.zeros((2, 7, 3, 2, 4), mx.bool_)),
        "attention_weights must be float16, bfloat16, float32 or float64; got bool",
    ),
    "no levels": (
        arguments(spatial_shapes=[]),
        "spatial_shapes must have at least one level; got 0",
    ),
    "a level of three sizes": (
        arguments(spatial_shapes=[(4, 5), (2, 3, 1)]),
        "spatial_shapes must hold pairs (H, W) of at least 1; got (2, 3, 1)",
    ),
    "an empty level": (
        arguments(spatial_shapes=[(4, 5), (0, 3)]),
        "spatial_shapes must hold pairs (H, W) of at least 1; got (0, 3)",
    ),
    "negative sizes": (
        arguments(spatial_shapes=[(4, 5), (-2, -3)]),
        "spatial_shapes must hold pairs (H, W) of at least 1; got (-2, -3)",
    ),
    "pixels": (
        arguments(spatial_shapes=[(4, 5), (2, 2)]),
        "the second axis of value must hold the pixels of all levels, 24 by spatial_shapes; "
        "got shape (2, 26, 3, 8)",
    ),
    "huge sizes": (
        arguments(spatial_shapes=[(2**31 - 1, 2**31 - 1), (2**31 - 1, 2**31 - 1)]),
        "the second axis of value must hold the pixels",
    ),
    "rank of locations": (
        arguments(sampling_locations=mx.zeros((2, 7, 3, 8, 2))),
        "sampling_locations must have 6 axes, (N, Q, M, L, P, 2), or with points 5; "
        "got shape (2, 7, 3, 8, 2)",
    ),
    "batch of locations": (
        arguments(sampling_locations=mx.zeros((1, 7, 3, 2, 4, 2))),
        "sampling_locations must be of shape (N, Q, M, L, P, 2), (2, Q, 3, 2, P, 2) with P at "
        "least 1; got shape (1, 7, 3, 2, 4, 2)",
    ),
    "levels of locations": (
        arguments(sampling_locations=mx.zeros((2, 7, 3, 3, 4, 2))),
        "got shape (2, 7, 3, 3, 4, 2)",
    ),
    "three coordinates": (
        arguments(sampling_locations=mx.zeros((2, 7, 3, 2, 4, 3))),
        "got shape (2, 7, 3, 2, 4, 3)",
    ),
    "no points": (
        arguments(sampling_locations=mx.zeros((2, 7, 3, 2, 0, 2))),
        "got shape (2, 7, 3, 2, 0, 2)",
    ),
    "weights": (
        arguments(attention_weights=mx.zeros((2, 7, 3, 4, 2))),
        "attention_weights must have shape (2, 7, 3, 2, 4), that of sampling_locations without "
        "the last axis; got shape (2, 7, 3, 4, 2)",
    ),
    "method": (
        arguments(method="nearest"),
        'method must be "bilinear" or "discrete"; got "nearest"',
    ),
    "number of points": (
        ragged(points=(3, 4, 1)),
        "points must have an entry for each of the 2 levels; got (3, 4, 1)",
    ),
    "zero points": (
        ragged(points=(8, 0)),
        "points must be at least 1; got (8, 0)",
    ),
    "sum of points": (
        ragged(points=(3, 4)),
        "sampling_locations must be of shape (N, Q, M, sum of points, 2), (2, Q, 3, 7, 2); "
        "got shape (2, 7, 3, 8, 2)",
    ),
    "huge points": (
        ragged(points=(2**31 - 1, 2**31 - 1)),
        "sampling_locations must be of shape (N, Q, M, sum of points, 2)",
    ),
    "points beside an axis of levels": (
        arguments(points=(4, 4)),
        "sampling_locations must be of shape (N, Q, M, sum of points, 2)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_messages(name):
    wrong, message = CASES[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        multi_scale_deformable_attention(**wrong)
    text = str(caught.value)
    assert text.startswith("[multi_scale_deformable_attention] ")
    assert "; got " in text


def test_right_arguments():
    assert multi_scale_deformable_attention(**arguments()).shape == (2, 7, 24)
    assert multi_scale_deformable_attention(**ragged()).shape == (2, 7, 24)
    lists = arguments(spatial_shapes=tuple(map(list, SHAPES)))
    assert multi_scale_deformable_attention(**lists).shape == (2, 7, 24)


def test_settings_are_keywords():
    positional = list(arguments().values())
    assert multi_scale_deformable_attention(*positional).shape == (2, 7, 24)
    with pytest.raises(TypeError):
        multi_scale_deformable_attention(*positional, (4, 4))
