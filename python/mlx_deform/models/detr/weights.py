"""Checkpoints: those of the hub and of the official repositories, and folders that
:func:`save_model` writes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...nn import load_torch_weights
from ...nn.checkpoints import read_checkpoint, torch_weights, unwrapped
from .config import DetectorConfig
from .detector import Detector
from .families import FAMILIES, model_of, model_type_of
from .preprocessing import FILE as PROCESSOR
from .preprocessing import read_processor

TAG = "[detr]"

# In a folder.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OTHER_WEIGHTS = ("pytorch_model.bin",)


def weights_file(path: str | os.PathLike) -> Path:
    """The file of weights in a folder; a file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (WEIGHTS, *OTHER_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{TAG} there is no {WEIGHTS} in {str(path)!r}")


def read_config(path: str | os.PathLike) -> DetectorConfig:
    """The configuration in a ``config.json``.

    Args:
        path (str or path): The file, or the folder that it is in.

    Raises:
        ValueError: If it holds none of a family that is known.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    path = path / CONFIG if path.is_dir() else path
    try:
        settings = json.loads(path.read_text())
        model_type = settings["model_type"]
        family = FAMILIES[model_type]
    except (KeyError, TypeError, ValueError) as error:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{TAG} a {CONFIG} must have a model_type of {known}; got {str(path)!r}: {error}"
        ) from None
    try:
        return family.config.from_json(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{TAG} {str(path)!r} must hold a configuration: {error}") from None


def load_weights(
    model: Detector, weights: Mapping[str, Any] | str | os.PathLike, strict: bool = True
) -> Detector:
    """Loads a checkpoint into a model: of the hub, of an official repository, or a saved one.

    Args:
        model (Detector): The model that receives the weights.
        weights (dict, str or path): A PyTorch state dict; the path of a ``.safetensors`` file or
            of a ``.bin`` or ``.pth`` file (read without executing what it holds); or a folder
            with one. Names are those of the hub's files, which :func:`save_model` writes too, of
            transformers 5's modules, or of the official repositories: lyuwenyu/RT-DETR (in
            PyTorch, with a ResNet), Peterande/D-FINE and fundamentalvision/Deformable-DETR.
        strict (bool): As of :func:`mlx_deform.nn.load_torch_weights`. Default: ``True``.

    Returns:
        Detector: The model. Types are those of the checkpoint; see :meth:`Detector.set_dtype`.

    Raises:
        ValueError: If names are missing or unexpected, or shapes don't fit; the message gives
            them. The model is then unchanged.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from mlx_deform.models.detr import RTDETR, config_of, load_weights
        >>> model = RTDETR(config_of("rtdetr_r18vd"))
        >>> load_weights(model, "rtdetr_r18vd/model.safetensors")  # doctest: +SKIP
    """
    state = _read(weights)
    names = FAMILIES[model.config.model_type].names
    load_torch_weights(model, names(state), strict=strict)
    mx.eval(model.parameters())
    return model


def _read(weights: Any) -> dict[str, Any]:
    if isinstance(weights, str | os.PathLike):
        weights = weights_file(weights)
    return unwrapped(read_checkpoint(weights))


def load_model(
    path: str | os.PathLike,
    *,
    config: DetectorConfig | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Detector:
    """A model for inference, from a file of weights and the configuration beside it.

    Args:
        path (str or path): A folder with ``model.safetensors``, ``config.json`` and
            ``preprocessor_config.json``, as the hub and :func:`save_model` have them; or a file
            of weights, of those that :func:`load_weights` takes.
        config (DetectorConfig): The model's sizes. Default: those of the ``config.json`` in the
            same folder; without one, those that the shapes of the weights tell, with the
            published models' numbers of heads and queries, and sampling that isn't discrete.
        dtype (Dtype): The type to compute in: float32, float16 or bfloat16. Batch normalisation
            and boxes stay float32. Default: ``float32``.

    Returns:
        Detector: The model, in evaluation mode.

    Raises:
        ValueError, FileNotFoundError: As of :func:`load_weights`.

    Example:
        >>> from mlx_deform.models.detr import load_model
        >>> model = load_model("rtdetr_r18vd/model.safetensors")  # doctest: +SKIP
    """
    file = weights_file(path)
    state = _read(file)
    beside = file.parent / CONFIG
    if config is None:
        config = read_config(beside) if beside.is_file() else inferred_config(state)
    model = model_of(config)
    model.processor = read_processor(file.parent, config.model_type)
    load_weights(model, state)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def inferred_config(state: Mapping[str, Any]) -> DetectorConfig:
    """The configuration that the names and shapes of a checkpoint tell.

    Raises:
        ValueError: If it isn't a checkpoint of a known family.
    """
    family = FAMILIES[model_type_of(state)]
    try:
        return family.inferred(family.names(state))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{TAG} weights without a {CONFIG} must be of a known family; {error} doesn't fit"
        ) from None


def save_model(model: Detector, folder: str | os.PathLike) -> None:
    """Writes a model as the hub has it, for :func:`load_model` and for transformers.

    Args:
        model (Detector): The model.
        folder (str or path): Where ``model.safetensors``, ``config.json`` and
            ``preprocessor_config.json`` go; it is made if there is none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / WEIGHTS), torch_weights(model), {"format": "pt"})
    for name, settings in ((CONFIG, model.config), (PROCESSOR, model.processor)):
        (folder / name).write_text(json.dumps(settings.to_json(), indent=2) + "\n")
