"""RMS norm of rows, and of rows that are a sum. Autograd keeps x or the sum, and the weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import autocast
from .derivatives import transforms_are_active
from .op import Op, library

__all__ = ["add_rms_norm", "rms_norm"]


class RmsNorm(Op):
    name = "rms_norm"
    differentiable = ("x", "weight")
    cast = staticmethod(autocast.norm)

    def fake(self, x: Tensor, weight: Tensor, *options: Any, **keywords: Any) -> Tensor:
        return x.new_empty(x.shape)

    def fake_backward(self, grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> tuple:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)


class OfSum(Op):
    """Two results, the norm and what it is of. The gradient of one that nobody used is None, which no number stands for: the
    weight has none then, as in two steps, and a row whose norm is not finite spoils nothing."""

    def __init__(self, namespace: str):
        super().__init__(namespace)
        ops = getattr(torch.ops, namespace)
        self.raw_backward, self.norm_backward = ops._add_rms_norm_backward.default, ops._rms_norm_backward.default

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        of_norm, of_total = grads
        if of_norm is None:
            return of_total, None
        if of_total is None:
            return tuple(self.norm_backward(of_norm, *saved, *options))
        return tuple(self.raw_backward(of_norm, of_total, *saved, *options))

    def once(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        linear = grads[0] is None  # and so differentiable as often as one likes
        return (self.gradients if linear else super().once)(grads, saved, options, needs)


class AddRmsNorm(OfSum):
    name = "add_rms_norm"
    differentiable = ("x", "residual", "weight")
    results = 2

    def fake(self, x: Tensor, residual: Tensor, weight: Tensor, *options: Any, **keywords: Any) -> tuple:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    def fake_backward(self, grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, *options: Any) -> tuple:
        return total.new_empty(total.shape), weight.new_empty(weight.shape)

    def keep(self, ctx: Any, tensors: tuple, outputs: Any) -> Any:
        ctx.save_for_backward(outputs[1], tensors[2])
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[2:4]):  # the op and its options come first
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        of_total, of_weight = super().gradients(grads, saved, options, needs)
        return of_total, of_total, of_weight

    def register(self) -> None:
        super().register()
        norm, kernels = getattr(torch.ops, self.namespace).rms_norm.default, library(self.namespace)

        def apart(x: Tensor, residual: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            total = x + residual
            return norm(total, weight, **options), total

        for key in ("AutocastCPU", "AutocastCUDA"):
            kernels.impl(self.name, apart, key)


class ForkedRmsNorm(OfSum, RmsNorm):
    """Returns x, too, so that its backward pass sees the gradient of x from elsewhere and adds it."""

    def keep(self, ctx: Any, tensors: tuple, outputs: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return outputs, tensors[0]


def register(namespace: str) -> None:
    RmsNorm(namespace).register()
    AddRmsNorm(namespace).register()


_OP, _ADD, _FORKED = RmsNorm("packops"), AddRmsNorm("packops"), ForkedRmsNorm("packops")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, in fp32 (fp64 for fp64) and rounded once.

    The backward pass reads ``x`` and the gradient once, for both of its gradients (torch's fused kernels read them twice); the
    weight's is summed in fp32 in a fixed order, so it is the same bits at every run. Differentiable once.

    Args:
        x: ``(..., columns)``; fp32, bf16 or fp16 (fp64 on the CPU). On CUDA a row is whole 16-byte vectors, and at most 8192
            elements of 16 bits or 4096 of fp32.
        weight: ``(columns,)``, of the dtype of ``x``.
        eps: added to the mean of squares.
        zero_centered: the factor is ``1 + weight`` (Gemma), added in fp32.

    Returns:
        ``(..., columns)``, contiguous, of the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what it got and what it wants.
    """
    return cast(Tensor, _OP((x, weight), (eps, zero_centered), type(eps) is float and zero_centered is False))


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """``total = x + residual``, as layers of a transformer add, and :func:`rms_norm` of it, in one kernel each way.

    Forward, the sum is not read again; backward, its own gradient is added in the norm's kernel, before anything is rounded. The
    sum itself is rounded to the dtype of ``x`` before the norm, as in two steps: results are the same bits. Differentiable once.
    What autograd gives for the sum returned (a hook on it, ``torch.autograd.grad`` with respect to it) leaves out the norm's
    share, which goes straight to ``x`` and ``residual``.

    Args:
        x: as for :func:`rms_norm`.
        residual: of the shape and dtype of ``x``. None: there is nothing to add, the sum is ``x`` itself, and only the backward
            pass does more than :func:`rms_norm`'s. For the first norm of a layer, whose input goes on to the sum behind it.
        weight, eps, zero_centered: as for :func:`rms_norm`.

    Returns:
        The norm and the sum, both like ``x``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what it got and what it wants.
    """
    options, plain = (eps, zero_centered), type(eps) is float and zero_centered is False
    apart = autocast.is_any()  # which casts what a norm reads, and leaves a sum alone
    if residual is None:
        wanted = torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad
        if wanted and not (apart or is_compiling() or transforms_are_active()):
            return cast(tuple[Tensor, Tensor], _FORKED((x, weight), options, plain))
        return cast(Tensor, _OP((x, weight), options, plain)), x
    if apart and not is_compiling():
        _ADD.check((x, residual, weight), options)
        total = x + residual
        return cast(Tensor, _OP((total, weight), options, plain)), total
    return cast(tuple[Tensor, Tensor], _ADD((x, residual, weight), options, plain))
