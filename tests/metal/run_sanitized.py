"""Runs one launch in a process of its own, which a sanitizer watches.

python -m metal.run_sanitized JOB, where JOB is a pickle of (build, plan, buffers, seed).
Needs the sanitizer's runtime in LD_PRELOAD: see tests/test_gpu_sanitizers.py.
"""

import ctypes
import pickle
import sys
from pathlib import Path

import numpy as np

from .launch import Kernels


def allocated(array):
    """A copy from malloc, whose exact bounds the sanitizer then knows."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    memory = (ctypes.c_char * array.nbytes).from_address(malloc(array.nbytes))
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def main(job):
    build, plan, buffers, seed = pickle.loads(Path(job).read_bytes())
    copies = {
        role: buffer if isinstance(buffer, bytes) else allocated(buffer)
        for role, buffer in buffers.items()
    }
    Kernels(*build).run(plan, copies, seed)


if __name__ == "__main__":
    main(sys.argv[1])
