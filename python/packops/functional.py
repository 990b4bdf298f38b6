"""The public functions of packops: arguments in the user's terms, one op call each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._errors import raise_typed
from ._register import qk_norm_rope as _qk_norm_rope
from ._register import rope as _rope


def apply_rope(
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
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate query and key heads by their positions (rotary position embedding, Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Every pair ``(x, y)`` of a head becomes ``(x cos - y sin, y cos + x sin)``, in fp32 (fp64 for fp64 input) with one rounding at
    the end. q and k go in one launch, and nothing is copied or converted first. Differentiable in q and k; the gradient is the
    exact transpose, also where ``cos² + sin² != 1`` (YaRN).

    Args:
        q: ``(T, heads, head_dim)``, or 4-D, see ``layout``; bf16, fp16, fp32 (fp64 on the CPU). Any strides with contiguous
            features: transposed views and slices of a fused qkv tensor are read where they lie.
        k: like q with its own number of heads, or None.
        cos, sin: the table, ``(positions, rotary_dim / 2)`` as :func:`rope_table` makes it, or ``(positions, rotary_dim)`` with
            both halves alike as Hugging Face makes it; any float dtype.
        position_ids: int32 or int64, one per token: ``(T,)``, ``(B, S)`` or ``(1, S)``; ``(3, ...)`` of these with
            ``mrope_section``.
        cu_seqlens: ``(documents + 1,)`` int32 or int64. Positions restart at each document, counted over the flattened tokens;
            tokens past the last document pass through unchanged. Together with ``position_ids`` it only says which those are.
            With neither, positions are ``0 .. S-1`` in every batch row (``0 .. T-1`` for ``"thd"``).
        layout: ``"thd"`` for 3-D input; ``"bshd"`` (the default) or ``"bhsd"`` for 4-D input.
        interleaved: pairs are features ``(2i, 2i+1)`` (GPT-J, Meta) instead of ``(i, i + rotary_dim/2)`` (Hugging Face, GPT-NeoX).
        rotary_dim: how many features of a head turn; the others pass through bit for bit. None: twice the width of ``cos``, or
            its width where twice that is more than a head. A table with both halves alike that is narrower than a head (partial
            rotary in Hugging Face) therefore needs ``rotary_dim=cos.shape[-1]``.
        rotary_offset: first feature that turns: 0 for the leading part, ``head_dim - rotary_dim`` for the trailing part (MLA).
        mrope_section: three numbers of pairs that add up to ``rotary_dim / 2``: which of the three ``position_ids`` turns them,
            in contiguous blocks (Qwen2-VL); with ``mrope_interleaved`` axis 1 takes pairs 1, 4, 7, ... below ``3 * section[1]``,
            axis 2 takes 2, 5, 8, ... below ``3 * section[2]``, axis 0 the rest (Qwen3-VL).
        per_token_table: row t of ``cos`` and ``sin`` belongs to token t: ``(T, width)``, ``(B, S, width)`` or ``(1, S, width)``.
        inplace: write over q and k, and return them. Not for leaves that need a gradient.

    Returns:
        ``(q, k)`` rotated; k is None where it was. New tensors are dense, in the memory order of their inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        IndexError: a position outside the table, on the CPU. On CUDA the rotated features of such a token are NaN and their
            gradients 0.
    """
    tables = (cos, sin, position_ids, cu_seqlens)
    if torch.compiler.is_compiling():
        return _apply_rope_compiled(
            q,
            k,
            inplace,
            tables,
            dict(
                layout=layout,
                rotary_dim=rotary_dim,
                rotary_offset=rotary_offset,
                interleaved=interleaved,
                mrope_section=mrope_section,
                mrope_interleaved=mrope_interleaved,
                per_token_table=per_token_table,
            ),
        )
    options = (layout, rotary_dim, rotary_offset, interleaved, mrope_section, mrope_interleaved, per_token_table)
    try:
        if inplace:
            _rope.rotate_in_place(_raw, _raw_in_place, q, k, tables, options)
            return q, k
        if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
            _rope.check_tables_are_constant(cos, sin)
            return _rope.Rope.apply(_raw, q, k, *tables, options, False)
        return _raw(q, k, *tables, *options)
    except RuntimeError as error:
        raise_typed(error)


def _apply_rope_compiled(q, k, inplace, tables, options):
    cos, sin, position_ids, cu_seqlens = tables
    keywords = dict(options, position_ids=position_ids, cu_seqlens=cu_seqlens)
    if not inplace:
        return torch.ops.packops.rope(q, k, cos, sin, **keywords)
    if not torch.is_grad_enabled() or not (q.requires_grad or (k is not None and k.requires_grad)):
        torch.ops.packops.rope_(q, k, cos, sin, **keywords)
        return q, k
    # A graph has no use for an in-place autograd function: the functional op, then what the caller asked to see.
    q_out, k_out = torch.ops.packops.rope(q, k, cos, sin, **keywords)
    q.copy_(q_out)
    if k is not None:
        k.copy_(k_out)
    return q, k


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
    tensors = (q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens)
    if torch.compiler.is_compiling():
        return torch.ops.packops.qk_norm_rope(
            *tensors,
            eps=eps,
            zero_centered=zero_centered,
            layout=layout,
            rotary_dim=rotary_dim,
            rotary_offset=rotary_offset,
            interleaved=interleaved,
            mrope_section=mrope_section,
            mrope_interleaved=mrope_interleaved,
            per_token_table=per_token_table,
        )
    options = (eps, zero_centered, layout, rotary_dim, rotary_offset, interleaved, mrope_section, mrope_interleaved, per_token_table)
    try:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:4]):
            _rope.check_tables_are_constant(cos, sin)
            return _qk_norm_rope.QkNormRope.apply(_raw_norm, _raw_norm_backward, *tensors, options)
        return _raw_norm(*tensors, *options)
    except RuntimeError as error:
        raise_typed(error)


_raw = torch.ops.packops._rope.default
_raw_in_place = torch.ops.packops._rope_.default
_raw_norm = torch.ops.packops._qk_norm_rope.default
_raw_norm_backward = torch.ops.packops._qk_norm_rope_backward.default
