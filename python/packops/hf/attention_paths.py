"""Attention within documents, computed in four ways, none with a mask of tokens x tokens. :func:`choose_path` says which.

``packops``  :func:`packops.attention`: CUDA, fp16 and bf16, the usual head dimensions.
``varlen``  ``torch.nn.attention.varlen.varlen_attn``, the FlashAttention-2 that comes with torch: other head dimensions.
``flex``    FlexAttention, for a softcap on CUDA.
``sdpa``    ``scaled_dot_product_attention`` on one document after the other or on groups of about equal length: everything else,
            the CPU first of all, and attention sinks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..data.collator import max_docs_for_flash_attention
from ..functional import attention
from .attention_documents import FLEX_BLOCK, Documents

Path = Literal["packops", "varlen", "flex", "sdpa"]

# packops.attention on CUDA
HAS_KERNELS: bool = _C.build_info()["cuda"]
HEAD_DIMS = (64, 128, 256)
# Without Hopper's products by warp groups it is faster than FlashAttention-2 with heads of at most so many features and documents
# up to about this length.
BY_WARPS = {"head_dim": 128, "longest": 2048}

# On the CPU a call per document is the fastest way from about this mean length on; below it, calls cost more than arithmetic.
CALL_PER_DOCUMENT = 24
# Query rows at a time where the scores are materialised.
SCORE_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of a query's scores within its document, before they weigh the values.

    Attributes:
        causal: no token sees a later one.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        scaling: of the products of queries and keys; None: ``head_dim ** -0.5``.
        dropout: probability.
        sinks: (heads,) a further score of every query, whose share of the weights goes to nothing (GPT-OSS).
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None

    @property
    def shapes_scores(self) -> bool:
        """Whether something happens to the scores that torch's ``scaled_dot_product_attention`` does not do."""
        return self.softcap is not None or self.sinks is not None


def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    rule: Rule,
    *,
    heads: int,
    head_dims: tuple[int, int],
    total: int,
    count: int,
    longest: int,
    parameters: frozenset[str] | None = None,
    capability: tuple[int, int] | None = None,
) -> Path:
    """How ``count`` documents of ``total`` tokens, none longer than ``longest``, are best attended to.

    Args:
        head_dims: of queries and keys, and of values.
        parameters: what this torch's ``varlen_attn`` takes (torch 2.10 has no window); empty if there is none.
        capability: of the device.
    """
    if device.type != "cuda" or rule.sinks is not None:
        return "sdpa"
    if capability is None:
        capability = torch.cuda.get_device_capability(device)
    has_flash = (
        dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0) and head_dims[0] == head_dims[1] and rule.dropout == 0
    )
    if has_flash and head_dims[0] in HEAD_DIMS and HAS_KERNELS:
        by_warps = head_dims[0] <= BY_WARPS["head_dim"] and longest <= BY_WARPS["longest"]
        if capability == (9, 0) or by_warps or rule.softcap is not None:
            return "packops"
    if rule.softcap is not None:
        return "flex" if rule.dropout == 0 else "sdpa"
    if parameters is None:
        parameters = varlen_parameters()
    can = (
        has_flash
        and head_dims[0] <= 256
        and head_dims[0] % 8 == 0
        and "cu_seq_q" in parameters
        and (rule.window is None or "window_size" in parameters)
        and (rule.scaling in (None, head_dims[0] ** -0.5) or "scale" in parameters)
        and count <= max_docs_for_flash_attention(total, heads, head_dims[0])
    )
    return "varlen" if can else "sdpa"


@functools.cache
def varlen_parameters() -> frozenset[str]:
    """Parameters of ``torch.nn.attention.varlen.varlen_attn``; empty where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


# ---- (T, heads, head_dim) -> (T, heads, head_dim) ---------------------------------------------------------------------------


def attend_packops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    rule: Rule,
) -> Tensor:
    return attention(
        q, k, v, documents.cu_seqlens, causal=rule.causal, window=rule.window, softcap=rule.softcap, scale=rule.scaling
    )


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    rule: Rule,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    parameters = varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in parameters:  # on the left, a window of n is n - 1 tokens before the token itself
        options["window_size"] = (-1 if rule.window is None else rule.window - 1, 0) if rule.causal else (-1, -1)
    else:
        options["is_causal"] = rule.causal
    if "scale" in parameters:
        options["scale"] = rule.scaling
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    bounds, longest = documents.cu_seqlens, documents.max_seqlen
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest, **options))


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    rule: Rule,
) -> Tensor:
    softcap = rule.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = _flex_attention(q.is_cuda)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=documents.block_mask(rule.window),
        scale=rule.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, output[0].transpose(0, 1))


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention

    if not compiled:
        return flex_attention
    # Below 128 tokens torch would choose its decoding kernel, which for some head counts has no configuration (torch 2.11).
    has_backends = "BACKEND" in FlexKernelOptions.__annotations__
    options = {"BACKEND": "TRITON"} if has_backends else {"FORCE_USE_FLEX_ATTENTION": True}
    return functools.partial(torch.compile(flex_attention), kernel_options=options)


def attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    rule: Rule,
) -> Tensor:
    lengths = documents.lengths
    if not lengths:
        return torch.cat([q[..., :0], v.new_zeros(*q.shape[:2], v.shape[2])], dim=2)
    attend: Callable[..., Tensor] = _causal if rule.causal else _sdpa
    if not rule.causal or (q.is_cpu and documents.total >= CALL_PER_DOCUMENT * len(lengths)):
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part, rule) for part in parts], dim=2)[0].transpose(0, 1)
    grids, place = documents.groups
    outputs = []
    for rows, count in grids:
        # a shorter document's row ends in copies of its last token, which come after all of its own
        part = (x.index_select(0, rows).unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        outputs.append(attend(*part, rule).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, place)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=is_causal,
        scale=rule.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Causal attention of whole documents (N, heads, L, head_dim), a stretch of queries at a time where it needs a mask."""
    length = q.shape[2]
    window = rule.window if rule.window is not None and rule.window < length else None
    if window is None and not rule.shapes_scores:
        return _sdpa(q, k, v, rule, is_causal=True)
    attend: Callable[..., Tensor] = shaped_attention if rule.shapes_scores else _sdpa
    rows = SCORE_ROWS if window is None else max(window, FLEX_BLOCK)
    outputs = []
    for begin, part in zip(range(0, length, rows), q.split(rows, dim=2), strict=True):
        end = begin + part.shape[2]
        first = 0 if window is None else max(0, begin - window + 1)
        query, key = torch.arange(begin, end, device=q.device)[:, None], torch.arange(first, end, device=q.device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        outputs.append(attend(part, k[:, :, first:end], v[:, :, first:end], rule, mask=mask))
    return torch.cat(outputs, dim=2)


def shaped_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, mask: Tensor) -> Tensor:
    """Attention with a softcap or sinks, and a mask that is True where a query sees a key; scores are there, at least in fp32."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    scale = q.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (F.dropout(weights, rule.dropout).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


ATTEND: dict[Path, Callable[..., Tensor]] = {
    "packops": attend_packops,
    "varlen": attend_varlen,
    "flex": attend_flex,
    "sdpa": attend_sdpa,
}
