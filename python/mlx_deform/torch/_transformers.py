"""The multi-scale deformable attention of transformers' models, computed by MLX."""

import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import ClassVar

from ._bridge import DEVICES
from ._msda import MultiScaleDeformableAttention, multi_scale_deformable_attention
from ._patch import Patch

# transformers has the function in each of its models' modules: as a layer (a class with a
# forward), as a function of locations by level, or as one of all levels' locations in a row.
LAYER = "MultiScaleDeformableAttention"
BY_LEVEL = "multi_scale_deformable_attention"
IN_A_ROW = "multi_scale_deformable_attention_v2"

MODELS = {
    "d_fine": IN_A_ROW,
    "deformable_detr": LAYER,
    "deimv2": IN_A_ROW,
    "grounding_dino": LAYER,
    "lw_detr": LAYER,
    "mask2former": BY_LEVEL,
    "mm_grounding_dino": LAYER,
    "omdet_turbo": LAYER,
    "oneformer": BY_LEVEL,
    "pp_doclayout_v2": LAYER,
    "pp_doclayout_v3": LAYER,
    "pp_doclayout_v4": LAYER,
    "rf_detr": LAYER,
    "rt_detr": LAYER,
    "rt_detr_v2": IN_A_ROW,
}

# The functions themselves may be anywhere by now: D-FINE's layers keep theirs as an attribute.
# So a patch leaves them where they are, and gives them the code of one of the three below,
# whose `__name__` is then that of the model's module.


def _layer(
    self,
    value,
    value_spatial_shapes,
    value_spatial_shapes_list,
    level_start_index,
    sampling_locations,
    attention_weights,
    im2col_step,
):
    from mlx_deform.torch import _transformers

    return _transformers.layer(
        __name__,
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    )


def _by_level(value, value_spatial_shapes, sampling_locations, attention_weights):
    from mlx_deform.torch import _transformers

    return _transformers.by_level(
        __name__, value, value_spatial_shapes, sampling_locations, attention_weights
    )


def _in_a_row(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
):
    from mlx_deform.torch import _transformers

    return _transformers.in_a_row(
        __name__,
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        method,
    )


CODE = {LAYER: _layer, BY_LEVEL: _by_level, IN_A_ROW: _in_a_row}


def layer(module, self, value, *rest):
    if value.device.type not in DEVICES:
        return _originals[module](self, value, *rest)
    return MultiScaleDeformableAttention.forward(self, value, *rest)


def by_level(module, value, *rest):
    if value.device.type not in DEVICES:
        return _originals[module](value, *rest)
    return multi_scale_deformable_attention(value, *rest)


def in_a_row(module, value, shapes, locations, weights, points, method):
    if value.device.type not in DEVICES:
        return _originals[module](value, shapes, locations, weights, points, method)
    if method == "default":
        method = "bilinear"
    elif method == "discrete":
        # Where optimizers find no gradient, they leave a parameter alone; zeros they don't.
        locations = locations.detach()
    return multi_scale_deformable_attention(
        value, shapes, locations, weights, points=points, method=method
    )


# ---------------------------------------------------------------------------
# The patch

# By the name of the model's module: what computes there without a patch.
_originals: dict[str, Callable] = {}


def _functions() -> list[types.FunctionType]:
    """Those of the models that this transformers has."""
    try:
        import transformers
    except ImportError:
        raise RuntimeError("[patch_transformers] transformers is not installed") from None
    found = []
    for model, name in MODELS.items():
        path = f"transformers.models.{model}.modeling_{model}"
        try:
            function = getattr(importlib.import_module(path), name)
        except (ModuleNotFoundError, AttributeError):
            continue  # of another version
        function = function.forward if name == LAYER else function
        if list(inspect.signature(function).parameters) == list(
            inspect.signature(CODE[name]).parameters
        ):
            found.append(function)
        else:
            warnings.warn(
                f"[patch_transformers] {path}.{name} of transformers {transformers.__version__} "
                "is called in a way that is not known, and stays as it is",
                stacklevel=4,
            )
    if not found:
        raise RuntimeError(
            "[patch_transformers] found no model to patch; got transformers "
            f"{transformers.__version__}"
        )
    return found


def _name(function: types.FunctionType) -> str:
    return LAYER if function.__qualname__ == f"{LAYER}.forward" else function.__name__


class patch_transformers(Patch):
    """Lets MLX compute the multi-scale deformable attention of transformers' models, for
    tensors on the CPU and on MPS.

    As a plain call it holds until :meth:`undo`, as a context manager to the end of the block.
    It reaches Deformable DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, Grounding DINO (also MM),
    OmDet-Turbo, LW-DETR, RF-DETR, PP-DocLayout (V2 to V4), Mask2Former and OneFormer, on all
    threads, whether a model was made before or is made within. Tensors on other devices are
    transformers' as before. A compiled model may keep what computed in it when it was compiled,
    until ``torch.compiler.reset()``.

    Results are those of :func:`mlx_deform.torch.multi_scale_deformable_attention`: they have
    the type of the values that are sampled, and coordinates and sums are float32 at least.

    Raises:
        RuntimeError: If transformers is not installed, or none of these models is in it.

    Example:
        >>> import torch, transformers
        >>> from mlx_deform.torch import patch_transformers
        >>> from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention
        >>> layer = MultiScaleDeformableAttention()  # one of a model
        >>> value, locations = torch.randn(1, 6, 2, 4), torch.rand(1, 5, 2, 1, 3, 2)
        >>> weights = torch.rand(1, 5, 2, 1, 3)
        >>> with patch_transformers():
        ...     y = layer(value, None, [(2, 3)], None, locations, weights, 64)
    """

    _patched: ClassVar[list[types.FunctionType]] = []

    @classmethod
    def _start(cls) -> None:
        cls._patched = _functions()
        for function in cls._patched:
            original = types.FunctionType(
                function.__code__,
                function.__globals__,
                function.__name__,
                function.__defaults__,
            )
            _originals[function.__module__] = original
            function.__code__ = CODE[_name(function)].__code__

    @classmethod
    def _end(cls) -> None:
        for function in cls._patched:
            function.__code__ = _originals[function.__module__].__code__
        cls._patched = []
