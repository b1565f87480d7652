"""Random calls of the ops and of the bridge, most of them malformed.

Nothing may crash: what is refused is refused with a ValueError or a TypeError, and what is
accepted equals the oracle, and torchvision where that has a defined result. `python -m fuzz` in
this folder's parent runs as many calls as wanted; `tests/run_sanitized_fuzz.py` runs them with
the extension under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from .run import run
from .targets import TARGETS

__all__ = ["TARGETS", "run"]
