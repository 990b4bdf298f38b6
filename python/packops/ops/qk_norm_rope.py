"""RMS norm of query and key heads, then RoPE. Autograd keeps the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import _checks
from . import autocast
from .derivatives import check_constants
from .op import Op
from .rope import empty_heads_like, feature_contiguous, mark_constants

__all__ = ["apply_qk_norm_rope"]


class QkNormRope(Op):
    name = "qk_norm_rope"
    differentiable = ("q", "k", "q_weight", "k_weight")
    results = 2

    @staticmethod
    def cast(device_type: str, tensors: tuple) -> tuple:
        heads = autocast.norm(device_type, autocast.promoted(device_type, tensors[:2]))
        return *heads, *tensors[2:]  # the kernels take weights and tables of any dtype

    def fake(self, q: Tensor, k: Tensor | None, *others: Any, **options: Any) -> tuple:
        return empty_heads_like(q), None if k is None else empty_heads_like(k)

    def fake_backward(
        self,
        grad_q: Tensor,
        grad_k: Tensor | None,
        q: Tensor,
        k: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor | None,
        *others: Any,
    ) -> tuple:
        def empty(x: Tensor | None, like: Any) -> Tensor | None:
            return None if x is None else like(x)

        return empty_heads_like(q), empty(k, empty_heads_like), torch.empty_like(q_weight), empty(k_weight, torch.empty_like)

    def check_constants(self, tensors: tuple) -> None:
        cos, sin = tensors[4:6]
        if cos.requires_grad or sin.requires_grad or forward_ad._current_level >= 0:
            check_constants("qk_norm_rope", {"cos": cos, "sin": sin})

    def keep(self, ctx: Any, tensors: tuple, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(*tensors)
        need_q, need_k, need_q_weight, need_k_weight = ctx.needs_input_grad[2:6]
        mark_constants(ctx, (need_q or need_q_weight, need_k or need_k_weight), outputs)
        return outputs

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        grad_q, grad_k = grads
        k = saved[1]
        grad_k = None if k is None else torch.zeros_like(k) if grad_k is None else feature_contiguous(grad_k)
        return tuple(self.raw_backward(feature_contiguous(grad_q), grad_k, *saved, *options))


def register(namespace: str) -> None:
    QkNormRope(namespace).register()


_OP = QkNormRope("packops")


def apply_qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    per_token_table: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RMS-normalise query and key heads, then rotate them: one pass over q and k instead of two and their temporaries.

    ``y = rotate(x / sqrt(mean(x²) + eps) * weight)``, in fp32 (fp64 for fp64 input) with one rounding at the end (Hugging Face's
    Qwen3 rounds three times on the way). Differentiable once in q, k and both weights; the gradients of the weights are summed in
    fp32 in a fixed order, so they are the same bits at every run.

    Args:
        q_weight, k_weight: ``(head_dim,)``: the mean runs over each head (Qwen3, Gemma 3); or ``(heads * head_dim,)``: over all
            heads of a token (OLMo 2 and 3). Any float dtype. ``k_weight`` is None when k is.
        eps: added to the mean of squares.
        zero_centered: the weight is ``1 + weight`` (Gemma).
        q, k, cos, sin and the other arguments: as in :func:`apply_rope`. Tokens past ``cu_seqlens[-1]`` pass through unchanged:
            not normalised either, and without a share in the gradients of the weights.

    Returns:
        ``(q, k)``, new tensors in the memory order of their inputs.

    Raises:
        TypeError, ValueError, IndexError: as :func:`apply_rope`.
    """
    if not is_compiling() and _checks.enabled() and isinstance(q, Tensor) and q.is_cuda:
        _checks.raise_bad_positions("qk_norm_rope", q, cos, position_ids, cu_seqlens, layout, per_token_table)
        _checks.raise_full_width_table("qk_norm_rope", q, sin, rotary_dim, interleaved)
    tensors = (q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens)
    rotation = (layout, rotary_dim, rotary_offset, interleaved, mrope_section, mrope_interleaved, per_token_table)
    plain = type(eps) is float and zero_centered is interleaved is mrope_interleaved is per_token_table is False
    plain = plain and layout is rotary_dim is mrope_section is None and type(rotary_offset) is int and rotary_offset == 0
    return cast(tuple[Tensor, Tensor | None], _OP(tensors, (eps, zero_centered, *rotation), plain))
