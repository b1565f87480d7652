"""The attention of transformers' detectors, computed by MLX for as long as one likes."""

import importlib
import threading

from ._bridge import DEVICES
from ._msda import MultiScaleDeformableAttention, multi_scale_deformable_attention

# Models whose modelling module has a layer MultiScaleDeformableAttention.
LAYERS = (
    "deformable_detr",
    "grounding_dino",
    "lw_detr",
    "mm_grounding_dino",
    "omdet_turbo",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "rf_detr",
    "rt_detr",
)
# And whose has a function of this name, which it calls.
FUNCTIONS = {
    "mask2former": "multi_scale_deformable_attention",
    "oneformer": "multi_scale_deformable_attention",
    "rt_detr_v2": "multi_scale_deformable_attention_v2",
}
# And whose layers, of this name, hold such a function.
HOLDERS = {
    "d_fine": "DFineMultiscaleDeformableAttention",
    "deimv2": "Deimv2MultiscaleDeformableAttention",
}
HELD = "ms_deformable_attn_core"

_lock = threading.Lock()
_patches = 0
_undo: list = []


def _layer_forward(original):
    core = MultiScaleDeformableAttention()

    def forward(self, value, *arguments, **named):
        if value.device.type not in DEVICES:
            return original(self, value, *arguments, **named)
        return core.forward(value, *arguments, **named)

    return forward


def _function(original):
    def attention(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list=None,
        method="default",
    ):
        if value.device.type not in DEVICES:
            more = () if num_points_list is None else (num_points_list, method)
            return original(
                value, value_spatial_shapes, sampling_locations, attention_weights, *more
            )
        return multi_scale_deformable_attention(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            points=num_points_list,
            method="discrete" if method == "discrete" else "bilinear",
        )

    return attention


class _Held:
    """What an instance holds, replaced from the class: layers that exist already hold it too."""

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        return _function(layer.__dict__[HELD])

    def __set__(self, layer, value):
        layer.__dict__[HELD] = value


def _replace(owner, name: str, value) -> None:
    missing = object()
    before = vars(owner).get(name, missing)

    def undo():
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, value)
    _undo.append(undo)


def _override() -> None:
    try:
        import transformers
    except ImportError:
        raise RuntimeError("[patch_transformers] transformers is not installed") from None

    def modelling(model):
        name = f"{transformers.__name__}.models.{model}.modeling_{model}"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            return None  # a version without this model

    for model in LAYERS:
        layer = getattr(modelling(model), "MultiScaleDeformableAttention", None)
        if layer is not None:
            _replace(layer, "forward", _layer_forward(layer.forward))
    for model, name in FUNCTIONS.items():
        module = modelling(model)
        if hasattr(module, name):
            _replace(module, name, _function(getattr(module, name)))
    for model, name in HOLDERS.items():
        layer = getattr(modelling(model), name, None)
        if layer is not None:
            _replace(layer, HELD, _Held())


class patch_transformers:
    """Lets MLX compute the multi-scale deformable attention of transformers' models.

    Of Deformable DETR, DINO's and RT-DETR's families, D-FINE, Grounding DINO, OmDet-Turbo,
    RF-DETR, LW-DETR, PP-DocLayout, Mask2Former and OneFormer, for tensors on the CPU and on MPS;
    those on other devices are computed as before. As a plain call it holds until :meth:`undo`,
    as a context manager to the end of the block. It replaces what the models' modules call, so
    models that exist already are reached too. Where the layer is mapped to a kernel of the hub
    by ``kernelize``, that kernel stays.

    Raises:
        RuntimeError: If transformers is not installed.

    Example:
        >>> from mlx_deform.torch import patch_transformers
        >>> with patch_transformers():
        ...     outputs = model(pixel_values=pixels)
    """

    def __init__(self):
        global _patches
        self._active = True
        with _lock:
            if _patches == 0:
                _override()
            _patches += 1

    def undo(self) -> None:
        """Gives the models their own code back, unless another patch still holds."""
        global _patches
        with _lock:
            if not self._active:
                return
            self._active = False
            _patches -= 1
            if _patches == 0:
                while _undo:
                    _undo.pop()()

    def __enter__(self) -> "patch_transformers":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()
