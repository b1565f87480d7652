"""torchvision's operator, computed by MLX for as long as one likes."""

import threading
import warnings

import torch

from . import _ops
from ._bridge import DEVICES

_lock = threading.Lock()


class Patch:
    """Holds from when it is made until ``undo()``, as a context manager to the end of the block.
    Patches of a kind may overlap: what they patch ends with the last of them."""

    _holding = 0  # of this kind

    def __init__(self):
        kind = type(self)
        with _lock:
            if kind._holding == 0:
                kind._start()
            kind._holding += 1
        self._active = True

    @classmethod
    def _start(cls) -> None:
        raise NotImplementedError

    @classmethod
    def _end(cls) -> None:
        raise NotImplementedError

    def undo(self) -> None:
        """Gives the original back, unless another patch still holds."""
        kind = type(self)
        with _lock:
            if not self._active:
                return
            self._active = False
            kind._holding -= 1
            if kind._holding == 0:
                kind._end()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


# ---------------------------------------------------------------------------
# torchvision


def _deform_conv2d(
    input,
    weight,
    offset,
    mask,
    bias,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    groups,
    offset_groups,
    use_mask,
):
    return _ops.deform_conv2d(
        input,
        offset,
        weight,
        bias,
        mask if use_mask else None,
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
    )


def _below_autograd(*arguments):
    # Compiled graphs hold torchvision's strides, which are contiguous for every input.
    return _deform_conv2d(*arguments).contiguous()


def _deform_conv2d_backward(grad, input, weight, offset, mask, bias, *settings):
    """All the gradients, as torchvision's; compiled graphs call it."""
    *settings, _, _, use_mask = settings
    geometry = (settings[0:2], settings[2:4], settings[4:6])
    wanted = (True, True, True, True, bool(use_mask))
    gradients = _ops.backward(
        grad, input, offset, weight, mask if use_mask else None, *geometry, wanted
    )
    g_input, g_offset, g_weight, g_bias, *g_mask = (each.contiguous() for each in gradients)
    return g_input, g_weight, g_offset, *(g_mask or [torch.zeros_like(mask)]), g_bias


def _override() -> torch.library.Library:
    try:
        import torchvision.extension
    except ImportError:
        raise RuntimeError("[patch_torchvision] torchvision is not installed") from None
    torchvision.extension._assert_has_ops()
    library = torch.library.Library("torchvision", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for device in DEVICES:
            library.impl("deform_conv2d", _deform_conv2d, f"Autograd{device.upper()}")
            # What inference mode and compiled graphs call.
            library.impl("deform_conv2d", _below_autograd, device.upper())
            library.impl("_deform_conv2d_backward", _deform_conv2d_backward, device.upper())
    return library


def _forget_kernels() -> None:
    """Torch's Python dispatcher, which compiling uses, keeps what it found before."""
    operators = torch.ops.torchvision
    for operator in (operators.deform_conv2d, operators._deform_conv2d_backward):
        operator.default._dispatch_cache.clear()


class patch_torchvision(Patch):
    """Lets MLX compute ``torchvision.ops.deform_conv2d`` of tensors on the CPU and on MPS.

    As a plain call it holds until :meth:`undo`, as a context manager to the end of the block.
    It replaces the kernels of the operator ``torchvision::deform_conv2d`` in torch's dispatcher,
    so it reaches whatever calls that, on all threads: ``torchvision.ops.deform_conv2d`` under
    any name that a module imported it by before, ``torchvision.ops.DeformConv2d`` layers that
    exist already, scripted, traced, exported and compiled models. Tensors on other devices are
    torchvision's as before. Not reached are deformable convolutions other than torchvision's.
    A graph that ``torch.compile`` makes within keeps MLX afterwards, until
    ``torch.compiler.reset()``.

    Arguments, results and errors are those of :func:`mlx_deform.torch.deform_conv2d`.

    Raises:
        RuntimeError: If torchvision is not installed, or lacks its operators.

    Example:
        >>> import torch, torchvision
        >>> from mlx_deform.torch import patch_torchvision
        >>> layer = torchvision.ops.DeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> x, offset = torch.randn(1, 16, 24, 24), torch.zeros(1, 2 * 3 * 3, 24, 24)
        >>> with patch_torchvision():
        ...     y = layer(x, offset)
    """

    _library: torch.library.Library | None = None

    @classmethod
    def _start(cls) -> None:
        cls._library = _override()
        _forget_kernels()

    @classmethod
    def _end(cls) -> None:
        cls._library._destroy()
        _forget_kernels()
        cls._library = None
