"""The specification in plain torch: what every packops op computes, in fp64, one readable formula at a time.

Tests, documentation and :func:`packops.verify` share these functions. They are slow and allocate freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("none", "sum", "mean", "seq-mean-token-mean", "seq-mean-token-sum")


class DocumentRows(NamedTuple):
    """Which document each of T rows belongs to (-1: padding), and whether it is its document's last row."""

    index: Tensor  # type: ignore[assignment]
    is_last: Tensor
    count: int  # type: ignore[assignment]


def documents_of(batch_shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> DocumentRows:
    """Documents from ``cu_seqlens`` (S+1,), or one per row of a ``(..., length)`` batch."""
    rows = batch_shape.numel()
    index = torch.full((rows,), -1, dtype=torch.int64, device=device)
    is_last = torch.zeros(rows, dtype=torch.bool, device=device)
    if cu_seqlens is None:
        length = batch_shape[-1] if len(batch_shape) else 1
        bounds = list(range(0, rows + 1, length)) if length else [0]
    else:
        bounds = cu_seqlens.tolist()
    for document, (begin, end) in enumerate(pairwise(bounds)):
        index[begin:end] = document
        if end > begin:
            is_last[end - 1] = True
    return DocumentRows(index, is_last, len(bounds) - 1)


def targets_of(labels: Tensor, documents: DocumentRows, shift: bool, ignore_index: int) -> Tensor:
    """(T,) what each row is scored against: ``ignore_index`` at the last row of a document if shifted, and in the padding."""
    target = labels.reshape(-1).long()
    if shift:
        target = target.roll(-1).masked_fill(documents.is_last, ignore_index)
    return target.masked_fill(documents.index < 0, ignore_index)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """What :func:`packops.cross_entropy` computes, in fp64 and differentiable by autograd. Labels must be valid."""
    batch_shape = logits.shape[:-1]
    x = logits.double().reshape(-1, logits.shape[-1]) * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    rows, vocab = x.shape
    documents = documents_of(batch_shape, cu_seqlens, logits.device)

    target = targets_of(labels, documents, shift, ignore_index)
    weight = torch.ones(rows, dtype=x.dtype, device=x.device) if token_weight is None else token_weight.reshape(-1).double()
    counted = (target != ignore_index) & (weight != 0)
    safe = torch.where(counted, target, 0)
    x = torch.where(counted[:, None], x, 0.0)  # an ignored row may hold anything, NaN included

    class_weight = torch.ones(vocab, dtype=x.dtype, device=x.device) if class_weight is None else class_weight.double()
    lse = torch.logsumexp(x, -1)
    log_p = torch.log_softmax(x, -1)  # not x - lse, which forgets log(V) beside logits of 1e38
    target_weight = class_weight[safe] if vocab else x.new_zeros(rows)
    losses = -(1 - label_smoothing) * target_weight * log_p.gather(1, safe[:, None])[:, 0]
    if label_smoothing:
        losses = losses - label_smoothing / vocab * (log_p * class_weight).sum(1)
    losses = torch.where(counted, weight * (losses + z_loss * lse.square()), 0.0)

    if reduction == "none":
        return losses.reshape(batch_shape)
    if reduction == "sum":
        return losses.sum()
    norm_weight = torch.where(counted, weight * target_weight, 0.0)
    if reduction == "mean":
        total = norm_weight.sum() if num_items is None else torch.as_tensor(num_items, dtype=torch.float64, device=x.device)
        return losses.sum() / total if counted.any() and total != 0 else losses.sum() * 0.0

    total, count = losses.sum() * 0.0, 0
    for document in range(documents.count):
        inside = documents.index == document
        if not (inside & counted).any():
            continue
        count += 1
        if reduction == "seq-mean-token-sum":
            total = total + losses[inside].sum()
        elif norm_weight[inside].sum() != 0:
            total = total + losses[inside].sum() / norm_weight[inside].sum()
    if count == 0:
        return total
    return total / (count if num_items is None else torch.as_tensor(num_items, dtype=torch.float64, device=x.device))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options) -> Tensor:
    """What :func:`packops.linear_cross_entropy` computes, in fp64 and differentiable by autograd: with all logits."""
    logits = hidden.double() @ weight.double().t()
    return cross_entropy(logits if bias is None else logits + bias.double(), labels, **options)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`packops.linear_log_probs` computes, in fp64 and differentiable by autograd: log_probs, entropy, lse."""
    log_probs = -linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        reduction="none",
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
    )

    documents = documents_of(labels.shape, cu_seqlens, labels.device)
    counted = (targets_of(labels, documents, shift, ignore_index) != ignore_index).view(labels.shape)
    x = torch.where(counted[..., None], hidden.double(), 0.0) @ weight.double().t() * logit_scale
    x = x if bias is None else x + bias.double() * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    log_p = torch.log_softmax(x, -1)
    entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
    return log_probs, torch.where(counted, entropy, 0.0), torch.where(counted, x.logsumexp(-1), 0.0)


def document_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each document's values, in fp64 and differentiable by autograd."""
    flat = values.reshape(-1).double()
    sums = [flat[begin:end].sum() for begin, end in pairwise(cu_seqlens.tolist())]
    return torch.stack(sums) if sums else flat[:0]


def packed_metadata(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions that restart in every document, and document ids; padding is one trailing document with id -1."""
    bounds = cu_seqlens.tolist()
    spans = [(s, begin, end) for s, (begin, end) in enumerate(pairwise(bounds))]
    position_ids = torch.zeros(total_tokens, dtype=torch.int64)
    seq_idx = torch.full((total_tokens,), -1, dtype=torch.int32)
    for s, begin, end in [*spans, (-1, bounds[-1], total_tokens)]:
        position_ids[begin:end] = torch.arange(end - begin)
        seq_idx[begin:end] = s
    return position_ids.to(cu_seqlens.device), seq_idx.to(cu_seqlens.device)


def packed_forest(cu_seqlens: Tensor, total_tokens: int, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that continue the parent's, segment ids, and where the subtree of each token's segment ends."""
    position_ids, seq_idx = packed_metadata(cu_seqlens, total_tokens)
    bounds, above = cu_seqlens.tolist(), parents.tolist()
    starts, ends = [0] * len(bounds), [*bounds[1:], 0]  # the last of each is the padding's, segment -1
    for segment, parent in enumerate(above):
        if parent >= 0:
            starts[segment] = starts[parent] + bounds[parent + 1] - bounds[parent]
    for segment, parent in reversed(list(enumerate(above))):
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[segment])
    start, end = torch.tensor(starts, device=seq_idx.device), torch.tensor(ends, dtype=torch.int32, device=seq_idx.device)
    return position_ids + start[seq_idx.long()], seq_idx, end[seq_idx.long()]


def packed_labels(labels: Tensor, cu_seqlens: Tensor, *, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Labels in which no token is scored against another document, and the scored tokens of each document."""
    bounds = cu_seqlens.tolist()
    flat = labels.reshape(-1)
    target = torch.full_like(flat, ignore_index, memory_format=torch.contiguous_format)
    counts = []
    for begin, end in pairwise(bounds):
        if shift:
            target[begin : max(begin, end - 1)] = flat[begin + 1 : end]
        else:
            target[begin + 1 : end] = flat[begin + 1 : end]
        counts.append(int((flat[begin + 1 : end] != ignore_index).sum()))
    return target.view(labels.shape), torch.tensor(counts, dtype=torch.int64, device=labels.device)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
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
    """What :func:`packops.apply_rope` computes, in fp64 and differentiable by autograd. Positions must lie inside the table."""
    layout = layout or ("thd" if q.dim() == 3 else "bshd")
    head_dim, width = q.shape[-1], cos.shape[-1]
    if rotary_dim is None:
        rotary_dim = 2 * width if 2 * width <= head_dim else width
    half = rotary_dim // 2
    batch, tokens = {"thd": (1, q.shape[0]), "bshd": q.shape[:2], "bhsd": (q.shape[0], q.shape[2])}[layout]
    # In a full-width table column j belongs to feature j, so interleaved pairs have columns 2i and 2i + 1.
    columns = slice(0, None, 2) if interleaved and width == rotary_dim else slice(half)
    cos, sin = cos.double()[..., columns], sin.double()[..., columns]

    # Tokens past the last document do not turn at all.
    index = torch.arange(batch * tokens, device=q.device)
    inside, start = torch.ones_like(index, dtype=torch.bool), index // max(tokens, 1) * tokens
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        inside = index < bounds[-1]
        start = index.clone()
        for begin, end in pairwise(bounds):
            start[begin:end] = begin

    # One angle per token and pair: c, s (batch, tokens, half).
    def per_token(x: Tensor, lead: tuple[int, ...] = (), trail: tuple[int, ...] = ()) -> Tensor:
        if x.numel() != batch * tokens * torch.Size(lead + trail).numel():
            x = x.reshape(*lead, 1, tokens, *trail)
        return x.reshape(*lead, -1, tokens, *trail).expand(*lead, batch, tokens, *trail)

    if per_token_table:
        c, s = per_token(cos, (), (half,)), per_token(sin, (), (half,))
    elif mrope_section is None:
        ids = (index - start).view(batch, tokens) if position_ids is None else per_token(position_ids).long()
        ids = torch.where(inside.view(batch, tokens), ids, 0)
        c, s = cos[ids], sin[ids]
    else:
        pair = torch.arange(half, device=q.device)
        if mrope_interleaved:
            axis = pair % 3
            axis = torch.where(pair < 3 * torch.tensor(mrope_section, device=q.device)[axis], axis, 0)
        else:
            axis = torch.repeat_interleave(torch.arange(3, device=q.device), torch.tensor(mrope_section, device=q.device))
        if position_ids is None:
            raise ValueError("packops.reference.rope: mrope_section needs position_ids of shape (3, ...)")
        ids = torch.where(inside.view(batch, tokens), per_token(position_ids, (3,)).long(), 0)
        c, s = cos[ids[axis].movedim(0, -1), pair], sin[ids[axis].movedim(0, -1), pair]

    def turn(heads: Tensor) -> Tensor:
        x = heads.double()
        x = {"thd": x[None], "bshd": x, "bhsd": x.transpose(1, 2)}[layout]
        before, turning, after = x.split([rotary_offset, rotary_dim, head_dim - rotary_offset - rotary_dim], dim=-1)
        first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
        cc, ss = c[:, :, None], s[:, :, None]
        parts = (first * cc - second * ss, second * cc + first * ss)
        turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
        out = torch.cat([before, torch.where(inside.view(batch, tokens, 1, 1), turned, turning), after], dim=-1)
        return {"thd": out[0], "bshd": out, "bhsd": out.transpose(1, 2)}[layout]

    return turn(q), None if k is None else turn(k)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """What :func:`packops.apply_qk_norm_rope` computes, in fp64 and differentiable by autograd."""
    layout = layout or ("thd" if q.dim() == 3 else "bshd")

    def normalise(heads: Tensor, weight: Tensor) -> Tensor:
        x, w = heads.double(), weight.double() + (1 if zero_centered else 0)
        x = x.transpose(1, 2) if layout == "bhsd" else x
        shape = x.shape
        across = weight.numel() != shape[-1]
        n = x.flatten(-2) if across else x
        n = (n / (n.square().mean(-1, keepdim=True) + eps).sqrt() * w).reshape(shape)
        if cu_seqlens is not None:
            token_shape = shape[:-2]
            inside = torch.arange(token_shape.numel(), device=x.device).view(*token_shape, 1, 1) < cu_seqlens[-1]
            n = torch.where(inside, n, x)
        return n.transpose(1, 2) if layout == "bhsd" else n

    k_normal = None if k is None or k_weight is None else normalise(k, k_weight)
    return rope(normalise(q, q_weight), k_normal, cos, sin, cu_seqlens=cu_seqlens, layout=layout, **options)


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
    """What :func:`packops.attention` computes, in fp64 and differentiable by autograd, from scores of all pairs of tokens."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    documents = documents_of(q.shape[1:2], cu_seqlens, q.device)
    token = torch.arange(q.shape[1], device=q.device)
    inside = documents.index >= 0
    q, k, v = (torch.where(inside[:, None], x, 0.0) for x in (q, k, v))  # padding may hold anything, NaN included
    place = token
    if parents is None:
        seen = (documents.index[:, None] == documents.index) & inside
    else:
        place, _, ends = packed_forest(cu_seqlens, len(token), parents)
        seen = (token[:, None] < ends) & inside
    if causal:
        seen &= token <= token[:, None]
    if window is not None:
        seen &= place > place[:, None] - window
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(inside[:, None], scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0), 0.0)
    return (weights @ v).transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """What :func:`packops.rms_norm` computes, in fp64 and differentiable by autograd."""
    x, weight = x.double(), weight.double() + zero_centered
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """What :func:`packops.add_rms_norm` computes, likewise. The sum is that of fp64, which nobody has rounded."""
    total = x.double() + residual.double()
    return rms_norm(total, weight, eps=eps, zero_centered=zero_centered), total


def gated_activation(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """What :func:`packops.gated_activation` computes, in fp64 and differentiable by autograd."""
    g = gate.double()
    act = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")
    return act * up.double()


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """What :func:`packops.gated_linear` computes, likewise."""
    return _linear(gated_activation(gate, up, activation=activation), weight, bias)


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
) -> Tensor:
    """What :func:`packops.gated_mlp` computes, likewise."""
    gate, up = _linear(x, gate_weight, gate_bias), _linear(x, up_weight, up_bias)
    return gated_linear(gate, up, down_weight, down_bias, activation=activation)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())
