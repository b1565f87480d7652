"""What the operators have in common: the library they are in, their derivatives, vmap.

With a function f of tensors x, a cotangent u of its output and tangents t of x, there are three
operators:

==========================  ==================================================================
``<name>``                  f(x)
``<name>_backward``         u f'(x), a gradient for each of x
``<name>_double_backward``  of <u, f'(x) t>, the gradients in u, that is f'(x) t, and in each of x
==========================  ==================================================================

The third is the backward of the second, and the Jacobian-vector product of the first. Each
computes and returns only what is ``wanted``, the last of its arguments.

The derivatives are registered with the dispatcher, so that they hold wherever an operator is
called: from Python, in an exported graph, under `torch.func`. A plain autograd.Function around
the operator would be lost from exported graphs, and `torch.library.register_autograd` knows
neither `torch.func` nor forward mode.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from . import _bridge
from ._checks import refuse

library = torch.library.Library("mlx_deform", "DEF")


def only(wanted: Sequence[bool], values: Sequence) -> list:
    """The wanted ones of the values."""
    return [value for value, is_wanted in zip(values, wanted, strict=True) if is_wanted]


def spread(wanted: Sequence[bool], values: Sequence) -> tuple:
    """The inverse of ``only``: None where nothing was wanted."""
    rest = iter(values)
    return tuple(next(rest) if is_wanted else None for is_wanted in wanted)


def partial(function: Callable, arguments: Sequence, chosen: Sequence[bool]):
    """``function`` as one of the chosen arguments alone, and these."""

    def chosen_alone(*values):
        replaced = spread(chosen, values)
        return [
            function(
                *(
                    argument if value is None else value
                    for argument, value in zip(arguments, replaced, strict=True)
                )
            )
        ]

    return chosen_alone, only(chosen, arguments)


def check_like(
    operator: str, name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]
) -> None:
    """A cotangent or a tangent must be as what it belongs to."""
    if tuple(tensor.shape) != tuple(shape):
        refuse(f"{name} must have shape {tuple(shape)}", f"shape {tuple(tensor.shape)}", operator)
    if tensor.dtype != like.dtype or tensor.device != like.device:
        refuse(
            f"{name} must have type {like.dtype} and be on {like.device}",
            f"{tensor.dtype} on {tensor.device}",
            operator,
        )


def register(name: str, kernel: Callable, fake: Callable) -> None:
    """What an operator computes, and what its results look like."""
    for device in _bridge.DEVICES:
        library.impl(name, kernel, device.upper())
    torch.library.register_fake(f"mlx_deform::{name}", fake, lib=library)


# ---------------------------------------------------------------------------
# Derivatives


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


def register_derivatives(
    name: str, is_saved: Sequence[bool], zero_gradient: Callable | None = None
) -> None:
    """The derivatives of the three operators of a function.

    name: the function's.
    is_saved: of each tensor argument, whether its value matters to a derivative. The two
        operators of derivatives take those alone as primals.
    zero_gradient: of the primals, the gradient of the one argument whose value doesn't matter,
        if it is zero.
    """
    forward_op, backward_op, double_backward_op = (
        getattr(torch.ops.mlx_deform, operator).default
        for operator in (name, f"{name}_backward", f"{name}_double_backward")
    )
    count, saved_count = len(is_saved), sum(is_saved)
    no_more = f"[{name}] has first and second derivatives alone"

    class Forward(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments):
            _save(ctx, *only(is_saved, arguments[:count]))
            ctx.settings = arguments[count:]
            return _below(forward_op, *arguments)

        @staticmethod
        def backward(ctx, grad):
            wanted = ctx.needs_input_grad[:count]
            gradients = (None,) * count
            if grad is not None:
                computed = backward_op(grad, *ctx.saved_tensors, *ctx.settings, wanted)
                gradients = spread(wanted, computed)
            return (*gradients, *(None for _ in ctx.settings))

        @staticmethod
        def jvp(ctx, *tangents):
            wanted = (True, *(False,) * saved_count)
            tangents = tangents[:count]
            return double_backward_op(None, *ctx.saved_tensors, *tangents, *ctx.settings, wanted)[0]

    class Backward(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments):
            _save(ctx, *arguments[: 1 + saved_count])
            *ctx.settings, ctx.wanted = arguments[1 + saved_count :]
            return tuple(_below(backward_op, *arguments))

        @staticmethod
        def backward(ctx, *cotangents):
            needs = ctx.needs_input_grad[: 1 + saved_count]
            tangents = spread(ctx.wanted, cotangents)
            gradients = (None,) * len(needs)
            if any(tangent is not None for tangent in tangents):
                computed = double_backward_op(*ctx.saved_tensors, *tangents, *ctx.settings, needs)
                gradients = spread(needs, computed)
            return (*gradients, *(None for _ in ctx.settings), None)

        @staticmethod
        def jvp(ctx, t_grad, *tangents):
            grad, *primals = ctx.saved_tensors
            tangents = spread(is_saved, tangents[:saved_count])
            sums = [None] * count
            if t_grad is not None:
                terms = backward_op(t_grad, *primals, *ctx.settings, ctx.wanted)
                sums = list(spread(ctx.wanted, terms))
            bent = [wants and saves for wants, saves in zip(ctx.wanted, is_saved, strict=True)]
            if any(bent) and any(tangent is not None for tangent in tangents):
                needs = (False, *only(is_saved, bent))
                terms = double_backward_op(grad, *primals, *tangents, *ctx.settings, needs)
                for i, term in enumerate(spread(bent, terms)):
                    if term is not None:
                        sums[i] = term if sums[i] is None else sums[i] + term
            for i, wants in enumerate(ctx.wanted):
                if wants and not is_saved[i] and sums[i] is None:
                    sums[i] = zero_gradient(*primals)
            return tuple(only(ctx.wanted, sums))

    class DoubleBackward(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments):
            tensors = arguments[1 : 1 + saved_count + count]
            _save(ctx, *tensors)
            *ctx.settings, ctx.wanted = arguments[1 + len(tensors) :]
            return tuple(_below(double_backward_op, *arguments))

        @staticmethod
        def backward(ctx, *cotangents):
            # The first of the results, f'(x) t, is a first derivative.
            first, *others = spread(ctx.wanted, cotangents)
            if any(cotangent is not None for cotangent in others):
                raise NotImplementedError(no_more)
            primals, tangents = ctx.saved_tensors[:saved_count], ctx.saved_tensors[saved_count:]
            by_primals, by_tangents = (None,) * saved_count, (None,) * count
            if first is not None:
                needs = (False, *ctx.needs_input_grad[1 : 1 + saved_count])
                terms = double_backward_op(first, *primals, *tangents, *ctx.settings, needs)
                by_primals = spread(needs, terms)[1:]
                needs = ctx.needs_input_grad[1 + saved_count :][:count]
                by_tangents = spread(needs, backward_op(first, *primals, *ctx.settings, needs))
            return (None, *by_primals, *by_tangents, *(None for _ in ctx.settings), None)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(no_more)

    def forward(*arguments):
        return _apply(Forward, forward_op, *arguments)

    def backward(*arguments):
        return list(_apply(Backward, backward_op, *arguments)) if any(arguments[-1]) else []

    def double_backward(*arguments):
        if not any(arguments[-1]):
            return []
        return list(_apply(DoubleBackward, double_backward_op, *arguments))

    library.impl(name, forward, "Autograd")
    library.impl(f"{name}_backward", backward, "Autograd")
    library.impl(f"{name}_double_backward", double_backward, "Autograd")


# ---------------------------------------------------------------------------
# vmap


def fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """vmap's axis joined with the first, that of the batch; without one the tensor is repeated."""
    if tensor is None:
        return None
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))
