"""What the tests of the GPU kernels run: cases, kernels by type, and their problems.

Every kernel of every library (data type x index width) runs on every case that it fits,
in three scheduling orders. See tests/metal and tests/cuda_kernels for how a CPU runs them.
"""

from functools import cache

import pytest

import metal
from cases import Config
from cuda_kernels import CudaKernels, variants
from cuda_kernels.variants import INDEX_BITS
from metal.problem import DTYPES, Problem
from mlx_deform import _ext

needs_a_compiler = pytest.mark.skipif(
    metal.compiler_command() is None, reason="needs ziglang, clang++-22 or MSL_CXX"
)

SEEDS = (0, 1, 2)  # of the scheduling order

RAGGED = Config(
    N=2, H=5, W=7, C=48, O=30, kH=2, kW=3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), G=2, DG=3
)
CASES = {
    # C / G and C / DG of 24 and 16: vectors of 8, and groups that do not nest.
    "groups": (RAGGED, {}),
    "groups, no mask": (RAGGED.but(has_mask=False), {}),
    "groups, inner chunk": (RAGGED, {"begin": 11, "end": 38}),
    "one group": (RAGGED.but(C=24, G=1, DG=1, N=1), {}),
    # C / DG of 1, 3, 5 and 33: no vector fits; lanes without work.
    "depthwise": (RAGGED.but(C=6, G=6, DG=6), {"begin": 3}),
    "three channels": (RAGGED.but(C=6, G=3, DG=2, has_mask=False), {}),
    "five channels": (RAGGED.but(C=10, G=1, DG=2, N=1), {"end": 20}),
    "33 channels": (RAGGED.but(C=33, G=3, DG=1, N=1), {}),
    # 75 vectors of 4: several a thread, and the last round is not full.
    "300 channels": (RAGGED.but(C=300, G=5, DG=1, N=1, H=3, W=4), {}),
    "1x1 kernel": (RAGGED.but(kH=1, kW=1, C=16, G=1, DG=2, padding=(0, 0), dilation=(1, 1)), {}),
}


@cache
def metal_kernels(dtype, index_bits):
    return metal.load(_ext._metal_source(dtype, index_bits))


@cache
def cuda_kernels():
    return CudaKernels([pair for pairs in variants.kernels().values() for pair in pairs])


@pytest.fixture(params=["metal", "cuda"])
def kernels_of(request):
    """The kernels of a language, by data type and index width."""
    if request.param == "metal":
        return metal_kernels
    return lambda dtype, index_bits: cuda_kernels()


@cache
def problem_of(case, dtype):
    config, chunk = CASES[case]
    return Problem(config, dtype, seed=len(case), **chunk)


@cache
def gradients_of(case, dtype):
    return problem_of(case, dtype).expected_gradients()


def fits(problem, width):
    c = problem.config
    return (c.C // c.G) % width == 0 and (c.C // c.DG) % width == 0


@pytest.fixture(
    params=[(d, b) for d in DTYPES for b in INDEX_BITS], ids=lambda p: f"{p[0]}-i{p[1]}"
)
def types(request):
    """A data type and an index width."""
    return request.param
