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
  GFLOP      floating-point operations: of the products, per channel, and per thread for
             its sample.
  atomics    additions to memory, in millions. Of the scatter, where neighbouring offsets
             are alike; where they are not, it is the number after the slash.
  bound      the larger of minimum / bandwidth and GFLOP / compute: no implementation of
             this kernel is faster on such a machine.

Kernels that nothing keeps from running side by side share a stage, whose bound is that of
their sums; a pass takes its stages one after the other. It is weighed against its bare
products, one forward and three with the backward, and its memory traffic against the
arrays that any implementation must touch. Atomics have no bound: what one costs differs
from one generation of GPUs to the next.
"""

import argparse
import math
from dataclasses import dataclass, replace

from mlx_deform import _ext

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
TILE = 64  # rows, and columns, of a threadgroup's product


@dataclass(frozen=True)
class Case:
    name: str
    H: int
    W: int
    C: int
    outputs: int
    k: int
    N: int = 1
    G: int = 1

    @property
    def pixels(self):
        return self.N * self.H * self.W  # stride 1, "same" padding

    @property
    def taps(self):
        return self.k * self.k

    @property
    def weight_size(self):
        return self.outputs * self.taps * self.C // self.G

    def fields(self, begin=0, end=None):
        end = self.pixels if end is None else end
        group = self.C // self.G
        return {
            **{"N": self.N, "H": self.H, "W": self.W, "C": self.C, "O": self.outputs},
            **{"kH": self.k, "kW": self.k, "Ho": self.H, "Wo": self.W},
            **{"stride_h": 1, "stride_w": 1, "pad_h": self.k // 2, "pad_w": self.k // 2},
            **{"dilation_h": 1, "dilation_w": 1, "G": self.G, "DG": 1, "has_mask": 1},
            **{"pixel_begin": begin, "pixel_end": end},
            "column_group": (end - begin) * self.taps * group,
            "column_pixel": self.taps * group,
            "column_tap": group,
        }


DCN = Case("DCNv2 [1,256,64,64] x [256,256,3,3]", H=64, W=64, C=256, outputs=256, k=3)
BIREFNET = Case("BiRefNet [1,64,256,256] x [256,64,7,7]", H=256, W=256, C=64, outputs=256, k=7)
CASES = (
    DCN,
    replace(DCN, name="DCNv2 [8,256,64,64] x [256,256,3,3]", N=8),
    BIREFNET,
    replace(BIREFNET, name="BiRefNet [8,64,256,256] x [256,64,7,7]", N=8),
    replace(DCN, name="depthwise [1,256,64,64] x [256,1,3,3]", G=256),
)


@dataclass
class Cost:
    requested: float = 0.0
    minimum: float = 0.0
    flops: float = 0.0
    atomics: float = 0.0  # where neighbouring offsets are alike
    atomics_at_most: float = 0.0
    plan: dict | None = None

    def __add__(self, other):
        return Cost(
            *(
                getattr(self, name) + getattr(other, name)
                for name in ("requested", "minimum", "flops", "atomics", "atomics_at_most")
            ),
            self.plan or other.plan,
        )

    def seconds(self, machine):
        return max(self.minimum / machine.bandwidth, self.flops / machine.compute)


@dataclass(frozen=True)
class Machine:
    bandwidth: float  # bytes a second
    compute: float  # operations a second


@dataclass(frozen=True)
class Chunk:
    """The kernels' costs on the pixels [begin, end) of a case."""

    case: Case
    dtype: str
    begin: int
    end: int
    deterministic: bool = False

    @property
    def size(self):
        return ITEMSIZE[self.dtype]

    @property
    def fields(self):
        return self.case.fields(self.begin, self.end)

    @property
    def pixels(self):
        return self.end - self.begin

    @property
    def samples(self):
        return self.pixels * self.case.taps

    @property
    def elements(self):
        """Of the chunk's columns."""
        return self.samples * self.case.C

    @property
    def product_flops(self):
        return 2 * self.elements * self.case.outputs / self.case.G

    def flops(self, **work):
        return _ext._operations(self.fields, **work)

    def plan(self, op, **options):
        return _ext._dispatch_plan(op, self.fields, self.dtype, **options)

    # Bytes that any kernel moves for its offsets and masks, and for its image.

    @property
    def offsets_and_masks(self):
        return self.samples * (2 + 1) * 4

    @property
    def image(self):
        rows = min(-(-self.pixels // self.case.W) + self.case.k, self.case.N * self.case.H)
        return rows * self.case.W * self.case.C

    def im2col(self):
        plan = self.plan("im2col")
        threads = math.prod(plan["grid"])
        return Cost(
            threads * 12 + self.elements * 5 * self.size,
            self.offsets_and_masks + (self.elements + self.image) * self.size,
            self.flops(output=True) - self.product_flops,
            plan=plan,
        )

    def col2im(self, direct=False):
        plan = self.plan("col2im", deterministic=self.deterministic, direct=direct)
        read = 0 if direct else self.elements * self.size
        flops = self.flops(grad_input=True, deterministic=self.deterministic)
        cost = Cost(
            0,
            self.offsets_and_masks + read + 2 * self.image * 4,  # read and written
            flops - (0 if direct else self.product_flops),
            plan=plan,
        )
        if self.deterministic:
            # Every SIMD group looks at all samples for its row, and each sample touches
            # two rows, there two pixels.
            looks = plan["grid"][0] * plan["grid"][1] // 32 * self.samples
            cost.requested = looks * 8 + read + self.elements * (self.size + 4 * 2 * 4)
        else:
            walk = plan["constants"]["pixels_per_thread"]
            cost.atomics_at_most = 4 * self.elements
            cost.atomics = (2 + 2 / walk) * self.elements
            looks = plan["grid"][0] * self.samples
            cost.requested = looks * 12 + read + cost.atomics * 2 * 4
        return cost

    def offset_grad(self, direct=False):
        plan = self.plan("offset_grad", direct=direct)
        read = 0 if direct else self.elements * self.size
        threads = self.samples * plan["constants"]["segment_lanes"]
        return Cost(
            threads * 12 + read + self.elements * 4 * self.size + self.offsets_and_masks,
            2 * self.offsets_and_masks + read + self.image * self.size,
            self.flops(grad_samples=True) - (0 if direct else self.product_flops),
            plan=plan,
        )

    def product(self, op, depth, written):
        plan = self.plan(op)
        tiles = math.prod(plan["grid"]) // plan["group"][0]
        splits = plan["constants"].get("depth_splits", 1)
        arrays = (self.elements + self.pixels * self.case.outputs + self.case.weight_size) - written
        sums = written * splits if op == "weight_product" else 0
        stored = written * (4 if op == "weight_product" else self.size)
        return Cost(
            tiles * 2 * TILE * depth / splits * self.size + stored,
            arrays * self.size + stored,
            self.product_flops,
            sums,
            sums,
            plan,
        )

    def output_product(self):
        width = self.case.taps * self.case.C // self.case.G
        return self.product("output_product", width, self.pixels * self.case.outputs)

    def column_product(self):
        return self.product("column_product", self.case.outputs // self.case.G, self.elements)

    def weight_product(self):
        return self.product("weight_product", self.pixels, self.case.weight_size)

    def direct(self, op, **work):
        """Samples and products at once: no columns."""
        plan = self.plan(op)
        outputs = self.pixels * self.case.outputs
        minimum = self.offsets_and_masks + (self.image + outputs + self.case.weight_size) * 4
        sums = 0
        if op == "direct_weight":
            sums = self.case.weight_size * plan["grid"][2]
        return Cost(
            self.elements * 4 * self.size + outputs * self.size,
            minimum * self.size / 4,
            self.flops(**work),
            sums,
            sums,
            plan,
        )


def forward_stages(chunks):
    """Kernels that may run side by side, as the Metal backend encodes them."""
    if _ext._is_direct(chunks[0].case.fields()):
        return [[("direct_output", chunk.direct("direct_output", output=True))] for chunk in chunks]
    stages = [[("im2col", chunks[0].im2col())]]
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        stages.append([("output_product", chunk.output_product())])
        if following:
            stages[-1].append(("im2col", following.im2col()))
    return stages


def backward_stages(chunks):
    direct = _ext._is_direct(chunks[0].case.fields())
    stages = []
    for chunk in chunks:
        if direct:
            weight = ("direct_weight", chunk.direct("direct_weight", grad_weight=True))
        else:
            columns = [("im2col", chunk.im2col()), ("column_product", chunk.column_product())]
            stages.append(columns)
            weight = ("weight_product", chunk.weight_product())
        name = "col2im ordered" if chunk.deterministic else "col2im"
        stages.append(
            [weight, (name, chunk.col2im(direct)), ("offset_grad", chunk.offset_grad(direct))]
        )
    return stages


def total(stages):
    return sum((cost for stage in stages for _, cost in stage), Cost())


def seconds(stages, machine):
    return sum(sum((cost for _, cost in stage), Cost()).seconds(machine) for stage in stages)


def kernels(stages):
    out = {}
    for stage in stages:
        for name, cost in stage:
            out[name] = out.get(name, Cost()) + cost
    return out


def pass_report(name, stages, products, compulsory, machine):
    cost, bound = total(stages), seconds(stages, machine)
    bare = products / machine.compute
    print(
        f"  {name:<22}{cost.minimum / 1e6:7.0f} MB of {compulsory / 1e6:.0f} compulsory,"
        f" {cost.flops / 1e9:.2f} GFLOP, {cost.atomics / 1e6:.1f} M atomics:"
        f" {bound * 1e3:.2f} ms, {bound / bare:.2f} of its products' {bare * 1e3:.2f}"
    )
    return bound


def report(case, dtype, machine, deterministic):
    size = ITEMSIZE[dtype]
    ranges = _ext._chunk_plan(case.fields(), size)
    if _ext._is_direct(case.fields()):
        ranges = [(0, case.pixels)]
    chunks = [Chunk(case, dtype, *pixels, deterministic) for pixels in ranges]
    pieces = [
        len(_ext._piece_plan(case.fields(), **work))
        for work in (
            {"output": True},
            {"grad_input": True, "grad_samples": True, "grad_weight": True},
        )
    ]
    columns = case.pixels * case.taps * case.C * size
    print(
        f"\n{case.name}, {dtype}, with mask: {len(chunks)} chunk(s), columns"
        f" {columns / 1e6:.0f} MB; primitives: forward {pieces[0]}, backward {pieces[1]}"
    )
    print(
        f"  {'kernel':<16}{'width':>6}{'group':>10}{'requested':>13}{'minimum':>10}"
        f"{'GFLOP':>9}{'FLOP/B':>8}{'atomics, M':>17}{'bound':>11}"
    )
    forward, backward = forward_stages(chunks), backward_stages(chunks)
    for title, stages in (("forward", forward), ("backward", backward)):
        print(f"  {title}:")
        for name, cost in kernels(stages).items():
            group = "x".join(map(str, cost.plan["group"]))
            atomics = f"{cost.atomics / 1e6:.1f}" if cost.atomics else ""
            if cost.atomics != cost.atomics_at_most:
                atomics += f" / {cost.atomics_at_most / 1e6:.1f}"
            print(
                f"  {name:<16}{cost.plan['vector_width']:>6}{group:>10}"
                f"{cost.requested / 1e6:>10.0f} MB{cost.minimum / 1e6:>7.0f} MB"
                f"{cost.flops / 1e9:>9.2f}{cost.flops / cost.minimum:>8.1f}{atomics:>17}"
                f"{cost.seconds(machine) * 1e3:>8.2f} ms"
            )
    product = sum(chunk.product_flops for chunk in chunks)
    image, output = case.pixels * case.C, case.pixels * case.outputs
    samples = case.pixels * case.taps * 12
    once = samples + (image + output + case.weight_size) * size
    gradients = samples + (image + case.weight_size) * 4
    first = pass_report("forward", forward, product, once, machine)
    second = pass_report("backward", backward, 2 * product, once + gradients, machine)
    bare = 3 * product / machine.compute
    print(
        f"  forward and backward: {(first + second) * 1e3:.2f} ms,"
        f" {(first + second) / bare:.2f} of the three products' {bare * 1e3:.2f}"
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
    parser.add_argument("--deterministic", action="store_true", help="sums in a fixed order")
    args = parser.parse_args()
    print(f"On paper, for {args.bandwidth:g} GB/s and {args.compute:g} TFLOP/s; nothing was timed.")
    machine = Machine(args.bandwidth * 1e9, args.compute * 1e12)
    for case in CASES:
        for dtype in args.dtype or ("float32", "float16"):
            report(case, dtype, machine, args.deterministic)


if __name__ == "__main__":
    main()
