"""Attention within documents. Autograd keeps q, k, v, the result and a number per query and head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _C, _checks
from . import attention_paths, autocast
from .attention_paths import Rule
from .op import Op, maths_dtype

__all__ = ["attention", "attention_path"]

CONSTANTS = _C.constants()
ROWS: int = CONSTANTS["attention_rows"]
TILE: int = CONSTANTS["attention_tile_numbers"]
PER_SEGMENT: int = CONSTANTS["forest_per_segment"]
PER_TOKEN: int = CONSTANTS["forest_per_token"]


class Attention(Op):
    name = "attention"
    differentiable = ("q", "k", "v")
    cast = staticmethod(autocast.lower_precision)

    def fake(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parents: Tensor | None = None, *rule: Any, **keywords: Any
    ) -> tuple:
        tokens, heads, _ = q.shape
        segments = cu_seqlens.shape[0] - 1
        tiles = tokens // ROWS + cu_seqlens.shape[0] + 1 if q.is_cuda else 0
        parts = 1 if q.is_cuda else 2
        return (
            q.new_empty(q.shape),
            q.new_empty((parts, heads, tokens), dtype=maths_dtype(q)),
            q.new_empty((tiles, TILE), dtype=torch.int32),
            q.new_empty((0 if parents is None else PER_SEGMENT * segments + 1 + PER_TOKEN * tokens,), dtype=torch.int32),
        )

    def fake_backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple:
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def keep(self, ctx: Any, tensors: tuple, outputs: tuple[Tensor, ...]) -> Tensor:
        q, k, v, cu_seqlens, _ = tensors
        ctx.save_for_backward(q, k, v, *outputs, cu_seqlens)
        return outputs[0]


def register(namespace: str) -> None:
    Attention(namespace).register()


_OP = Attention("packops")


def _torch_instead(q: Any, k: Any, v: Any, cu_seqlens: Any, parents: Any, causal: Any, *rule: Any) -> tuple | None:
    """The arguments of :func:`.attention_paths.attend`, or None where the kernel on CUDA takes the heads."""
    takes = attention_paths.kernel_takes
    if isinstance(v, Tensor) and q.dim() and v.dim() and takes(q.device, q.dtype, (q.shape[-1], v.shape[-1])):
        return None
    _OP.check((q, k, v, cu_seqlens, parents), (causal, *rule))
    q, k, v = autocast.lower_precision(q.device.type, (q, k, v))
    if v.dim() and q.dim() and takes(q.device, q.dtype, (q.shape[-1], v.shape[-1])):
        return None
    return q, k, v, cu_seqlens, parents, Rule(causal, *rule)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed documents, none of which sees another: ``softmax(scale * q k^T) v`` within each.

    FlashAttention-2's algorithm (Dao 2023, https://arxiv.org/abs/2307.08691) on tiles of 64 tokens of one document, however long
    or short documents are: no grid that is as wide as the longest, no ``max_seqlen``, and nothing waits for the device. Gradients
    are the same bits at every run, and do not depend on a document's neighbours. Scores are fp32 (fp64 for fp64), weights are
    rounded to the dtype of ``v`` before they multiply it. Differentiable once.

    Args:
        q: ``(T, heads, head_dim)``, any strides (a slice of a fused projection). On CUDA fp16 or bf16, compute capability 8.0 or
            later, and ``head_dim`` a multiple of 8 up to 256, padded to 64, 96, 128, 192 or 256; on the CPU
            also fp32 and fp64, and any ``head_dim``, in plain code: ``scaled_dot_product_attention`` per document is faster
            there. Other dtypes and head dimensions on CUDA take the best that torch has, which may read ``cu_seqlens`` on the
            host, once per tensor, and whose gradients need not be the same bits at every run: :func:`packops.attention_path`
            says which way it is.
        k, v: ``(T, kv_heads, head_dim)``, where ``kv_heads`` divides ``heads``: query head h meets ``h * kv_heads // heads``. On
            CUDA values may have another number of features, which is then that of the result.
        cu_seqlens: ``(documents + 1,)`` int32 or int64, where documents begin, on the device of ``q``. Tokens at or past
            ``cu_seqlens[-1]`` are padding: their rows of the result and of all gradients are 0, whatever they hold.
        parents: ``(documents,)`` int32 or int64, for documents that share prefixes (:class:`packops.PackedForest`): what each
            segment, which is then what ``cu_seqlens`` cuts, continues, or -1. Segments come in depth-first order. A token sees
            those of its own path from the root, and a window counts along it. Only with ``causal``.
        causal: a token sees no later one.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it. Only with ``causal``.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None: as they are.
        scale: of the products of queries and keys, positive; None: ``head_dim ** -0.5``.

    Returns:
        ``(T, heads, head_dim)``, contiguous, of the dtype of ``q``. On CUDA, gradients of rows with scaled scores of about
        2^15.5 and more are NaN: fp32 does not hold what they need.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what it got and what it wants.
        ValueError: ``cu_seqlens`` that do not start at 0, decrease, or end past T; on CUDA only with :func:`packops.checks` on
            (without, no address outside the tensors is read, and what comes out is unspecified). The same for ``parents`` that
            are not in depth-first order, on the CPU.
    """
    if not is_compiling() and _checks.enabled() and isinstance(cu_seqlens, Tensor) and cu_seqlens.is_cuda:
        _checks.raise_bad_cu_seqlens("attention", cu_seqlens, q.shape[0])
    if isinstance(q, Tensor) and q.is_cuda:
        instead = _torch_instead(q, k, v, cu_seqlens, parents, causal, window, softcap, scale)
        if instead is not None:
            return attention_paths.attend(*instead)
    plain = causal is True and window is None and softcap is None and scale is None
    return cast(Tensor, _OP((q, k, v, cu_seqlens, parents), (causal, window, softcap, scale), plain))


def attention_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> str:
    """How :func:`packops.attention` computes what it would be called with. Computes nothing, and does not wait for the device.

    Args:
        q, k, v, cu_seqlens, parents, causal, window, softcap, scale: as :func:`packops.attention` takes them. Autocast counts.

    Returns:
        ``"packops"``: its own kernel, always so on the CPU. Else what torch has: ``"varlen"``, its FlashAttention-2
        (``torch.nn.attention.varlen``); ``"flex"``, FlexAttention; ``"sdpa"``, ``scaled_dot_product_attention`` on one document
        (segment, where documents share prefixes) after the other or on groups of about equal length; ``"masked"``, the same with
        a mask: what would be ``"sdpa"`` under ``torch.compile`` or while a CUDA graph is captured.

    Raises:
        TypeError, ValueError: an argument that does not fit, where it is not its own kernel.
    """
    if not isinstance(q, Tensor) or not q.is_cuda:
        _OP.check((q, k, v, cu_seqlens, parents), (causal, window, softcap, scale))
        return "packops"
    instead = _torch_instead(q, k, v, cu_seqlens, parents, causal, window, softcap, scale)
    if instead is None:
        return "packops"
    q, k, v, cu_seqlens, parents, rule = instead
    attention_paths.check(*instead)
    return attention_paths.path_of(q, v, cu_seqlens, parents, rule)
