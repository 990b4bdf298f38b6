"""What of torch's ways to differentiate an op offers, and the errors of the others: nothing is ever dropped in silence.

Every op has first derivatives in reverse mode, and under the transforms of torch.func what they need of those. A second
derivative, or one in forward mode, does not exist unless an op says how (RoPE does, which is linear).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def no_forward_mode(op: str) -> RuntimeError:
    return RuntimeError(
        f"packops.{op} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad): use "
        "reverse mode (torch.func.vjp, grad, jacrev)"
    )


def no_second_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"packops.{op} is differentiable once: trying to differentiate twice, or to differentiate a gradient that was made with "
        "create_graph=True (a gradient penalty, a Hessian-vector product, torch.func.hessian)"
    )


def explain_batches(op: str, error: RuntimeError, grads: Iterable[Any]) -> NoReturn:
    """Raise ``error`` of a backward pass, or what it comes from: torch's older vmap, which knows no rules of ours."""
    if any(isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in grads):
        raise RuntimeError(
            f"packops.{op} computes one gradient at a time, and was asked for several at once: leave out vectorize=True "
            "(torch.autograd.functional) or is_grads_batched=True (torch.autograd.grad)"
        ) from None
    raise error


def refuse_transforms(op: str, instead: str) -> None:
    """RuntimeError under a transform of torch.func, for an op that has no rule for them."""
    if transforms_are_active():
        raise RuntimeError(f"packops.{op} does not work under the transforms of torch.func (grad, vmap, jvp, ...): {instead}")


def check_constants(op: str, tensors: Mapping[str, Any]) -> None:
    """ValueError for a tensor that needs a gradient and would get none, or whose tangent would be dropped."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and is_differentiated(x):
            raise ValueError(f"packops.{op}: {name} needs a gradient, but the op has none for it: pass {name}.detach()")


def is_differentiated(x: Tensor) -> bool:
    return (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x)


def has_tangent(x: Tensor) -> bool:
    """Whether forward mode wants a derivative with respect to ``x``."""
    if forward_ad._current_level < 0 or not x.is_floating_point():
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def over_batch(call: Callable[..., Any], info: Any, in_dims: tuple, arguments: tuple) -> tuple[Any, Any]:
    """The rule of vmap for every op: one element of the batch after the other."""

    def part(x: Any, dim: Any, i: int) -> Any:
        return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

    if info.batch_size == 0:
        raise ValueError("packops: vmap over a dimension of size 0")
    made = [call(*(part(x, d, i) for x, d in zip(arguments, in_dims, strict=True))) for i in range(info.batch_size)]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*made, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


class Once(torch.autograd.Function):
    """``compute(*tensors)``, and an error for whoever differentiates it."""

    @staticmethod
    def forward(op: str, compute: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise no_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_second_derivative(ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: str, compute: Callable[..., Any], *tensors: Tensor | None) -> tuple:
        return over_batch(lambda *parts: Once.apply(op, compute, *parts), info, in_dims[2:], tensors)


def once(op: str, compute: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """``compute(*tensors)`` in a backward pass. ``tensors``: all that the gradients depend on, as differentiable functions of the
    op's inputs: where the backward pass is itself recorded, the error hangs on each of them."""
    try:
        return Once.apply(op, compute, *tensors) if torch.is_grad_enabled() else compute(*tensors)
    except RuntimeError as error:
        explain_batches(op, error, tensors)


class Link(torch.autograd.Function):
    """``apply(op, *inputs)``: an empty tensor that depends on the inputs, for a backward pass that keeps none of them. Given to
    :func:`once`, it leads whoever differentiates the gradients to the error."""

    @staticmethod
    def forward(ctx: Any, op: str, *inputs: Tensor | None) -> Tensor:
        ctx.op = op
        return next(x for x in inputs if x is not None).new_empty((0,))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise no_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(ctx.op)
