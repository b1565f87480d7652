"""Deformable convolution and multi-scale deformable attention as native MLX ops with gradients."""

import contextlib
import importlib.metadata

import mlx.core as _mx

from ._compiled import module_folder as _module_folder

__version__ = importlib.metadata.version("mlx-deform")


# Where ``_ext`` is found.
__path__.insert(0, _module_folder(__path__, __version__, _mx.__version__))

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
