"""What the Metal kernels move and compute, on paper: no GPU is used, nothing is timed.

python benchmarks/metal_roofline.py [--bandwidth GB/s] [--compute TFLOP/s]

Every figure follows from the library's dispatch plans, the ones that the Metal backend
encodes. For each kernel, summed over the chunks of a pass:

  requested  bytes of all loads and stores of all threads, for samples inside the image.
             Caches serve most of them: neighbouring samples share corners, and the lanes
             of a sample read the same offset.
  minimum    bytes that must cross the memory bus: every element of every array once in
             each chunk that needs it, and only the part of the image that a chunk's rows
             can touch with small offsets.
  GFLOP      floating-point operations: per channel, and per thread for its sample.
  bound      the larger of minimum / bandwidth and GFLOP / compute: no implementation of
             this kernel is faster on such a machine.

The last lines of a case weigh the columns' own traffic, which chunks cannot avoid,
against the arrays that any implementation must touch.
"""

import argparse
import math
from dataclasses import dataclass

from mlx_deform import _ext

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

# Floating-point operations of a thread for its sample: two coordinates, floor and
# fraction (8), comparisons with the borders (12), and the weights (6).
SAMPLE_FLOPS = 26
# And for one channel.
CHANNEL_FLOPS = {
    "im2col": 4 * 2 + 1,  # four corners, the mask
    "col2im": 1 + 4 * 2,  # the mask, four shares and their sums
    "offset_grad": 4 * 2,  # four sums
}


@dataclass(frozen=True)
class Case:
    name: str
    H: int
    W: int
    C: int
    outputs: int
    k: int
    N: int = 1

    @property
    def pixels(self):
        return self.N * self.H * self.W  # stride 1, "same" padding

    @property
    def taps(self):
        return self.k * self.k

    def fields(self, begin=0, end=0):
        return {
            **{"N": self.N, "H": self.H, "W": self.W, "C": self.C, "O": self.outputs},
            **{"kH": self.k, "kW": self.k, "Ho": self.H, "Wo": self.W},
            **{"stride_h": 1, "stride_w": 1, "pad_h": self.k // 2, "pad_w": self.k // 2},
            **{"dilation_h": 1, "dilation_w": 1, "G": 1, "DG": 1, "has_mask": 1},
            **{"pixel_begin": begin, "pixel_end": end},
            "column_group": 0,
            "column_pixel": self.taps * self.C,
            "column_tap": self.C,
        }


CASES = (
    Case("DCNv2 [1,256,64,64] x [256,256,3,3]", H=64, W=64, C=256, outputs=256, k=3),
    Case("BiRefNet [1,64,256,256] x [256,64,7,7]", H=256, W=256, C=64, outputs=256, k=7),
)
KERNELS = (
    ("im2col", "im2col", {}),
    ("col2im", "col2im", {}),
    ("col2im, deterministic", "col2im", {"deterministic": True}),
    ("offset_grad", "offset_grad", {}),
    # In place of MLX's matmul where the columns come in several chunks.
    ("column_product", "column_product", {}),
)


@dataclass
class Cost:
    requested: float = 0.0
    minimum: float = 0.0
    flops: float = 0.0
    plan: dict | None = None


def sampling_cost(case, dtype, op, options, begin, end, plan):
    """Of the kernels that sample: their columns, and what the samples lie in."""
    size = ITEMSIZE[dtype]
    pixels = end - begin
    samples = pixels * case.taps
    channels = samples * case.C
    rows = -(-pixels // case.W)
    image = min(rows + case.k, case.N * case.H) * case.W * case.C
    plan_bytes = samples * (2 + 1) * 4  # offset and mask

    roles = {role for role, _, _ in plan["buffers"]}
    minimum = plan_bytes + channels * size
    if "input" in roles:
        minimum += image * size
    if "grad_input" in roles:
        minimum += 2 * image * 4  # read and written
    if "grad_offset" in roles:
        minimum += plan_bytes

    if options.get("deterministic"):
        # Every SIMD group looks at all samples for its row, and each sample touches two
        # rows, there two pixels.
        looks = plan["grid"][0] * plan["grid"][1] // 32 * samples
        requested = looks * 8 + channels * (2 * size + 4 * 2 * 4)
        flops = looks * SAMPLE_FLOPS + channels * CHANNEL_FLOPS[op]
        return Cost(requested, minimum, flops, plan)

    if op == "offset_grad":
        threads = samples * plan["constants"]["segment_lanes"]
        written = plan_bytes
    else:
        threads = math.prod(plan["grid"])
        written = 0
    # Corners are read; col2im reads and writes them, in float32.
    corners = 4 * 2 * 4 if op == "col2im" else 4 * size
    requested = threads * 12 + channels * (size + corners) + written
    flops = threads * SAMPLE_FLOPS + channels * CHANNEL_FLOPS[op]
    return Cost(requested, minimum, flops, plan)


def product_cost(case, dtype, begin, end, plan):
    size = ITEMSIZE[dtype]
    pixels, width = end - begin, case.taps * case.C
    tiles = math.prod(plan["grid"]) // plan["group"][0]
    requested = tiles * (64 + 64) * case.outputs * size + pixels * width * size
    minimum = (pixels * (case.outputs + width) + case.outputs * width) * size
    return Cost(requested, minimum, 2 * pixels * width * case.outputs, plan)


def chunk_cost(case, dtype, op, options, begin, end):
    plan = _ext._dispatch_plan(op, case.fields(begin, end), dtype, **options)
    if op == "column_product":
        return product_cost(case, dtype, begin, end, plan)
    return sampling_cost(case, dtype, op, options, begin, end, plan)


def kernel_cost(case, dtype, op, options, chunks):
    total = Cost()
    for begin, end in chunks:
        cost = chunk_cost(case, dtype, op, options, begin, end)
        total.requested += cost.requested
        total.minimum += cost.minimum
        total.flops += cost.flops
        total.plan = total.plan or cost.plan
    return total


def report(case, dtype, bandwidth, compute):
    chunks = _ext._chunk_plan(case.fields(), ITEMSIZE[dtype])
    size = ITEMSIZE[dtype]
    columns = case.pixels * case.taps * case.C * size
    print(
        f"\n{case.name}, {dtype}, with mask: {len(chunks)} chunk(s), columns {columns / 1e6:.0f} MB"
    )
    header = (
        f"  {'kernel':<23}{'width':>6}{'group':>13}{'requested':>12}{'minimum':>10}"
        f"{'ratio':>7}{'GFLOP':>8}{'FLOP/B':>8}{'bound':>10}"
    )
    print(header)
    for name, op, options in KERNELS:
        cost = kernel_cost(case, dtype, op, options, chunks)
        seconds = max(cost.minimum / bandwidth, cost.flops / compute)
        group = "x".join(map(str, cost.plan["group"]))
        print(
            f"  {name:<23}{cost.plan['vector_width']:>6}{group:>13}"
            f"{cost.requested / 1e6:>9.0f} MB{cost.minimum / 1e6:>7.0f} MB"
            f"{cost.requested / cost.minimum:>7.1f}{cost.flops / 1e9:>8.2f}"
            f"{cost.flops / cost.minimum:>8.1f}{seconds * 1e3:>7.2f} ms"
        )

    plan_bytes = case.pixels * case.taps * 12
    image, output = case.pixels * case.C * size, case.pixels * case.outputs * size
    weight = case.taps * case.C * case.outputs * size
    compulsory = image + plan_bytes + weight + output
    product = 2 * case.pixels * case.taps * case.C * case.outputs
    print(
        f"  forward: arrays {compulsory / 1e6:.0f} MB, columns written and read"
        f" {2 * columns / 1e6:.0f} MB ({2 * columns / bandwidth * 1e3:.2f} ms), product"
        f" {product / 1e9:.1f} GFLOP ({product / compute * 1e3:.2f} ms)"
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
