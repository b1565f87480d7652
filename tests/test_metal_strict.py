"""The strict pass accepts the project's Metal sources, and refuses what Metal refuses."""

import numpy as np
import pytest

import metal
from mlx_deform import _ext

pytestmark = pytest.mark.skipif(
    metal.compiler_command() is None, reason="needs ziglang, clang++-22 or MSL_CXX"
)

TEMPLATE = """
#include <metal_stdlib>
%(before)s
[[kernel]] void test_kernel(
    device float* out [[buffer(0)]],
    const device float* in [[buffer(1)]],
    constant long& size [[buffer(2)]],
    %(parameter)s
    uint at [[thread_position_in_grid]]) {
  %(body)s
}
"""

ACCEPTED = {
    "arithmetic": {"body": "out[at] = metal::floor(in[at]) * 2.0f + float(size);"},
    "vectors": {
        "body": "const metal::float2 v = metal::float2(in[at], 1.0f); out[at] = v.x + v.y;"
    },
    "vector access": {
        "body": "*(device metal::float4*)(out) = *(const device metal::float4*)(in);"
    },
    "half types": {"body": "out[at] = float(half(in[at])) + float(static_cast<bfloat>(in[at]));"},
    "helpers": {
        "before": "inline float twice(const device float* p) { return 2.0f * *p; }",
        "body": "out[at] = twice(in + at);",
    },
    "overloads that call no namesake": {
        "before": "inline float f(float x) { return x; } inline int f(int x) { return x; }",
        "body": "out[at] = f(in[at]) + float(f(int(at)));",
    },
    "threadgroup arrays": {
        "before": "constant constexpr int n = 4;",
        "body": "threadgroup float shared[n * 2]; shared[at % 8] = in[at]; out[at] = shared[0];",
    },
    "atomics": {
        "parameter": "device metal::atomic_float* sum [[buffer(3)]],",
        "body": "metal::atomic_fetch_add_explicit(sum, in[at], metal::memory_order_relaxed);",
    },
}

# Each with a part of the complaint, so that it is refused for its own reason.
REFUSED = {
    "address space lost": ({"body": "float* p = out; p[at] = 1.0f;"}, "cannot initialize"),
    "address spaces mixed": (
        {"body": "threadgroup float shared[8]; device float* p = shared; p[at] = 1.0f;"},
        "cannot initialize",
    ),
    "helper without address space": (
        {"before": "inline void set(float* p) { *p = 1.0f; }", "body": "set(out);"},
        "no matching function",
    ),
    "constant passed as device": (
        {
            "before": "inline long get(const device long* p) { return *p; }",
            "body": "out[at] = float(get(&size));",
        },
        "no matching function",
    ),
    "buffer without address space": (
        {"parameter": "float* bare [[buffer(3)]],", "body": "out[at] = bare[0];"},
        "device or constant",
    ),
    "parameter without attribute": (
        {"parameter": "uint bare,", "body": "out[at] = float(bare);"},
        "no attribute",
    ),
    "write to const": ({"body": "in[at] = 1.0f;"}, "read-only"),
    "write to constant": ({"body": "size = 1;"}, "not assignable|read-only|const"),
    "ambiguous max": ({"body": "out[at] = float(metal::max(1, at));"}, "ambiguous"),
    "ambiguous min": ({"body": "out[at] = float(metal::min(in[at], half(1)));"}, "ambiguous"),
    "vector of the wrong size": (
        {"body": "out[at] = metal::float4(in[0], in[1], in[2]).x;"},
        "wrong number of elements",
    ),
    "reinterpreting another size": (
        {"body": "out[at] = float(as_type<uint>(half(1)));"},
        "as_type keeps the size",
    ),
    "atomic on a plain pointer": (
        {"body": "metal::atomic_fetch_add_explicit(out, 1.0f, metal::memory_order_relaxed);"},
        "cannot initialize",
    ),
    "sequentially consistent atomic": (
        {
            "parameter": "device metal::atomic_float* sum [[buffer(3)]],",
            "body": "metal::atomic_fetch_add_explicit(sum, 1.0f, metal::memory_order_seq_cst);",
        },
        "memory_order_seq_cst",
    ),
    "atomic in threadgroup memory": (
        {
            "body": "threadgroup metal::atomic_float* a = (threadgroup metal::atomic_float*)0;"
            "metal::atomic_fetch_add_explicit(a, 1.0f, metal::memory_order_relaxed);"
        },
        "cannot initialize",
    ),
    "unknown function": ({"body": "out[at] = metal::floorf(in[at]);"}, "floorf"),
    "the C++ library": ({"body": "out[at] = std::floor(in[at]);"}, "namespace std"),
    "double": ({"body": "double x = in[at]; out[at] = float(x);"}, "no double"),
    "double literal": ({"body": "out[at] = 0.5 * in[at];"}, "would be a double"),
    "double literal with exponent": ({"body": "out[at] = 1e-3 * in[at];"}, "would be a double"),
    "goto": ({"body": "goto end; end: out[at] = 1.0f;"}, "no goto"),
    "recursion": (
        {
            "before": "inline int f(int n) { return n > 0 ? f(n - 1) : 0; }",
            "body": "out[at] = float(f(int(at)));",
        },
        "no recursion",
    ),
    "recursion of two": (
        {
            "before": "inline int g(int n); inline int f(int n) { return n > 0 ? g(n - 1) : 0; }"
            "inline int g(int n) { return f(n); }",
            "body": "out[at] = float(f(int(at)));",
        },
        "no recursion",
    ),
    "lambda": (
        {"body": "auto f = [&](float x) { return x + 1.0f; }; out[at] = f(in[at]);"},
        "no lambdas",
    ),
    "variable-length array": (
        {"body": "float local[at]; local[0] = 1.0f; out[at] = local[0];"},
        "variable length",
    ),
    "new": ({"body": "out[at] = *new float(1.0f);"}, "no new"),
    "exceptions": ({"body": "throw 1;"}, "no exceptions"),
    "not ASCII": ({"body": "out[at] = 1.0f; // 2\u00b3\u00b9"}, "ASCII"),
    "unresolved include": ({"before": '#include "mlx_ops/sampling.h"', "body": ""}, "include"),
    "syntax": ({"body": "out[at] = ;"}, "expected expression"),
}


def source(before="", parameter="", body=""):
    return TEMPLATE % {"before": before, "parameter": parameter, "body": body}


@pytest.mark.parametrize("index_bits", [32, 64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_project_passes(dtype, index_bits):
    metal.check(_ext._metal_source(dtype, index_bits))


def test_the_source_without_a_host_passes():
    """As a compiler sees it that is given the files alone: float32 and int."""
    text = _ext._metal_source("float32", 32)
    lines = text.splitlines()
    assert lines[4].startswith("#define MLX_DEFORM_INDEX_NAME")
    metal.check("\n".join(lines[5:]))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    metal.check(source(**ACCEPTED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    parts, complaint = REFUSED[name]
    with pytest.raises(metal.MslError, match=complaint):
        metal.check(source(**parts))


SIMD = """
#include <metal_stdlib>
[[kernel]] void test_kernel(
    device float* out [[buffer(0)]],
    uint at [[thread_position_in_grid]],
    uint local [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[64];
  %s
}
"""
BARRIER = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);"
REVERSE = "shared[local] = float(local); %s out[at] = shared[63 - local];"

MISUSED = {
    "a lane that has returned": (
        "if (lane == 3) return; out[at] = metal::simd_shuffle_xor(1.0f, ushort(1));",
        "takes no part",
    ),
    "two operations at once": (
        "out[at] = lane < 5 ? metal::simd_sum(1.0f) : metal::simd_broadcast(1.0f, ushort(9));",
        "while its SIMD group",
    ),
    "a barrier that some do not reach": (f"if (local < 40) {{ {BARRIER} }}", "never reach"),
    "a barrier beside an operation": (
        f"if (lane < 9) {{ {BARRIER} }} else {{ out[at] = metal::simd_sum(1.0f); }}",
        "at a barrier",
    ),
    "beyond the array": ("out[at + 64] = 1.0f;", "outside an array"),
}


def run(body, threads, seed=1):
    out = np.zeros(threads, np.float32)
    plan = {
        "kernel": "test_kernel",
        "constants": {},
        "buffers": [("out", 0, True)],
        "grid": (threads, 1, 1),
        "group": (64, 1, 1),
        "empty": False,
    }
    kernels = metal.load(SIMD % body)
    with metal.guarded(out) as (copy,):
        kernels.run(plan, {"out": copy}, seed)
    return out


@pytest.mark.parametrize("name", MISUSED)
def test_the_scheduler_refuses(name):
    body, complaint = MISUSED[name]
    with pytest.raises(metal.KernelError, match=complaint):
        run(body, 64)


def test_simd_operations():
    """Also in the last SIMD group, which has 13 lanes."""
    out = run("out[at] = metal::simd_sum(float(lane)) + 1000.0f * float(lane);", 64 + 13)
    assert out[5] == 496 + 5000
    assert out[70] == 78 + 6000


def test_barriers_order_threadgroup_memory():
    for seed in range(4):
        np.testing.assert_array_equal(run(REVERSE % BARRIER, 64, seed), np.arange(64)[::-1])


def test_a_missing_barrier_shows():
    """Reading what is not yet written gives NaN, and more of it in some orders."""
    results = [run(REVERSE % "", 64, seed) for seed in range(4)]
    assert all(np.isnan(result).any() for result in results)
    assert len({np.isnan(result).tobytes() for result in results}) > 1
