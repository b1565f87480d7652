"""Compiles the kernels as C++ and runs them on the CPU, from dispatch plans."""

import struct
from pathlib import Path

import numpy as np

from metal.compiler import build_code
from metal.launch import Kernels

from .mlx_source import text_of

WORDS = (Path(__file__).parent / "cuda_words.h").read_text().replace("#pragma once\n", "")
# Where DeformConv2dParams has pixel_begin, after 18 ints.
PIXEL_BEGIN = 18 * 4
STRIDES = 10


def launcher(number, text):
    fetched = [
        f"msl::pointer({place})" if kind == "array" else f"msl::reference({place})"
        for place, (kind, _) in enumerate(text.arguments)
    ]
    call = f"mlx::core::cu::{text.name}({', '.join(fetched)});"
    return f'extern "C" void msl_launcher_{number}() {{ {call} }}\n'


def build_texts(texts, sanitize=None, compiler=None):
    """A library of kernels that share a header."""
    (header,) = {text.header for text in texts}
    launchers = "".join(launcher(number, text) for number, text in enumerate(texts))
    table = ", ".join(f"msl_launcher_{number}" for number in range(len(texts)))
    functions = "".join(text.function for text in texts)
    code = (
        f"#include <metal_stdlib>\n{WORDS}\n{header}\n{functions}\n{launchers}\n"
        f'extern "C" void (*const msl_launchers[])();\n'
        f"void (*const msl_launchers[])() = {{{table}}};\n"
    )
    return build_code(code, [text.name for text in texts], {}, sanitize, compiler)


def launch(kernel, text, buffers):
    """The plan and the buffers that metal.launch.Kernels runs, as MLX would call the kernel.

    `buffers` are those of the dispatch plan: the outputs whole, of which the kernel gets
    the rows of its pixels.
    """
    given = np.frombuffer(kernel["words"], np.int64)
    carried = kernel["carrier_words"]
    carriers = []
    for begin in range(0, len(given), carried):
        words = np.zeros(STRIDES, np.int64)
        part = given[begin : begin + carried]
        words[: len(part)] = part
        carriers.append(words)
    carriers = iter(carriers)
    arrays = {}
    for place, (kind, role) in enumerate(text.arguments):
        array = next(carriers) if kind == "strides" else buffers[role]
        if kind == "array" and role in ("grad_offset", "grad_mask"):
            begin, end = struct.unpack_from("ll", buffers["params"], PIXEL_BEGIN)
            array = array.reshape(-1, array.shape[-1])[begin:end]
        arrays[f"{place} {role}"] = array
    plan = {
        "kernel": text.name,
        "empty": False,
        "constants": {},
        "buffers": [(role, place, None) for place, role in enumerate(arrays)],
        "grid": kernel["grid"],
        "group": kernel["group"],
    }
    return plan, arrays


class CudaKernels:
    """Stands in for metal's Kernels: the same plans, run by the CUDA kernels."""

    def __init__(self, prepared=()):
        """`prepared`: (kernel, dtype) pairs to compile together; others are as needed."""
        self.libraries = {}
        by_header = {}
        for kernel, dtype in prepared:
            text = text_of(kernel, dtype)
            by_header.setdefault(text.header, {})[text.name] = text
        for texts in by_header.values():
            self.add(list(texts.values()))

    def add(self, texts):
        library = Kernels(*build_texts(texts))
        self.libraries.update({text.name: library for text in texts})

    def run(self, plan, buffers, seed=0):
        if plan["empty"]:
            return
        kernel = plan["cuda"]
        text = text_of(kernel, plan["dtype"])
        if text.name not in self.libraries:
            self.add([text])
        called, arrays = launch(kernel, text, buffers)
        self.libraries[text.name].run(called, arrays, seed)
