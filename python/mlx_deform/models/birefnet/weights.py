"""Checkpoints: the official ones of PyTorch, and MLX's own."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...nn import load_torch_weights
from ...nn.checkpoints import read_checkpoint, unwrapped
from .config import BACKBONES, BiRefNetConfig, SwinConfig, config_of
from .model import BiRefNet

TAG = "[BiRefNet]"

# By backbone: the model that weights are taken for.
PUBLISHED = {
    "swin_v1_l": "BiRefNet",
    "swin_v1_t": "BiRefNet_lite",
    "swin_v1_s": "swin_s",
    "swin_v1_b": "swin_b",
}

# In the metadata of a file that save_weights wrote: its configuration.
CONFIG = "birefnet_config"


def backbone_of(state: Mapping[str, Any]) -> str | None:
    """The name of the backbone whose weights a state dict holds; None if it isn't known."""
    projection = state.get("bb.patch_embed.proj.weight")
    blocks = {
        match[1] for name in state if (match := re.match(r"bb\.layers\.2\.blocks\.(\d+)\.", name))
    }
    sizes = (len(projection) if projection is not None else 0, len(blocks))
    found = [name for name, b in BACKBONES.items() if (b.channels, b.depths[2]) == sizes]
    return found[0] if found else None


def load_weights(
    model: BiRefNet, weights: Mapping[str, Any] | str | os.PathLike, strict: bool = True
) -> BiRefNet:
    """Loads an official checkpoint, or one that :func:`save_weights` wrote, into a model.

    Args:
        model (BiRefNet): The model that receives the weights.
        weights (dict, str or path): A PyTorch state dict, or the path of a ``.pth`` file (read
            without executing what it holds) or of a ``.safetensors`` file. Names may begin with
            ``module.`` or ``_orig_mod.``.
        strict (bool): As of :func:`mlx_deform.nn.load_torch_weights`. Default: ``True``.

    Returns:
        BiRefNet: The model. Types are those of the checkpoint; see :meth:`BiRefNet.set_dtype`.

    Raises:
        ValueError: If the weights are another backbone's, or names are missing or unexpected, or
            shapes don't fit; the message gives them. The model is then unchanged.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from mlx_deform.models.birefnet import BiRefNet, config_of, load_weights
        >>> model = BiRefNet(config_of("BiRefNet_lite"))
        >>> load_weights(model, "model.safetensors")  # doctest: +SKIP
    """
    return _load(model, *_read(weights), strict)


def _load(
    model: BiRefNet, state: Mapping[str, Any], config: BiRefNetConfig | None, strict: bool = True
) -> BiRefNet:
    """config: what save_weights wrote beside the state; without one, the state is PyTorch's."""
    found = backbone_of(state)
    if found and BACKBONES[found] != model.config.backbone:
        raise ValueError(
            f"{TAG} weights must be of a model with {model.config.backbone_name}; got those of "
            f"{found}, the backbone of {PUBLISHED[found]}"
        )
    if config is not None:
        model.load_weights(list(state.items()), strict=strict)
    else:
        load_torch_weights(model, state, strict=strict)
    mx.eval(model.parameters())
    return model


def save_weights(model: BiRefNet, path: str | os.PathLike) -> None:
    """Writes the weights as MLX has them, with the model's configuration, to ``.safetensors``.

    Args:
        model (BiRefNet): The model.
        path (str or path): The file, which :func:`load_model` reads.

    Raises:
        ValueError: If the name doesn't end in ``.safetensors``.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{TAG} path must end in .safetensors; got {str(path)!r}")
    metadata = {"format": "mlx", CONFIG: json.dumps(asdict(model.config))}
    mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())), metadata)


def _read(weights: Any) -> tuple[dict[str, Any], BiRefNetConfig | None]:
    """The state dict, and the configuration that save_weights wrote beside it."""
    state = unwrapped(read_checkpoint(weights))
    if not isinstance(weights, str | os.PathLike) or Path(weights).suffix != ".safetensors":
        return state, None
    text = mx.load(str(weights), return_metadata=True)[1].get(CONFIG)
    return state, None if text is None else _parse_config(text)


def _parse_config(text: str) -> BiRefNetConfig:

    def with_tuples(fields):
        return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}

    try:
        fields = json.loads(text)
        backbone = SwinConfig(**with_tuples(fields.pop("backbone")))
        return BiRefNetConfig(backbone=backbone, **with_tuples(fields))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{TAG} a file's {CONFIG} must be one; got {text!r}: {error}") from None


def load_model(
    weights: str | os.PathLike,
    name: str | None = None,
    *,
    dtype: mx.Dtype = mx.float32,
    patch_order: str | None = None,
) -> BiRefNet:
    """A model for inference, from a file.

    Args:
        weights (str or path): An official checkpoint, or a file of :func:`save_weights`.
        name (str): The model's name, as of :func:`config_of`. Default: what
            :func:`save_weights` wrote, else the published model that has the checkpoint's
            backbone, ``"BiRefNet"`` or ``"BiRefNet_lite"``.
        dtype (Dtype): The type to compute in: float32, float16 or bfloat16. Batch
            normalisation stays float32. Default: ``float32``.
        patch_order (str): Another than the model's; see :class:`BiRefNetConfig`.

    Returns:
        BiRefNet: The model, in evaluation mode.

    Raises:
        ValueError, FileNotFoundError: As of :func:`load_weights`.

    Example:
        >>> from mlx_deform.models.birefnet import load_model
        >>> model = load_model("model.safetensors", "RMBG-2.0")  # doctest: +SKIP
    """
    state, saved = _read(weights)
    if name is not None:
        config = config_of(name)
    else:
        config = saved or config_of(PUBLISHED.get(backbone_of(state), "BiRefNet"))
    if patch_order is not None:
        config = replace(config, patch_order=patch_order)
    model = BiRefNet(config)
    _load(model, state, saved)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model
