"""The loop: a call is drawn from its number alone, so that any can be repeated by itself."""

from collections import Counter

import numpy as np

from .malform import malform
from .targets import Target

REFUSALS = (ValueError, TypeError)


class Found(Exception):
    """A call that was neither refused as it should be nor right."""


def run_call(target: Target, seed: int, number: int) -> str:
    """What became of a call: "refused", "accepted" or "accepted, with gradients"."""
    rng = np.random.default_rng([seed, number])
    arguments = malform(target.draw(rng), rng)
    with_gradients = bool(rng.random() < 0.3)
    try:
        try:
            results = target.call(arguments, with_gradients, rng)
        except REFUSALS as error:
            if not str(error):
                raise Found("an error without a message") from error
            return "refused"
        target.check(arguments, results)
    except Exception as error:
        shown = {n: getattr(getattr(v, "values", None), "shape", v) for n, v in arguments.items()}
        raise Found(f"{target.name}, seed {seed}, call {number}: {shown}: {error!r}") from error
    return "accepted, with gradients" if with_gradients else "accepted"


def run(target: Target, calls: int, seed: int = 0, progress=iter) -> Counter:
    """Runs that many calls.

    Returns:
        Counter: How many of them were accepted and refused.

    Raises:
        Found: At the first that was wrong; the message says how to repeat it.
    """
    return Counter(run_call(target, seed, number) for number in progress(range(calls)))
