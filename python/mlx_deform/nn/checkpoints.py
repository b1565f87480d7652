"""PyTorch's checkpoints into MLX's modules: other names, other layouts, the same numbers.

One function per kind of layer says where each parameter stands in a checkpoint; what is read,
checked and reported is the same for all.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .layers import DeformConv2d, ModulatedDeformConv2d

TAG = "[load_torch_weights]"

# Of files: the first MLX reads, the others are what torch.save writes.
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# What data-parallel training and torch.compile put in front of every name.
WRAPPERS = ("module.", "_orig_mod.")

# Names listed of those that don't fit.
SHOWN = 8

# Buffers of PyTorch's that hold no weights.
IGNORED = (
    "num_batches_tracked",
    "relative_position_index",
    "n_points_scale",  # of RT-DETRv2's attention: 1 / points
    "num_points_scale",  # of D-FINE's, and of the official RT-DETRv2's
    "anchors",  # of the official RT-DETRv2 and D-FINE: for one size of pictures
    "valid_mask",
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """An array of the checkpoint, and how it is laid out there.

    names: what it may be called after the name of its layer; a checkpoint has one of them. One
        that begins with "_" continues the layer's own name: "_offset.weight" stands beside it.
    shape: PyTorch's.
    channels_axis: the axis that is MLX's last one; None where the layouts are the same.
    """

    names: tuple[str, ...]
    shape: Shape
    channels_axis: int | None = None

    def to_mlx(self, array: mx.array) -> mx.array:
        return array if self.channels_axis is None else mx.moveaxis(array, self.channels_axis, -1)

    def to_torch(self, array: mx.array) -> mx.array:
        return array if self.channels_axis is None else mx.moveaxis(array, -1, self.channels_axis)


# By the name of the parameter in its layer: the arrays that make it, joined along axis 0.
Sources = dict[str, tuple[Source, ...]]


def _convolution(names: tuple[str, ...], shape: Shape) -> Source:
    """The weight of a convolution: (O, *kernel, I) here, (O, I, *kernel) in PyTorch."""
    return Source(names, (shape[0], shape[-1], *shape[1:-1]), channels_axis=1)


def _transposed_convolution(names: tuple[str, ...], shape: Shape) -> Source:
    """That of a transposed convolution: (O, *kernel, I) here, (I, O, *kernel) in PyTorch."""
    return Source(names, (shape[-1], *shape[:-1]), channels_axis=0)


# ---------------------------------------------------------------------------
# Layers


def _as_it_is(layer: nn.Module) -> Sources:
    """The parameters that the module itself holds, with no other layout in PyTorch."""
    own = tree_flatten(dict(layer), is_leaf=nn.Module.is_module)
    return {
        name: (Source((name,), value.shape),)
        for name, value in own
        if isinstance(value, mx.array) and not name.startswith("_")
    }


def _conv(layer: nn.Module, weight: Callable = _convolution) -> Sources:
    return {**_as_it_is(layer), "weight": (weight(("weight",), layer.weight.shape),)}


def _modulated_deform_conv2d(layer: ModulatedDeformConv2d, has: Callable[[str], bool]) -> Sources:
    """mmcv: conv_offset; mps-deform-conv: offset_conv; BiRefNet: three convolutions; detectron2
    and the detectors of before mmcv: conv2_offset beside conv2.

    has: whether the checkpoint has an array of that name for this layer.
    """
    weight = _convolution(("weight", "regular_conv.weight"), layer.weight.shape)
    sources = {"weight": (weight,)}
    if "bias" in layer:
        sources["bias"] = (Source(("bias", "regular_conv.bias"), layer.bias.shape),)

    split = layer.mask and has("modulator_conv.weight")
    for name, build in (("weight", _convolution), ("bias", Source)):
        channels, *rest = layer.offset_conv[name].shape
        predictors = ("offset_conv", "conv_offset", "conv_offset_mask", "_offset")
        names = tuple(f"{predictor}.{name}" for predictor in predictors)
        if split:
            offset = build(names, (channels // 3 * 2, *rest))
            mask = build((f"modulator_conv.{name}",), (channels // 3, *rest))
            sources[f"offset_conv.{name}"] = (offset, mask)
        else:
            sources[f"offset_conv.{name}"] = (build(names, (channels, *rest)),)
    return sources


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, DeformConv2d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _sources(layer: nn.Module, has: Callable[[str], bool]) -> Sources:
    if isinstance(layer, ModulatedDeformConv2d):
        return _modulated_deform_conv2d(layer, has)
    if isinstance(layer, CONVOLUTIONS):
        return _conv(layer)
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        return _conv(layer, _transposed_convolution)
    return _as_it_is(layer)


def _walk(value: Any, path: str, torch_path: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Every module with its name in MLX and in PyTorch, each ending in a dot unless empty."""
    if isinstance(value, nn.Module):
        yield value, path, torch_path
        if isinstance(value, ModulatedDeformConv2d):
            return  # its offset_conv has names of its own in every checkpoint
        children = value.children()
        if isinstance(value, nn.Sequential):  # PyTorch numbers them without "layers"
            yield from _walk(children["layers"], f"{path}layers.", torch_path)
            return
    elif isinstance(value, dict):
        children = value
    elif isinstance(value, list | tuple):
        children = dict(enumerate(value))
    else:
        return
    for name, child in children.items():
        yield from _walk(child, f"{path}{name}.", f"{torch_path}{name}.")


# ---------------------------------------------------------------------------
# Checkpoints


def to_mlx(name: str, value: Any) -> mx.array:
    """An array, or a tensor of PyTorch's, as MLX's; ``name`` is for the error."""
    if isinstance(value, mx.array):
        return value
    if hasattr(value, "detach"):  # a torch.Tensor, without importing torch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # not a type of NumPy; float32 holds its values
            return mx.array(value.float().numpy()).astype(mx.bfloat16)
        value = value.numpy()
    if not hasattr(value, "__array__"):
        raise ValueError(f"{TAG} {name!r} must be an array or a tensor; got {type(value).__name__}")
    return mx.array(value)


def read_checkpoint(weights: Any) -> Mapping[str, Any]:
    if isinstance(weights, str | os.PathLike):
        path = Path(weights)
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"{TAG} a file must be a {', '.join(SUFFIXES)} file; got {str(path)!r}"
            )
        if not path.is_file():
            raise FileNotFoundError(f"{TAG} there is no file {str(path)!r}")
        try:
            if path.suffix == ".safetensors":
                return mx.load(str(path))
            from .torch_files import read_torch_file  # only this needs NumPy

            return read_torch_file(path)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{TAG} a file must hold what its name says; got {str(path)!r}: {error}"
            ) from None
    if isinstance(weights, Mapping):
        return weights
    raise ValueError(
        f"{TAG} weights must be a state dict or the path of a file; got {type(weights).__name__}"
    )


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with ``module.`` and ``_orig_mod.`` taken off the front of its names."""

    def bare(name):
        for wrapper in WRAPPERS * 2:
            name = name.removeprefix(wrapper)
        return name

    return {bare(name): array for name, array in state.items()}


class _Checkpoint:
    """The arrays under a prefix, of which it is known which were asked for."""

    def __init__(self, arrays: Mapping[str, Any], prefix: str):
        self.arrays = arrays
        self.prefix = prefix if prefix == "" or prefix.endswith(".") else f"{prefix}."
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def has(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def take(self, layer: str, source: Source) -> mx.array | None:
        names = [_joined(self.prefix + layer, name) for name in source.names]
        found = [name for name in names if name in self.arrays]
        if len(found) > 1:
            raise ValueError(f"{TAG} a parameter must have one name; got {' and '.join(found)}")
        if not found:
            self.missing.append(names[0])
            return None
        self.used.add(found[0])
        array = to_mlx(found[0], self.arrays[found[0]])
        if tuple(array.shape) != tuple(source.shape):
            self.misshapen.append(
                f"{found[0]!r} must have shape {tuple(source.shape)}; got {tuple(array.shape)}"
            )
            return None
        return source.to_mlx(array)

    def check(self, strict: bool) -> None:
        """Raises an error that tells of everything that doesn't fit."""
        wrong = self.misshapen[:SHOWN]
        if len(self.misshapen) > SHOWN:
            wrong.append(f"{len(self.misshapen) - SHOWN} more shapes")
        unexpected = self.unexpected()
        if strict and (self.missing or unexpected):
            under = f" under {self.prefix[:-1]!r}" if self.prefix else ""
            wrong.append(
                f"names must be those of the model{under}; got missing: {_listed(self.missing)}; "
                f"unexpected: {_listed(unexpected)}"
            )
        if wrong:
            raise ValueError(f"{TAG} {'; '.join(wrong)}")

    def unexpected(self) -> list[str]:
        return [
            name
            for name in self.arrays
            if name.startswith(self.prefix)
            and name not in self.used
            and name.rsplit(".", 1)[-1] not in IGNORED
        ]


def _joined(layer: str, name: str) -> str:
    return (layer.removesuffix(".") if name.startswith("_") else layer) + name


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return shown + more if names else "none"


def load_torch_weights(
    model: nn.Module,
    weights: Mapping[str, Any] | str | os.PathLike,
    prefix: str = "",
    strict: bool = True,
) -> nn.Module:
    """Loads a PyTorch checkpoint into a layer, or a model, built with MLX.

    The modules of the model must be named as in PyTorch (the ``layers`` of an
    :class:`mlx.nn.Sequential` apart, which PyTorch doesn't name). Then

    * :class:`mlx_deform.nn.DeformConv2d` takes the weights of torchvision's and mmcv's
      ``DeformConv2d``;
    * :class:`mlx_deform.nn.ModulatedDeformConv2d` takes those of mmcv's
      ``ModulatedDeformConv2dPack`` (``weight``, ``bias``, ``conv_offset``), of the package
      mps-deform-conv's ``ModulatedDeformConv2d`` (``weight``, ``bias``, ``offset_conv``), of
      BiRefNet's ``DeformableConv2d`` (``regular_conv``, ``offset_conv``, ``modulator_conv``;
      its layer has ``mask_scale=2``), of detectron2's and older detectors' (``conv2.weight``
      with ``conv2_offset`` beside it), and with ``mask=False`` of mmcv's ``DeformConv2dPack``;
    * :class:`mlx_deform.nn.MultiScaleDeformableAttention` takes those of the modules of the
      official code, of mmcv and of transformers, which all name them as it does;
    * the convolutions of :mod:`mlx.nn`, also the transposed ones, take theirs;
    * any other array is copied as it is; linear, embedding and normalisation layers need no
      more. Buffers that hold no weights, such as ``num_batches_tracked``, are left out.

    Args:
        model (mlx.nn.Module): The model, or a single layer, that receives the weights.
        weights (dict, str or path): A state dict, of torch tensors, NumPy or MLX arrays, or the
            path of a ``.safetensors`` file, or of one that ``torch.save`` wrote (``.pth``,
            ``.pt``, ``.bin``), which is read without PyTorch and without executing what it
            holds. Weights are ``(O, I / groups, kH, kW)``, as PyTorch
            has them. Types are kept; float64 becomes float32.
        prefix (str): The name of the model in the checkpoint, such as
            ``"backbone.layer4.0.conv2"``; names without it are left alone. Default: ``""``.
        strict (bool): If ``True``, every parameter must be in the checkpoint, and every array
            under the prefix in the model. If ``False``, parameters that the checkpoint lacks
            stay as they are, and arrays that the model lacks are left out; shapes must fit
            nevertheless. Default: ``True``.

    Returns:
        mlx.nn.Module: The model.

    Raises:
        ValueError: If names are missing or unexpected, or a shape doesn't fit; the message
            gives them. The model is then unchanged.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from mlx_deform.nn import ModulatedDeformConv2d, load_torch_weights
        >>> layer = ModulatedDeformConv2d(
        ...     64, 256, kernel_size=7, padding=3, bias=False, mask_scale=2
        ... )
        >>> load_torch_weights(  # doctest: +SKIP
        ...     layer,
        ...     "birefnet.safetensors",
        ...     prefix="decoder.decoder_block1.dec_att.aspp_deforms.2.atrous_conv",
        ... )

    References:
        The layers of torchvision (``torchvision.ops``), mmcv (``mmcv.ops``), mps-deform-conv,
        transformers, Deformable DETR (``models/ops``) and BiRefNet (Zheng et al., "Bilateral
        Reference for High-Resolution Dichotomous Image Segmentation", arXiv:2401.03407).
    """
    checkpoint = _Checkpoint(read_checkpoint(weights), prefix)
    loaded: list[tuple[str, mx.array]] = []
    for layer, path, torch_path in _walk(model, "", ""):
        sources = _sources(layer, lambda name, at=torch_path: checkpoint.has(at + name))
        for name, parts in sources.items():
            arrays = [checkpoint.take(torch_path, part) for part in parts]
            if all(array is not None for array in arrays):
                joined = mx.concatenate(arrays) if len(arrays) > 1 else arrays[0]
                loaded.append((path + name, joined))
    checkpoint.check(strict)
    _warn_of_mask_scales(model, checkpoint)
    return model.load_weights(loaded, strict=strict)


def torch_weights(model: nn.Module) -> dict[str, mx.array]:
    """The model's arrays by PyTorch's names and in its layouts, as loading takes them."""
    state = {}
    for layer, _, torch_path in _walk(model, "", ""):
        parameters = dict(tree_flatten(dict(layer)))
        for name, (source, *_) in _sources(layer, lambda _: False).items():
            state[torch_path + source.names[0]] = source.to_torch(parameters[name])
    return state


def _warn_of_mask_scales(model: nn.Module, checkpoint: _Checkpoint) -> None:
    # BiRefNet's mask reaches 2, which its checkpoints don't say.
    for layer, _, torch_path in _walk(model, "", ""):
        if (
            isinstance(layer, ModulatedDeformConv2d)
            and checkpoint.has(f"{torch_path}modulator_conv.weight")
            and layer.mask_scale == 1
        ):
            name = f"{checkpoint.prefix}{torch_path}modulator_conv"
            warnings.warn(
                f"{TAG} {name} is named as in BiRefNet, whose mask is 2 * sigmoid; "
                "this layer has mask_scale=1",
                stacklevel=3,
            )
