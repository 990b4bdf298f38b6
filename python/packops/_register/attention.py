"""Fake kernels and autograd of attention within documents. Autograd keeps q, k, v, the result and a number per query and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 64  # csrc/attention.h: kAttentionRows


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, raw_backward, q, k, v, cu_seqlens, rule):
        out, lse, tiles = raw(q, k, v, cu_seqlens, *rule)
        ctx.save_for_backward(q, k, v, out, lse, tiles, cu_seqlens)
        ctx.raw_backward, ctx.rule = raw_backward, rule
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, *ctx.raw_backward(grad, *ctx.saved_tensors, *ctx.rule), None, None


def register(namespace: str) -> None:
    raw_backward = getattr(torch.ops, namespace)._attention_backward.default

    @torch.library.register_fake(f"{namespace}::_attention")
    def _(q, k, v, cu_seqlens, causal=True, window=None, softcap=None, scale=None):
        tokens, heads, _ = q.shape
        tiles = tokens // ROWS + cu_seqlens.shape[0] if q.is_cuda else 0
        return (
            q.new_empty(q.shape),
            q.new_empty((heads, tokens), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
            q.new_empty((tiles, 4), dtype=torch.int32),
        )

    @torch.library.register_fake(f"{namespace}::_attention_backward")
    def _(grad_out, q, k, v, out, lse, tiles, cu_seqlens, causal=True, window=None, softcap=None, scale=None):
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, cu_seqlens, *rule = inputs
        out, lse, tiles = output
        ctx.mark_non_differentiable(lse, tiles)
        ctx.save_for_backward(q, k, v, out, lse, tiles, cu_seqlens)
        ctx.rule = rule

    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor, grad_tiles: Tensor) -> tuple:
        return *raw_backward(grad, *ctx.saved_tensors, *ctx.rule), *(None,) * 5

    torch.library.register_autograd(f"{namespace}::_attention", backward, setup_context=setup_context)
