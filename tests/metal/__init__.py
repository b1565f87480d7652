"""Runs Metal kernels on the CPU, from the library's own dispatch plans.

A Metal source is C++ with a few words of its own. `translate` rewrites those words,
`compiler` builds the result with clang (PyPI's ziglang has one) against the stand-in for
Metal's standard library in `shim/`, and `launch` runs a kernel there as Metal's
dispatchThreads would: threads of a threadgroup are fibers, scheduled in an order that a
seed decides. `lint` and the strict pass of `compiler` refuse what Metal would refuse and
C++ would not.

What this can't tell: whether Apple's compiler agrees, how fast a kernel is, and what
weakly ordered memory does.
"""

from .compiler import build, check, compiler_command, load
from .launch import KernelError, Kernels, guarded
from .lint import lint
from .translate import MslError

__all__ = [
    "KernelError",
    "Kernels",
    "MslError",
    "build",
    "check",
    "compiler_command",
    "guarded",
    "lint",
    "load",
]
