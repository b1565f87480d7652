"""Files that `torch.save` wrote, read without PyTorch and without running what they hold.

Such a file is a zip archive: `data.pkl` describes objects in Python's pickle format, and
`data/<key>` holds the bytes of each storage (torch/serialization.py). A pickle may call any
function it names; here it may name a dozen, which build tensors and dictionaries.
"""

import collections
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np


class TorchFileError(ValueError):
    """The file isn't what `torch.save` writes for a state dict."""


# By the name of the storage's class: how NumPy sees its elements, and what MLX calls them where
# NumPy has no such type.
STORAGES = {
    "DoubleStorage": ("<f8", None),
    "FloatStorage": ("<f4", None),
    "HalfStorage": ("<f2", None),
    "BFloat16Storage": ("<u2", mx.bfloat16),
    "LongStorage": ("<i8", None),
    "IntStorage": ("<i4", None),
    "ShortStorage": ("<i2", None),
    "CharStorage": ("<i1", None),
    "ByteStorage": ("<u1", None),
    "BoolStorage": ("|b1", None),
}


@dataclass(frozen=True)
class _StorageType:
    name: str


@dataclass(frozen=True)
class _Storage:
    elements: np.ndarray
    dtype: mx.Dtype | None


def _tensor(storage: _Storage, offset: int, shape, strides, *_) -> np.ndarray | mx.array:
    """torch._utils._rebuild_tensor_v2: a strided view of a storage."""
    shape, strides = tuple(shape), tuple(strides)
    sizes = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(strides)
        or not all(isinstance(size, int) and size >= 0 for size in sizes)
    ):
        raise TorchFileError("a tensor is malformed")
    elements = storage.elements
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    # A stride of 0 would repeat a few bytes without end.
    if 0 not in shape and (last >= len(elements) or math.prod(shape) > len(elements)):
        raise TorchFileError("a tensor reaches beyond its storage")
    if 0 in shape:
        view = np.empty(shape, elements.dtype)
    else:
        byte_strides = [stride * elements.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(elements[offset:], shape, byte_strides)
    array = np.ascontiguousarray(view).reshape(shape)
    return array if storage.dtype is None else mx.array(array).view(storage.dtype)


def _parameter(data, *_):
    """torch._utils._rebuild_parameter."""
    return data


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}data.pkl"), encoding="utf-8")
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name in ("OrderedDict", "Counter"):
            return getattr(collections, name)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in STORAGES:
            return _StorageType(name)
        raise TorchFileError(f"it names {module}.{name}, which a state dict has no use for")

    def persistent_load(self, key: Any) -> _Storage:
        try:
            kind, storage_type, name, _location, count = key
            numpy_type, dtype = STORAGES[storage_type.name]
            info = self.archive.getinfo(f"{self.root}data/{name}")
        except (AttributeError, KeyError, TypeError, ValueError):
            raise TorchFileError("a storage is malformed") from None
        size = np.dtype(numpy_type).itemsize * count
        if kind != "storage" or info.file_size != size or info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError("a storage is malformed")
        return _Storage(np.frombuffer(self.archive.read(info), numpy_type), dtype)


def read_torch_file(path: str | os.PathLike) -> Mapping[str, Any]:
    """Reads a state dict that ``torch.save`` wrote, without PyTorch.

    Nothing that the file holds is executed: its pickle may build tensors, numbers, strings,
    lists and dictionaries, and names of anything else are refused.

    Args:
        path (str or path): The file, as PyTorch 1.6 or later writes it.

    Returns:
        dict: The arrays by name, of NumPy, or of MLX where they are bfloat16; where the file
        holds more than a state dict (an optimizer, the epoch), the state dict in it, of those
        that it has the one averaged over the training (``"ema"``).

    Raises:
        ValueError: If the file is no such archive, is damaged, holds other objects, or holds no
            state dict.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from mlx_deform.nn.torch_files import read_torch_file
        >>> state = read_torch_file("model.pth")  # doctest: +SKIP
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = [name[: -len("data.pkl")] for name in names if name.endswith("data.pkl")]
            if len(roots) != 1:
                raise TorchFileError("an archive of torch.save holds one data.pkl")
            order = f"{roots[0]}byteorder"
            if order in names and archive.read(order) != b"little":
                raise TorchFileError("its bytes are in big-endian order")
            content = _Unpickler(archive, roots[0]).load()
    except zipfile.BadZipFile:
        raise TorchFileError(
            "it is no archive of torch.save (if PyTorch before 1.6 wrote it, load and save it "
            "with a newer one)"
        ) from None
    except (FileNotFoundError, TorchFileError):
        raise
    except Exception as error:  # a damaged pickle may raise whatever it likes
        raise TorchFileError(f"it is damaged ({type(error).__name__}: {error})") from None
    return _state_dict(content)


def _state_dict(content: Any) -> Mapping[str, Any]:
    """The dictionary of arrays in what a file holds: itself, or one of its entries.

    Weights averaged over the training, in "ema" or in its "module", come before the last ones.
    """

    def entries(value):
        return value.values() if isinstance(value, Mapping) else ()

    averaged = content.get("ema") if isinstance(content, Mapping) else None
    for candidate in (content, averaged, *entries(averaged), *entries(content)):
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(isinstance(value, np.ndarray | mx.array) for value in candidate.values())
        ):
            return candidate
    raise TorchFileError("it holds no state dict")
