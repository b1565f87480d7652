"""Deformable convolution and multi-scale deformable attention as native MLX ops with gradients."""

import contextlib
import importlib.metadata

import mlx.core as _mx

__version__ = importlib.metadata.version("mlx-deform")


def _check_mlx_version(found: str) -> None:
    # MLX's C++ API has no stable ABI: another version would fail in ways that
    # say nothing about the cause.
    pins = importlib.metadata.requires("mlx-deform") or []
    wanted = next(pin.split("==")[1] for pin in pins if pin.startswith("mlx=="))
    if found != wanted:
        raise ImportError(
            f"mlx_deform {__version__} was built for mlx {wanted} but found mlx {found}; "
            f'run pip install "mlx=={wanted}" or install the mlx_deform made for mlx {found}.'
        )


_check_mlx_version(_mx.__version__)

from ._ext import (  # noqa: E402
    _set_portable,
    deform_conv2d,
    deform_im2col,
    multi_scale_deformable_attention,
)


@contextlib.contextmanager
def portable():
    """Build the ops of MLX's own primitives, on this thread and inside the ``with`` block.

    ``mx.export_function`` writes MLX's own primitives only. A function exported inside the
    block runs wherever MLX does, without this package; it is slower there, and its memory
    holds the columns whole. Values and gradients are the same up to rounding.

    Example:
      >>> with mlx_deform.portable():
      ...     mx.export_function("model.mlxfn", model, x)
    """
    earlier = _set_portable(True)
    try:
        yield
    finally:
        _set_portable(earlier)


__all__ = [
    "__version__",
    "deform_conv2d",
    "deform_im2col",
    "multi_scale_deformable_attention",
    "portable",
]
