"""From tensors to MLX arrays and back: every call crosses once, under one lock.

On MPS the memory is shared both ways, and the two runtimes' command queues know nothing of
each other: torch's is waited for before MLX reads, MLX's before torch does. On the CPU
there is nothing to wait for but MLX; the rest is the same.
"""

import os
import threading
from collections.abc import Callable, Sequence

import mlx.core as mx
import torch
from torch import Tensor

from .._ext import _borrow

DTYPES = {
    torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16,
    torch.float32: mx.float32,
    torch.float64: mx.float64,
}
DEVICES = ("cpu", "mps")

_CPU_DLPACK = (1, 0)  # kDLCPU, wherever MLX computes by default

# MLX's builds for a GPU adopt what DLPack offers where they can, the one for the CPU alone
# copies all of it.
_SHARES_NO_CPU_MEMORY = not mx.is_available(mx.gpu)

# Before 0.32 what MLX exports does not keep its memory, nor can it be asked where to lie.
_EXPORTS_SAFELY = "dl_device" in mx.array.__dlpack__.__doc__
if not (_EXPORTS_SAFELY or _SHARES_NO_CPU_MEMORY):
    raise ImportError(
        "mlx_deform.torch needs mlx 0.32.0 or later where MLX computes on a GPU but found mlx "
        f'{mx.__version__}; run pip install -U "mlx>=0.32".'
    )

# Before MLX tied streams to threads every stream was of this kind.
_new_stream = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)

Function = Callable[..., Sequence[mx.array]]


def _from_the_start(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own: results that the CPU begins with a cache line lie
    inside MLX's buffers, where torch's tracing expects new storages."""
    skipped = tensor.storage_offset()
    if skipped == 0:
        return tensor
    storage = tensor.untyped_storage()[skipped * tensor.element_size() :]
    return tensor.new_empty(0).set_(storage, 0, tensor.shape, tensor.stride())


class _Runtime:
    """MLX on one device. MLX ties a stream to its thread, and every thread that uses a CPU
    stream leaves an OS thread behind; so all threads share one stream, and take turns."""

    def __init__(self, device: str):
        self.on_gpu = device == "mps"
        self.stream = _new_stream(mx.gpu if self.on_gpu else mx.cpu)
        self.process = os.getpid()
        # What torch's queue may still be reading; nothing is, once it was waited for.
        self.in_flight: list[mx.array] = []

    def array(self, tensor: Tensor | None) -> mx.array | None:
        if tensor is None:
            return None
        dtype = DTYPES[tensor.dtype]
        if _SHARES_NO_CPU_MEMORY:
            return _borrow(tensor.data_ptr(), tensor.shape, dtype)
        # Without the type MLX would take a float64 for a float32.
        return mx.asarray(tensor, dtype=dtype)

    def tensor(self, array: mx.array, borrowed: set[int]) -> Tensor:
        if not _EXPORTS_SAFELY:
            return self.copy(array)
        if self.on_gpu:
            tensor = torch.from_dlpack(array)
        else:
            tensor = torch.utils.dlpack.from_dlpack(array.__dlpack__(dl_device=_CPU_DLPACK))
        # MLX hands an argument on where there is nothing to compute, as in a sum over axes of
        # length 1. An operator's result must not be its argument.
        if tensor.data_ptr() in borrowed:
            return tensor.clone()
        return tensor if self.on_gpu else _from_the_start(tensor)

    def copy(self, array: mx.array) -> Tensor:
        """Of an array on the CPU. Before 0.32 MLX exported no bfloat16 either."""
        if array.dtype != mx.bfloat16:
            return torch.from_dlpack(array).clone()
        bits = mx.view(array, mx.int16, stream=self.stream)
        return torch.from_dlpack(bits).clone().view(torch.bfloat16)

    def call(self, function: Function, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        if self.on_gpu:
            torch.mps.synchronize()
            self.in_flight.clear()
        with mx.stream(self.stream):
            arrays = [self.array(tensor) for tensor in tensors]  # held until evaluated: _borrow
            results = function(*arrays)
            # Torch takes no negative strides and no offsets from others.
            results = [mx.contiguous(result) for result in results]
            mx.eval(results)
        if self.on_gpu:
            self.in_flight += results
        borrowed = {tensor.data_ptr() for tensor in tensors if tensor is not None}
        return [self.tensor(result, borrowed) for result in results]


_lock = threading.Lock()
_runtimes: dict[str, _Runtime] = {}


def check_process() -> None:
    """MLX's threads, and this library's, stay in the parent: a child would wait for ever."""
    if any(runtime.process != os.getpid() for runtime in _runtimes.values()):
        raise RuntimeError(
            "[mlx_deform.torch] MLX cannot compute in a forked process whose parent used it; "
            'start the process with the method "spawn"'
        )


def call(function: Function, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """``function`` of the tensors as MLX arrays, evaluated, as tensors.

    The tensors are on one device of ``DEVICES``, not empty and row-contiguous (``None`` stays
    ``None``). The results are row-contiguous and share no memory with them.
    """
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    with _lock:
        runtime = _runtimes.get(device)
        if runtime is None:
            runtime = _runtimes[device] = _Runtime(device)
        return runtime.call(function, tensors)
