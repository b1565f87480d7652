"""NVIDIA's run-time compiler, from PyPI's nvidia-cuda-nvrtc, as MLX calls it."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

# What the kernels need of MLX's header of this name, which no package has as a file: it is
# a text inside MLX's CUDA library.
UTILS_NAME = b"mlx/backend/cuda/device/utils.cuh"
UTILS = b"""
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""


class NvrtcError(Exception):
    """The compiler refused a source, or warned."""


@cache
def installed():
    """The compiler's library and the folders with CUDA's headers, None without them."""
    try:
        package = importlib.util.find_spec("nvidia")
    except ImportError:
        return None
    for folder in package.submodule_search_locations if package else []:
        for root in sorted(Path(folder).glob("cu1*")):
            libraries = sorted((root / "lib").glob("libnvrtc.so.*"))
            include = root / "include"
            headers = ("cuda_fp16.h", "cooperative_groups.h", "cccl/cuda/std/array")
            if libraries and all((include / header).exists() for header in headers):
                # NVRTC opens this one by its bare name, and not every version looks beside
                # itself for it.
                for builtins in (root / "lib").glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
                return ctypes.CDLL(str(libraries[0])), [include, include / "cccl"]
    return None


def compile(source, name, arch, *options):  # as the compiler's other names
    """The machine code of kernel `name`, and what the compiler said."""
    library, includes = installed()
    library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(function, *arguments):
        status = getattr(library, function)(*arguments)
        return None if status == 0 else library.nvrtcGetErrorString(status).decode()

    program = ctypes.c_void_p()
    headers, names = (ctypes.c_char_p * 1)(UTILS), (ctypes.c_char_p * 1)(UTILS_NAME)
    words = [
        # As MLX's jit_module.cpp has them.
        "--device-as-default-execution-space",
        f"--gpu-architecture={arch}",
        *(f"--include-path={folder}" for folder in includes),
        *options,
    ]
    arguments = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    error = call(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source.encode(),
        f"{name}.cu".encode(),
        1,
        headers,
        names,
    )
    assert error is None, error
    try:
        expression = f"mlx::core::cu::{name}".encode()
        call("nvrtcAddNameExpression", program, expression)
        error = call("nvrtcCompileProgram", program, len(words), arguments)
        size = ctypes.c_size_t()
        call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        call("nvrtcGetProgramLog", program, log)
        said = log.value.decode()
        if error is not None:
            raise NvrtcError(f"{error}\n{said}")
        lowered = ctypes.c_char_p()
        error = call("nvrtcGetLoweredName", program, expression, ctypes.byref(lowered))
        if error is not None:
            raise NvrtcError(error)
        call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, code)
        return code.raw, said
    finally:
        call("nvrtcDestroyProgram", ctypes.byref(program))
