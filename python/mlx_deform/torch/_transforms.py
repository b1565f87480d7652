"""Derivatives, vmap and autocast of the operators of `_ops`.

They are registered with the dispatcher, so that they hold wherever an operator is called: from
Python, in an exported graph, under `torch.func`. A plain autograd.Function around the operator
would be lost from exported graphs, and `torch.library.register_autograd` knows neither
`torch.func` nor forward mode.
"""

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from . import _ops
from ._bridge import DEVICES
from ._ops import library, only, spread


def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _below(operator, *arguments):
    """The operator at the next level of torch.func, if there is one, else on the device."""
    if not _in_transform():
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)
    # A Function's forward runs without gradients; the levels below want theirs.
    with (
        torch.enable_grad(),
        torch.autograd.forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return operator(*arguments)


def _apply(function: type, operator, *arguments):
    if _in_transform():
        # The dispatcher has peeled off one level of torch.func, which is this Function's.
        with enable_single_level_autograd_function():
            return function.apply(*arguments)
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    if torch.is_grad_enabled() or in_forward_mode:
        return function.apply(*arguments)
    return _below(operator, *arguments)


def _save(ctx, *tensors):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


_NO_MORE = "[deform_conv2d] has first and second derivatives alone"


class _Forward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, input, offset, weight, bias, mask, *geometry):
        _save(ctx, input, offset, weight, mask)
        ctx.geometry = geometry
        return _below(_ops.deform_conv2d, input, offset, weight, bias, mask, *geometry)

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:5]
        if grad is None:
            return (None,) * 8
        gradients = _ops.backward(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
        return (*spread(wanted, gradients), None, None, None)

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = (True, False, False, False, False)
        return _ops.double_backward(None, *ctx.saved_tensors, *tangents[:5], *ctx.geometry, wanted)[
            0
        ]


class _Backward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, grad, input, offset, weight, mask, *settings):
        _save(ctx, grad, input, offset, weight, mask)
        *ctx.geometry, ctx.wanted = settings
        return tuple(_below(_ops.backward, grad, input, offset, weight, mask, *settings))

    @staticmethod
    def backward(ctx, *cotangents):
        needs = ctx.needs_input_grad[:5]
        tangents = spread(ctx.wanted, cotangents)
        if all(tangent is None for tangent in tangents):
            return (None,) * 9
        gradients = _ops.double_backward(*ctx.saved_tensors, *tangents, *ctx.geometry, needs)
        return (*spread(needs, gradients), None, None, None, None)

    @staticmethod
    def jvp(ctx, t_grad, t_input, t_offset, t_weight, t_mask, *_):
        grad, *primals = ctx.saved_tensors
        tangents = (t_input, t_offset, t_weight, None, t_mask)
        sums = [None] * 5
        if t_grad is not None:
            terms = _ops.backward(t_grad, *primals, *ctx.geometry, ctx.wanted)
            sums = list(spread(ctx.wanted, terms))
        but_bias = [is_wanted and i != 3 for i, is_wanted in enumerate(ctx.wanted)]
        if any(but_bias) and any(tangent is not None for tangent in tangents):
            needs = (False, *only((True, True, True, False, True), but_bias))
            terms = _ops.double_backward(grad, *primals, *tangents, *ctx.geometry, needs)
            for i, term in enumerate(spread(but_bias, terms)):
                if term is not None:
                    sums[i] = term if sums[i] is None else sums[i] + term
        if ctx.wanted[3] and sums[3] is None:
            sums[3] = primals[2].new_zeros(primals[2].shape[0])
        return tuple(only(ctx.wanted, sums))


class _DoubleBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, grad, input, offset, weight, mask, *rest):
        *tangents, stride, padding, dilation, ctx.wanted = rest
        _save(ctx, input, offset, weight, mask, *tangents)
        ctx.geometry = (stride, padding, dilation)
        arguments = (grad, input, offset, weight, mask, *rest)
        return tuple(_below(_ops.double_backward, *arguments))

    @staticmethod
    def backward(ctx, *cotangents):
        # The first of the results, f'(x) t, is a first derivative.
        first, *others = spread(ctx.wanted, cotangents)
        if any(cotangent is not None for cotangent in others):
            raise NotImplementedError(_NO_MORE)
        if first is None:
            return (None,) * 14
        primals, tangents = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        needs = (False, *ctx.needs_input_grad[1:5])
        by_primals = _ops.double_backward(first, *primals, *tangents, *ctx.geometry, needs)
        needs_t = ctx.needs_input_grad[5:10]
        by_tangents = _ops.backward(first, *primals, *ctx.geometry, needs_t)
        return (*spread(needs, by_primals), *spread(needs_t, by_tangents), *(None,) * 4)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_MORE)


def _forward_autograd(*arguments):
    return _apply(_Forward, _ops.deform_conv2d, *arguments)


def _backward_autograd(*arguments):
    if not any(arguments[-1]):
        return []
    return list(_apply(_Backward, _ops.backward, *arguments))


def _double_backward_autograd(*arguments):
    if not any(arguments[-1]):
        return []
    return list(_apply(_DoubleBackward, _ops.double_backward, *arguments))


library.impl("deform_conv2d", _forward_autograd, "Autograd")
library.impl("deform_conv2d_backward", _backward_autograd, "Autograd")
library.impl("deform_conv2d_double_backward", _double_backward_autograd, "Autograd")


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
    def fold(tensor, dim):
        if tensor is None:
            return None
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1)
        return tensor.movedim(dim, 0).flatten(0, 1)

    out = _ops.deform_conv2d(
        fold(input, dims[0]), fold(offset, dims[1]), weight, bias, fold(mask, dims[4]), *geometry
    )
    return out.unflatten(0, (info.batch_size, out.shape[0] // info.batch_size)), 0


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
