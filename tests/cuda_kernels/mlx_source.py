"""The source that mlx.core.fast.cuda_kernel compiles, from the arguments it is given.

MLX writes it in mlx/backend/cuda/custom_kernel.cpp (build_kernel, 0.32.4) and shows it
with verbose=True, on a machine with a GPU: tests/test_cuda_kernels.py compares them there.
"""

from typing import NamedTuple

DEFAULT_HEADER = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

"""
CUDA_TYPES = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "int32": "int32_t",
    "int64": "int64_t",
}
HALF_ARRAYS = ("input", "columns", "grad_columns", "value", "cotangent", "out")
INT_ARRAYS = ("levels",)


class Text(NamedTuple):
    name: str  # of the __global__ function, in namespace mlx::core::cu
    header: str
    function: str
    arguments: list[tuple[str, str]]  # ("array" or "strides", role)

    @property
    def source(self):
        return DEFAULT_HEADER + self.header + self.function


def text_of(kernel, dtype):
    """The Text of what _ext._cuda_kernel returns."""
    constants = {"T": dtype, "Index": kernel["index"], **kernel["constants"]}
    spelled = [
        ("_t" if value else "_f") if isinstance(value, bool) else f"_{value}"
        for value in constants.values()
    ]
    name = f"custom_kernel_{kernel['name']}{''.join(spelled)}"

    parameters, arguments = [], []
    for role in (*kernel["inputs"], *kernel["outputs"]):
        kind = CUDA_TYPES[
            dtype if role in HALF_ARRAYS else "int32" if role in INT_ARRAYS else "float32"
        ]
        const = "const " if role in kernel["inputs"] else ""
        parameters.append(f"    {const}{kind}* {role}")
        arguments.append(("array", role))
        # What MLX finds by searching the body for the name.
        for suffix, declared in (
            ("shape", "Shape"),
            ("strides", "Strides"),
            ("ndim", "int"),
        ):
            if role in kernel["inputs"] and f"{role}_{suffix}" in kernel["source"]:
                parameters.append(f"    const __grid_constant__ {declared} {role}_{suffix}")
                arguments.append((suffix, role))

    body = ""
    for constant, value in constants.items():
        if isinstance(value, bool):
            body += f"  constexpr bool {constant} = {str(value).lower()};\n"
        elif isinstance(value, int):
            body += f"  constexpr int {constant} = {value};\n"
        else:
            body += f"  using {constant} = {CUDA_TYPES[value]};\n"
    signature = ",\n".join(parameters)
    function = (
        "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {name}(\n{signature}) {{\n{body}\n{kernel['source']}"
        "\n}\n\n} // namespace mlx::core::cu\n"
    )
    return Text(name, kernel["header"], function, arguments)
