"""Every kernel that the library can ask MLX to compile."""

from cases import Config
from metal.problem import DTYPES, Problem

INDEX_BITS = (32, 64)
WIDTHS = {"float32": (1, 4), "float16": (1, 4, 8), "bfloat16": (1, 4, 8)}
COL2IM_WIDTHS = {32: (1, 2, 4), 64: (1, 2)}
CONFIG = Config(N=1, H=3, W=4, C=16, G=1, DG=1)


def kernels(dtypes=DTYPES, index_bits=INDEX_BITS):
    """(kernel, dtype) of each, by operation."""
    out = {"im2col": [], "col2im": [], "offset_grad": []}
    for dtype in dtypes:
        for has_mask in (True, False):
            problem = Problem(CONFIG.but(has_mask=has_mask), dtype)
            for bits in index_bits:
                options = {"index_bits": bits}

                def add(op, problem=problem, options=options, dtype=dtype, **more):
                    plan = problem.plan(op, **options, **more)
                    out[op].append((plan["cuda"], dtype))

                add("col2im", deterministic=True)
                for width in COL2IM_WIDTHS[bits]:
                    add("col2im", vector_width=width)
                for width in WIDTHS[dtype]:
                    add("im2col", vector_width=width)
                    for wants in ((True, True), (True, False), (False, True)):
                        if has_mask or not wants[1]:
                            add(
                                "offset_grad",
                                vector_width=width,
                                wants_offset=wants[0],
                                wants_mask=wants[1],
                            )
    return out
