"""Arguments of a call, and what can be wrong with them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

FLOATS = ("float32", "float16", "bfloat16", "float64")
OTHER_TYPES = ("int32", "uint8", "bool_", "complex64")
SIZES = (-1, 0, 1, 2, 7, 2**31 - 1, 2**31, -(2**31), 2**62, 2**64)
NOT_SIZES = (None, 1.5, "a", True, (), (1,), (1, 2, 3), (2**31 - 1, 1), (0, 1), (1, -1), [[1]])
# Of coordinates. Of what is summed there are only the first three: products of the others
# overflow where the oracle's do not.
SPECIAL = (np.nan, np.inf, -np.inf, 1e30, -1e38, 2.0**31, -(2.0**31), 5e4)
NO_ARRAYS = (None, 3, "a", [1.0], object())


@dataclass
class Array:
    """float64 values that are to be passed in the type of that name, strided or not."""

    values: np.ndarray
    dtype: str = "float32"
    strided: bool = False
    coordinates: bool = False

    def but(self, **changes):
        return replace(self, **changes)


Arguments = dict[str, Any]


def resized(array: Array, rng: np.random.Generator) -> Array:
    if array.values.ndim == 0:
        return array
    shape = list(array.values.shape)
    axis = int(rng.integers(len(shape)))
    shape[axis] = int(rng.choice([0, 1, max(shape[axis] - 1, 0), shape[axis] + 1, 2 * shape[axis]]))
    return array.but(values=np.resize(array.values, shape))


def transposed(array: Array, rng: np.random.Generator) -> Array:
    return array.but(values=array.values.transpose(rng.permutation(array.values.ndim)))


def with_other_axes(array: Array, rng: np.random.Generator) -> Array:
    if array.values.ndim and array.values.size and rng.random() < 0.5:
        return array.but(values=np.asarray(array.values[0]))
    return array.but(values=array.values[..., None])


def of_another_type(array: Array, rng: np.random.Generator) -> Array:
    return array.but(dtype=str(rng.choice(FLOATS if rng.random() < 0.8 else OTHER_TYPES)))


def with_special_values(array: Array, rng: np.random.Generator) -> Array:
    values = array.values.copy()
    special = rng.choice(SPECIAL if array.coordinates else SPECIAL[:3])
    values[rng.random(values.shape) < rng.choice([0.02, 0.3, 1])] = special
    return array.but(values=values)


def strided(array: Array, rng: np.random.Generator) -> Array:
    return array.but(strided=True)


def no_array(array: Array, rng: np.random.Generator) -> Any:
    return NO_ARRAYS[rng.integers(len(NO_ARRAYS))]


OF_ARRAYS: tuple[Callable, ...] = (
    resized,
    transposed,
    with_other_axes,
    of_another_type,
    of_another_type,
    with_special_values,
    with_special_values,
    strided,
    strided,
    no_array,
)


def other_setting(value: Any, rng: np.random.Generator) -> Any:
    """Another size, pair or list of them, text or nothing."""
    if isinstance(value, (tuple, list)) and value and rng.random() < 0.6:
        changed = list(value)
        at = int(rng.integers(len(changed)))
        action = rng.integers(4)
        if action == 0:
            del changed[at]
        elif action == 1:
            changed.insert(at, changed[at])
        else:
            changed[at] = other_setting(changed[at], rng)
        return type(value)(changed)
    if rng.random() < 0.7:
        return SIZES[rng.integers(len(SIZES))]
    return NOT_SIZES[rng.integers(len(NOT_SIZES))]


def malform(arguments: Arguments, rng: np.random.Generator) -> Arguments:
    """The arguments with up to three changes, of which some do no harm."""
    arguments = dict(arguments)
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.25, 0.4, 0.25, 0.1])):
        name = str(rng.choice(list(arguments)))
        value = arguments[name]
        if isinstance(value, Array):
            value = OF_ARRAYS[rng.integers(len(OF_ARRAYS))](value, rng)
        else:
            value = other_setting(value, rng)
        arguments[name] = value
    return arguments
