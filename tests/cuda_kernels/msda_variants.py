"""Every kernel of multi-scale deformable attention that MLX may be asked to compile."""

from metal.msda_problem import MsdaConfig, MsdaProblem
from metal.problem import DTYPES

from .variants import INDEX_BITS, WIDTHS

WANTED = ((True, True), (True, False), (False, True))  # of locations, of weights


def kernels(dtypes=DTYPES, index_bits=INDEX_BITS):
    """(kernel, dtype) of each, by operation."""
    out = {"forward": [], "grad_value": [], "grad_samples": []}
    for dtype in dtypes:
        for is_discrete in (False, True):
            problem = MsdaProblem(MsdaConfig(is_discrete=is_discrete), dtype)
            for bits in index_bits:

                def add(op, problem=problem, bits=bits, dtype=dtype, **options):
                    plan = problem.plan(op, index_bits=bits, **options)
                    out[op].append((plan["cuda"], dtype))

                for deterministic in (False, True):
                    add("grad_value", deterministic=deterministic)
                for width in WIDTHS[dtype]:
                    add("forward", vector_width=width)
                    for locations, weights in WANTED:
                        add(
                            "grad_samples",
                            vector_width=width,
                            wants_locations=locations,
                            wants_weights=weights,
                        )
    return out
