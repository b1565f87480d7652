"""Runs kernels from dispatch plans, on NumPy arrays."""

import ctypes

import numpy as np

GUARD_BYTES = 256
GUARD = 0xFF  # every float type reads it as NaN


class KernelError(Exception):
    """A kernel did what no GPU would survive, or wrote where it should not."""


class Kernels:
    def __init__(self, library, names, constants):
        self.library = ctypes.CDLL(library)
        self.numbers = {name: number for number, name in enumerate(names)}
        self.constants = constants

    def run(self, plan, buffers, seed=0):
        """Runs the launch `plan`, as `mlx_deform`'s _dispatch_plan describes it.

        `buffers` are arrays or bytes by role; the arrays are written in place.
        """
        if plan["empty"]:
            return
        for name, kind in self.constants.items():
            # Constants that a kernel does not have are undefined: 77 for either type.
            value = plan["constants"].get(name, 77)
            c_type = {"bool": ctypes.c_bool, "int": ctypes.c_int}[kind]
            c_type.in_dll(self.library, name).value = value
        pointers = (ctypes.c_void_p * 31)()
        for role, index, _ in plan["buffers"]:
            buffer = buffers[role]
            if isinstance(buffer, bytes):
                buffer = np.frombuffer(buffer, np.uint8)
            if not buffer.flags.c_contiguous:
                raise ValueError(f"{role} must be contiguous")
            pointers[index] = buffer.ctypes.data
        error = ctypes.create_string_buffer(512)
        uint3 = ctypes.c_uint * 3
        if self.library.msl_run(
            self.numbers[plan["kernel"]],
            pointers,
            uint3(*plan["grid"]),
            uint3(*plan["group"]),
            ctypes.c_ulong(seed),
            error,
        ):
            raise KernelError(f"{plan['kernel']}: {error.value.decode()}")


class guarded:
    """Copies of arrays between guards: `with guarded(a, b) as (x, y)`.

    Beyond an array lie NaNs, which spoil what is computed from them; at the end, a guard
    that changed is an error, and the contents go back into the arrays. A copy starts
    where an access of the array's own alignment does, not at a page.
    """

    def __init__(self, *arrays):
        self.arrays = arrays

    def __enter__(self):
        self.memory, copies = [], []
        for array in self.arrays:
            memory = np.full(array.nbytes + 2 * GUARD_BYTES, GUARD, np.uint8)
            copy = memory[GUARD_BYTES : GUARD_BYTES + array.nbytes].view(array.dtype)
            copy = copy.reshape(array.shape)
            copy[...] = array
            self.memory.append(memory)
            copies.append(copy)
        self.copies = copies
        return copies

    def __exit__(self, kind, *_):
        for array, memory, copy in zip(self.arrays, self.memory, self.copies, strict=True):
            array[...] = copy
            outside = np.concatenate([memory[:GUARD_BYTES], memory[-GUARD_BYTES:]])
            if kind is None and not (outside == GUARD).all():
                raise KernelError("a kernel wrote outside an array")
