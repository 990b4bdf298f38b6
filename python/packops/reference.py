"""The specification in plain torch: what every packops op computes, in fp64, one readable formula at a time.

Tests, documentation and :func:`packops.verify` share these functions. They are slow and allocate freely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    cos, sin = cos.double()[..., :half], sin.double()[..., :half]

    # Tokens past the last document do not turn at all.
    index = torch.arange(batch * tokens, device=q.device)
    inside, start = torch.ones_like(index, dtype=torch.bool), index // max(tokens, 1) * tokens
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        inside = index < bounds[-1]
        start = index.clone()
        for begin, end in zip(bounds, bounds[1:], strict=False):
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
        ids = torch.where(inside.view(batch, tokens), per_token(position_ids, (3,)).long(), 0)
        c, s = cos[ids[axis].movedim(0, -1), pair], sin[ids[axis].movedim(0, -1), pair]

    def turn(heads: Tensor | None) -> Tensor | None:
        if heads is None:
            return None
        x = heads.double()
        x = {"thd": x[None], "bshd": x, "bhsd": x.transpose(1, 2)}[layout]
        before, turning, after = x.split([rotary_offset, rotary_dim, head_dim - rotary_offset - rotary_dim], dim=-1)
        first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
        cc, ss = c[:, :, None], s[:, :, None]
        parts = (first * cc - second * ss, second * cc + first * ss)
        turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
        out = torch.cat([before, torch.where(inside.view(batch, tokens, 1, 1), turned, turning), after], dim=-1)
        return {"thd": out[0], "bshd": out, "bhsd": out.transpose(1, 2)}[layout]

    return turn(q), turn(k)


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

    def normalise(heads: Tensor | None, weight: Tensor | None) -> Tensor | None:
        if heads is None or weight is None:
            return None
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

    return rope(normalise(q, q_weight), normalise(k, k_weight), cos, sin, cu_seqlens=cu_seqlens, layout=layout, **options)
