"""Derivatives, vmap and autocast of the operators of `_ops`."""

import torch
from torch import Tensor

from . import _ops
from ._bridge import DEVICES
from ._functions import fold, library, register_derivatives, unfold

# The output is linear in the bias, whose value matters to no derivative.
register_derivatives(
    _ops.NAME,
    is_saved=[name != "bias" for name in _ops.ARGUMENTS],
    zero_gradient=lambda input, offset, weight, mask: weight.new_zeros(weight.shape[0]),
)


# ---------------------------------------------------------------------------
# vmap


def _one_by_one(operator):
    def rule(info, dims, *arguments):
        def pick(argument, dim, i):
            mapped = isinstance(argument, Tensor) and dim is not None
            return argument.select(dim, i) if mapped else argument

        def sample(i):
            return [pick(*pair, i) for pair in zip(arguments, dims, strict=True)]

        results = [operator(*sample(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(each) for each in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


_forward_one_by_one = _one_by_one(_ops.deform_conv2d)


def _forward_vmap(info, dims, input, offset, weight, bias, mask, *geometry):
    if dims[2] is not None or dims[3] is not None:
        return _forward_one_by_one(info, dims, input, offset, weight, bias, mask, *geometry)

    # One weight for all: more images of one batch.
    size = info.batch_size
    input, offset, mask = (
        fold(tensor, dim, size)
        for tensor, dim in ((input, dims[0]), (offset, dims[1]), (mask, dims[4]))
    )
    return unfold(_ops.deform_conv2d(input, offset, weight, bias, mask, *geometry), size), 0


# The gradients of a weight must not be summed over vmap's axis.
for _operator, _rule in (
    (_ops.deform_conv2d, _forward_vmap),
    (_ops.backward, _one_by_one(_ops.backward)),
    (_ops.double_backward, _one_by_one(_ops.double_backward)),
):
    torch.library.register_vmap(_operator, _rule, lib=library)


# ---------------------------------------------------------------------------
# autocast


def _autocast(device: str):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def rule(input, offset, weight, bias, mask, *geometry):
        """torchvision's result has the type of its input, computed in float32. So does this
        one's, whose sums and coordinates are float32 also where the input is a half."""

        def value(tensor):
            return None if tensor is None else tensor.to(input.dtype)

        def plan(tensor):
            kept = tensor is None or tensor.dtype in (input.dtype, torch.float32)
            return tensor if kept else tensor.to(torch.float32)

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _ops.deform_conv2d(
                input, plan(offset), value(weight), value(bias), plan(mask), *geometry
            )

    return rule


for _device in DEVICES:
    library.impl("deform_conv2d", _autocast(_device), f"Autocast{_device.upper()}")
