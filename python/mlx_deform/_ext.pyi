from collections.abc import Sequence

import mlx.core

_isa: str

def _borrow(address: int, shape: Sequence[int], dtype: mlx.core.Dtype) -> mlx.core.array: ...
def _isas() -> list[str]: ...
def _set_portable(value: bool) -> bool: ...
def _transpose(
    from_: int, to: int, count: int, rows: int, columns: int, element_bytes: int
) -> None: ...
def deform_conv2d(
    input: mlx.core.array,
    offset: mlx.core.array,
    weight: mlx.core.array,
    bias: mlx.core.array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: mlx.core.array | None = None,
    *,
    stream: mlx.core.Stream | mlx.core.Device | mlx.core.DeviceType | None = None,
) -> mlx.core.array: ...
def deform_im2col(
    input: mlx.core.array,
    offset: mlx.core.array,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: mlx.core.array | None = None,
    *,
    stream: mlx.core.Stream | mlx.core.Device | mlx.core.DeviceType | None = None,
) -> mlx.core.array: ...
def multi_scale_deformable_attention(
    value: mlx.core.array,
    spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: mlx.core.array,
    attention_weights: mlx.core.array,
    *,
    points: Sequence[int] | None = None,
    method: str = "bilinear",
    stream: mlx.core.Stream | mlx.core.Device | mlx.core.DeviceType | None = None,
) -> mlx.core.array: ...
