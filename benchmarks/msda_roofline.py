"""What multi-scale deformable attention's Metal kernels move and compute, on paper.

python benchmarks/msda_roofline.py [--bandwidth GB/s] [--compute TFLOP/s]

No GPU is used, nothing is timed. As benchmarks/metal_roofline.py, from the dispatch plans:

  requested   bytes of all loads and stores of all threads, for samples inside their maps.
              Caches serve most of them.
  compulsory  bytes that any implementation must move: every element of every array once.
  GFLOP       floating-point operations of all threads, the samples' arithmetic included.
  atomics     float additions to memory: at most, and where queries are the maps' pixels and
              their offsets are all the same (an encoder's, at its start).
  bound       the larger of compulsory / bandwidth and GFLOP / compute.

The last line of a case has what the form of plain ops moves, as Deformable DETR's PyTorch
code: a sampled tensor of N * M * D x Q x K, written and read again.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np

from mlx_deform import _ext

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

# Floating-point operations of a thread for its sample: two coordinates, floor and
# fraction (8), comparisons with the borders (12), and the weights (6).
SAMPLE_FLOPS = 26
# And for one channel.
CHANNEL_FLOPS = {
    "forward": 4 * 2 + 2,  # four corners, the weight, the sum
    "grad_value": 4 * 2 + 1,  # four shares and their sums, the weight
    "grad_samples": 4 * 2,  # four sums
}


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple
    points: tuple
    Q: int
    M: int = 8
    D: int = 32
    N: int = 1

    @property
    def S(self):
        return sum(h * w for h, w in self.shapes)

    @property
    def samples(self):
        return self.N * self.Q * self.M * sum(self.points)

    @property
    def levels(self):
        out, start, first = [], 0, 0
        for (h, w), points in zip(self.shapes, self.points, strict=True):
            out.append((h, w, start, first))
            start, first = start + h * w, first + points
        return out

    @property
    def fields(self):
        return {
            **{"N": self.N, "S": self.S, "Q": self.Q, "M": self.M, "D": self.D},
            **{"L": len(self.shapes), "K": sum(self.points), "is_discrete": 0},
            **{"query_begin": 0, "query_end": self.N * self.Q},
        }


ENCODER = ((100, 167), (50, 84), (25, 42), (13, 21))
CASES = (
    Case("Deformable DETR encoder", ENCODER, (4, 4, 4, 4), Q=22223),
    Case("Grounding DINO decoder", ENCODER, (4, 4, 4, 4), Q=900),
    Case("RT-DETR decoder", ((80, 80), (40, 40), (20, 20)), (4, 4, 4), Q=300),
)
KERNELS = (
    ("forward", "forward", {}),
    ("grad_value", "grad_value", {}),
    ("grad_value, deterministic", "grad_value", {"deterministic": True}),
    ("grad_samples", "grad_samples", {}),
)


@dataclass
class Cost:
    requested: float
    compulsory: float
    flops: float
    atomics: float
    plan: dict


def arrays(case, dtype):
    """Bytes of each array."""
    size = ITEMSIZE[dtype]
    value, out = case.N * case.S * case.M * case.D, case.N * case.Q * case.M * case.D
    return {
        "value": value * size,
        "locations": case.samples * 8,
        "weights": case.samples * 4,
        "levels": 16 * len(case.shapes),
        "out": out * size,
        "cotangent": out * size,
        "grad_value": value * 4,
        "grad_locations": case.samples * 8,
        "grad_weights": case.samples * 4,
    }


def kernel_cost(case, dtype, op, options):
    plan = _ext._msda_plan(op, case.fields, case.levels, dtype, **options)
    size, width = ITEMSIZE[dtype], plan["vector_width"]
    channels = case.samples * case.D
    of_array = arrays(case, dtype)
    compulsory = sum(of_array[role] for role, _, _ in plan["buffers"] if role != "params")
    if op == "grad_value":
        compulsory += of_array["grad_value"]  # read, and written

    if options.get("deterministic"):
        # Each SIMD group looks at all samples of its map's level; a sample touches two rows,
        # where 32 lanes take up two pixels each.
        blocks = -(-case.D // 32)
        looks = sum(
            case.N * case.Q * case.M * blocks * points * h
            for (h, _), points in zip(case.shapes, case.points, strict=True)
        )
        taken = 2 * case.samples * 32 * blocks
        requested = looks * 8 + taken * (4 + size + 2 * 2 * 4)
        flops = (looks + taken) * SAMPLE_FLOPS + channels * CHANNEL_FLOPS[op]
        return Cost(requested, compulsory, flops, 0, plan)

    # Threads that work on a sample, each with its location and weight.
    threads = {
        "forward": case.D // width,
        "grad_value": case.D,
        "grad_samples": plan["constants"].get("segment_lanes", 0),
    }[op]
    threads *= case.samples
    flops = threads * SAMPLE_FLOPS + channels * CHANNEL_FLOPS[op]
    requested = threads * 12
    if op == "forward":
        requested += channels * 4 * size + of_array["out"]
    elif op == "grad_value":
        # Corners are read and written, in float32.
        requested += channels * 4 * 2 * 4 + of_array["cotangent"]
    else:
        requested += channels * 5 * size + case.samples * 12
    atomics = 4 * channels if op == "grad_value" else 0
    return Cost(requested, compulsory, flops, atomics, plan)


def walked_atomics(case, rows):
    """Additions of the scatter in an encoder, whose threads walk `rows` queries each.

    A corner's sum is added once while neighbours share it: none for the same cell, the left
    two for a step to the right, all four for any other. Borders are left out.
    """
    out = 0
    centres = [
        np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1)
        for h, w in case.shapes
    ]
    queries = np.concatenate([centre.reshape(-1, 2) for centre in centres])  # (x, y)
    starts = np.arange(len(queries)) % rows == 0
    for (h, w), points in zip(case.shapes, case.points, strict=True):
        # Somewhere inside a cell, as a sample is.
        step = np.diff(np.floor(queries * (w, h) + 0.21), axis=0, prepend=np.inf)
        is_row = (step[:, 1] == 0) & ~starts
        added = np.where(is_row & (step[:, 0] == 0), 0, np.where(is_row & (step[:, 0] == 1), 2, 4))
        out += points * added.sum()
    return out * case.N * case.M * case.D


def report(case, dtype, bandwidth, compute):
    print(f"\n{case.name}, {dtype}: S {case.S}, Q {case.Q}, {case.samples / 1e6:.2f} M samples")
    print(
        f"  {'kernel':<26}{'width':>6}{'group':>11}{'requested':>12}{'compulsory':>12}"
        f"{'ratio':>7}{'GFLOP':>8}{'atomics':>9}{'bound':>10}"
    )
    for name, op, options in KERNELS:
        cost = kernel_cost(case, dtype, op, options)
        seconds = max(cost.compulsory / bandwidth, cost.flops / compute)
        group = "x".join(map(str, cost.plan["group"]))
        print(
            f"  {name:<26}{cost.plan['vector_width']:>6}{group:>11}"
            f"{cost.requested / 1e6:>9.0f} MB{cost.compulsory / 1e6:>9.1f} MB"
            f"{cost.requested / cost.compulsory:>7.1f}{cost.flops / 1e9:>8.2f}"
            f"{cost.atomics / 1e6:>7.0f} M{seconds * 1e3:>7.2f} ms"
        )
    if case.Q == case.S:
        rows = kernel_cost(case, dtype, "grad_value", {}).plan["constants"]["rows_per_thread"]
        print(
            f"  the scatter's threads walk {rows} queries: with equal offsets"
            f" {walked_atomics(case, rows) / 1e6:.0f} M atomics"
        )
    sampled = math.prod((case.samples, case.D, ITEMSIZE[dtype]))
    print(
        f"  the sampled tensor of plain ops: {sampled / 1e6:.0f} MB, written and read"
        f" {2 * sampled / bandwidth * 1e3:.2f} ms"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=68.0, help="GB/s (default: an M1's 68)")
    parser.add_argument("--compute", type=float, default=2.6, help="TFLOP/s (default: an M1's 2.6)")
    parser.add_argument(
        "--dtype", choices=ITEMSIZE, action="append", help="default: float32, float16"
    )
    args = parser.parse_args()
    print(f"On paper, for {args.bandwidth:g} GB/s and {args.compute:g} TFLOP/s; nothing was timed.")
    for case in CASES:
        for dtype in args.dtype or ("float32", "float16"):
            report(case, dtype, args.bandwidth * 1e9, args.compute * 1e12)


if __name__ == "__main__":
    main()
