"""Sums of per-token values over the documents of a packed axis."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .arguments import check_types
from .derivatives import is_differentiated, refuse_transforms
from .op import below_autograd, library, register_fake

__all__ = ["document_sums"]

OP = "document_sums"
REFUSED = "use torch.segment_reduce"


def document_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each document's values: of log-probabilities, what DPO, KTO and sequence-level GRPO compare.

    Summed in fp64 and rounded once, the same bits in every run. A document's sum does not depend on other documents: NaN or inf
    in one leaves the others alone. Divide by ``cu_seqlens.diff()`` for means over all tokens, or by the sums of a mask.

    Args:
        values: (T,), or any shape of T elements in the order of the packed axis; fp32 or fp64.
        cu_seqlens: (S+1,) int32 or int64 on the device of ``values``: where each of S documents begins, as attention kernels take
            it. Values at or past ``cu_seqlens[-1]`` are padding and count for nothing; the sum of an empty document is 0.

    Returns:
        (S,) in the dtype of ``values``. Differentiable any number of times: the gradient of a token is that of its document.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; on the CPU also ``cu_seqlens`` that does not start at 0, decreases
            or exceeds T. On CUDA such values are clamped, unless :func:`packops.checks` is on.
    """
    check_types(OP, {"values": "Tensor", "cu_seqlens": "Tensor"}, {"values": values, "cu_seqlens": cu_seqlens}.items())
    refuse_transforms(OP, REFUSED)
    return torch.ops.packops.document_sums(values, cu_seqlens)


class Sums(torch.autograd.Function):
    """``apply(ops, values, cu_seqlens)``. It is linear: its gradient is :class:`Spread`, and the gradient of that is this."""

    @staticmethod
    def forward(ctx: Any, ops: Any, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.ops, ctx.shape = ops, values.shape
        _keep(ctx, cu_seqlens)
        return ops.document_sums(values, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, Spread.apply(ctx.ops, grad, *ctx.saved_tensors, math.prod(ctx.shape)).view(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, _ops: Any, tangent: Tensor, _cu_seqlens: Any) -> Tensor:
        return ctx.ops.document_sums(tangent, *ctx.saved_tensors)


class Spread(torch.autograd.Function):
    """``apply(ops, sums, cu_seqlens, tokens)``: each token's is that of its document."""

    @staticmethod
    def forward(ctx: Any, ops: Any, sums: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
        ctx.ops, ctx.tokens = ops, tokens
        _keep(ctx, cu_seqlens)
        return ops._document_spread(sums, cu_seqlens, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, Sums.apply(ctx.ops, grad, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, _ops: Any, tangent: Tensor, *others: Any) -> Tensor:
        return ctx.ops._document_spread(tangent, *ctx.saved_tensors, ctx.tokens)


def _keep(ctx: Any, cu_seqlens: Tensor) -> None:
    """As autograd keeps tensors: boundaries that have changed by the time of a derivative are an error."""
    ctx.save_for_backward(cu_seqlens)
    ctx.save_for_forward(cu_seqlens)


def _check(values: Tensor, cu_seqlens: Tensor) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"packops.{OP}: values must be float32 or float64, got {values.dtype}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"packops.{OP}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"packops.{OP}: cu_seqlens must have shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != values.device:
        raise ValueError(f"packops.{OP}: cu_seqlens must be on the device of values, {values.device}, got {cu_seqlens.device}")


def register(namespace: str) -> None:
    """Define ``document_sums`` and its transpose, each the other's gradient."""
    ops = getattr(torch.ops, namespace)
    kernels = library(namespace)
    kernels.define(f"{OP}(Tensor values, Tensor cu_seqlens) -> Tensor")
    kernels.define("_document_spread(Tensor sums, Tensor cu_seqlens, SymInt tokens) -> Tensor")

    def sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
        _check(values, cu_seqlens)
        tokens = values.numel()
        if not values.is_cuda or _checks.enabled():
            _checks.raise_bad_cu_seqlens(OP, cu_seqlens, tokens)
        else:
            cu_seqlens = cu_seqlens.clamp(0, tokens).cummax(0).values
        if tokens == 0 or cu_seqlens.shape[0] == 1:
            return values.new_zeros(cu_seqlens.shape[0] - 1)
        flat = values.reshape(-1).double()
        return torch.segment_reduce(flat, "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0).to(values.dtype)

    def spread(sums: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
        if tokens == 0 or sums.shape[0] == 0:
            return sums.new_zeros(tokens)
        document = ops.packed_metadata(cu_seqlens, tokens)[1]
        return torch.where(document < 0, 0, sums[document.clamp(min=0).long()])

    for key in ("CPU", "CUDA"):
        kernels.impl(OP, sums, key)
        kernels.impl("_document_spread", spread, key)

    def fake_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
        _check(values, cu_seqlens)
        return values.new_empty((cu_seqlens.shape[0] - 1,))

    register_fake(namespace, OP, fake_sums)
    register_fake(namespace, "_document_spread", lambda sums, cu_seqlens, tokens: sums.new_empty((tokens,)))

    below_sums, below_spread = below_autograd(getattr(ops, OP).default), below_autograd(ops._document_spread.default)
    raw = SimpleNamespace(document_sums=below_sums, _document_spread=below_spread)

    def sums_autograd(values: Tensor, cu_seqlens: Tensor) -> Tensor:
        refuse_transforms(OP, REFUSED)
        return Sums.apply(raw, values, cu_seqlens) if is_differentiated(values) else below_sums(values, cu_seqlens)

    kernels.impl(OP, sums_autograd, "Autograd")
