"""The public operations: arguments are put in order here, the work is done by ``torch.ops.packops``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import _checks
from ._errors import raise_typed
from ._register import attention as _attention
from ._register import ce_loss as _ce
from ._register import gated_linear as _gated
from ._register import qk_norm_rope as _qk_norm_rope
from ._register import rms_norm as _rms_norm
from ._register import rope as _rope

Activation = Literal["silu", "gelu_tanh", "gelu"]
Reduction = Literal["none", "sum", "mean", "seq-mean-token-mean", "seq-mean-token-sum"]

_CE_OPS = _ce.raw_ops("packops")
_ROPE = torch.ops.packops._rope.default
_ROPE_IN_PLACE = torch.ops.packops._rope_.default
_QK_NORM_ROPE = torch.ops.packops._qk_norm_rope.default
_QK_NORM_ROPE_BACKWARD = torch.ops.packops._qk_norm_rope_backward.default
_ATTENTION = torch.ops.packops._attention.default
_ATTENTION_BACKWARD = torch.ops.packops._attention_backward.default
_RMS_NORM = torch.ops.packops._rms_norm.default
_RMS_NORM_BACKWARD = torch.ops.packops._rms_norm_backward.default
_GATED = torch.ops.packops._gated_activation.default
_GATED_BACKWARD = torch.ops.packops._gated_activation_backward.default


class CrossEntropyStats(NamedTuple):
    """What the loss kernel saw on its way; none of it is differentiable. ``T`` rows have the labels' shape."""

    num_tokens: Tensor  #: () int64: rows that counted
    num_sequences: Tensor  #: () int64: documents with at least one row that counted
    lse: Tensor  #: (...) log-sum-exp of the (scaled, capped) logits; 0 where ignored
    entropy: Tensor  #: (...) of the softmax, in nats; 0 where ignored
    prediction: Tensor  #: (...) int64 argmax, the first index on ties; -1 where ignored
    correct: Tensor  #: (...) bool: counted and prediction == label
    sequence_loss: Tensor  #: (documents,) mean loss of each document (its sum for "seq-mean-token-sum"); 0 if none counted


def _as_num_items(num_items: Tensor | float | None) -> Tensor | None:
    # A number becomes a host tensor: the op reads it there, so it costs neither a copy to the device nor a wait for it.
    if num_items is None or isinstance(num_items, Tensor):
        return num_items
    return torch.tensor(num_items, dtype=torch.float64)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""Cross entropy that knows where packed documents end and by what its loss is divided.

    With :math:`x' = c \tanh(x s / c)` (``softcap`` c, ``logit_scale`` s) a row with target y loses

    .. math:: \ell = w \left[(1-\epsilon)\, u_y\,(\mathrm{lse} - x'_y)
              + \tfrac{\epsilon}{V} \sum_c u_c\,(\mathrm{lse} - x'_c) + z\,\mathrm{lse}^2\right]

    with ``token_weight`` w, ``class_weight`` u, ``label_smoothing`` ε (as torch defines them) and ``z_loss`` z. The maths is
    fp32 whatever the logits' dtype (fp64 for fp64), and so is the loss.

    Args:
        logits: (..., V) bf16, fp16 or fp32 (fp64 on the CPU); rows may be strided, the last dimension contiguous.
        labels: (...) int32 or int64.
        cu_seqlens: (S+1,) int32 or int64 on the logits' device: where each of S documents begins in the flattened rows, as
            attention kernels take it. Rows at or past ``cu_seqlens[-1]`` are padding and never count; empty documents are legal.
            Without it every row of a (..., L, V) batch is one document of length L.
        shift: False: row i is scored against ``labels[i]``. True: against ``labels[i+1]``, and the last row of every document
            against nothing. Labels already masked at the boundaries give the same result.
        reduction: ``"none"`` (per token, 0 where ignored), ``"sum"``, ``"mean"`` = Σ wℓ / Σ w over counted tokens,
            ``"seq-mean-token-mean"`` = mean over documents of the document's mean, ``"seq-mean-token-sum"`` = mean over
            documents of the document's sum. Documents without a counted token do not count.
        num_items: replaces the local denominator (tokens for "mean", documents for the two others) by a global count over
            micro-batches and ranks: a number, or a one-element tensor of any numeric dtype on the device or the host.
        ignore_index: this label does not count.
        token_weight: (...) float per token.
        class_weight: (V,) float per class.
        inplace: overwrite the logits with their gradient: O(rows) extra memory. The logits must not be a leaf.
        return_stats: also return :class:`CrossEntropyStats`.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): () or, for ``"none"``, the labels' shape. If nothing counts the loss is 0 and
        the gradient 0, where torch gives NaN. Differentiable once with respect to the logits, for any ``grad_output``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; it is named.
        IndexError: a label outside [0, V) that is not ``ignore_index``, on the CPU. On CUDA that row's loss is NaN and its
            gradient 0, unless :func:`packops.checks` is on.
    """
    options = {
        "cu_seqlens": cu_seqlens,
        "shift": shift,
        "reduction": reduction,
        "num_items": _as_num_items(num_items),
        "ignore_index": ignore_index,
        "token_weight": token_weight,
        "class_weight": class_weight,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    if torch.compiler.is_compiling():
        if not return_stats:
            return torch.ops.packops.cross_entropy(logits, labels, **options)
        loss, *state = torch.ops.packops.cross_entropy_stats(logits, labels, **options)
        return loss, _stats(labels.shape, *state)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_grad:
        _ce.check_may_overwrite(logits, "cross_entropy")
    try:
        if needs_grad:
            loss, *state = _ce.CrossEntropyFunction.apply(_CE_OPS, logits, labels, options, return_stats, inplace)
        else:
            loss, _, *state = _CE_OPS.forward(logits, labels, **options, with_stats=return_stats)
    except RuntimeError as error:
        raise_typed(error)
    if logits.is_cuda and _checks.enabled():
        _checks.raise_bad_rows(
            labels, cu_seqlens, state[1][_ce.TARGET], shift=shift, ignore_index=ignore_index, vocab=logits.shape[-1]
        )
    return (loss, _stats(labels.shape, *state)) if return_stats else loss


def _stats(shape: torch.Size, floats: Tensor, ints: Tensor, counts: Tensor, sequence_loss: Tensor) -> CrossEntropyStats:
    target, prediction = ints[_ce.TARGET], ints[_ce.PREDICTION]
    counted = target >= 0
    lse = torch.where(counted, floats[_ce.MAX] + floats[_ce.SUM].log(), 0.0)
    return CrossEntropyStats(
        num_tokens=counts[0],
        num_sequences=counts[1],
        lse=lse.view(shape),
        entropy=floats[_ce.ENTROPY].view(shape),
        prediction=prediction.long().view(shape),
        correct=(counted & (prediction == target)).view(shape),
        sequence_loss=sequence_loss,
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_valid: int | None = None,
    chunk_tokens: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, labels, ...)`` without the logits: the lm_head and the loss in one.

    The logits exist a chunk of tokens at a time. Their gradient, and from it those of ``hidden``, ``weight`` and ``bias``, are
    formed while they do; a gradient nobody wants (``requires_grad=False``) costs no product. Peak memory beyond the gradients is
    at most 0.35 of what the logits would take for 3000 tokens or more, plus the accumulators (see ``accum_dtype``). Nothing waits
    for the device.

    Args:
        hidden: (..., H) bf16, fp16 or fp32 (fp64 on the CPU): what the lm_head is applied to. Rows that do not count may hold
            anything, NaN included.
        weight: (V, H), of the same dtype: a plain tensor. FSDP gathers it for the forward of the module that owns it, so the loss
            belongs there.
        labels: (...) int32 or int64.
        bias: (V,) or None.
        cu_seqlens, shift, reduction, num_items, ignore_index, token_weight, class_weight, label_smoothing, z_loss, softcap,
            logit_scale: as in :func:`cross_entropy`.
        num_valid: how many rows count, after ``shift``, boundaries and ``ignore_index``, or an upper bound of it: a host int,
            which whoever packed the batch knows (``PackedBatch.num_valid``). Then the other rows cost no matrix product. If more
            rows count, that is a ValueError on the CPU, and on CUDA with :func:`packops.checks` on; otherwise the loss is NaN.
        chunk_tokens: rows of a chunk; None: chosen from the shapes. Fewer need less memory; below about 1000 the matrix units
            idle.
        accum_dtype: in which the gradients are accumulated over the chunks: ``torch.float32`` (``4 V H + 4 T H`` bytes, held
            until the backward), or for bf16 parameters ``torch.bfloat16`` (half of that, and less accurate with every chunk).

    Returns:
        The loss, fp32 (fp64 for fp64): () or, for ``"none"``, the labels' shape. Differentiable once, for any ``grad_output``.
        ``reduction="none"`` makes the logits twice if ``weight`` or ``bias`` needs a gradient: in the backward again, because
        the weight's gradient depends on each token's ``grad_output``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cross_entropy`.
    """
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            "packops.linear_cross_entropy: weight must be a plain tensor, got a DTensor, a sharded parameter; compute the loss "
            "within the forward of the module that owns it, where FSDP has gathered it"
        )
    if num_valid is not None and isinstance(num_valid, Tensor):
        raise TypeError(
            "packops.linear_cross_entropy: num_valid must be an int on the host, got a Tensor; reading it would wait for the "
            "device"
        )
    return torch.ops.packops.linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        reduction=reduction,
        num_items=_as_num_items(num_items),
        ignore_index=ignore_index,
        token_weight=token_weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        num_valid=num_valid,
        chunk_tokens=chunk_tokens,
        accum_dtype=accum_dtype,
    )


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens.is_cuda and not torch.compiler.is_compiling() and _checks.enabled():
        _checks.raise_bad_cu_seqlens(op, cu_seqlens, tokens)


def packed_metadata(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
    """Position ids and document ids of a packed axis, on the device of ``cu_seqlens`` and without a host sync.

    Args:
        cu_seqlens: (documents + 1,) int32 or int64, from 0 upwards. Document ``s`` is the tokens
            ``[cu_seqlens[s], cu_seqlens[s + 1])``. Empty documents are legal, so a ``cu_seqlens`` of fixed size (for CUDA
            graphs) repeats its last value.
        total_tokens: length of the packed axis, in tokens. Tokens at or past ``cu_seqlens[-1]`` are padding.

    Returns:
        ``position_ids`` (total_tokens,) int64, which restart at 0 in every document, and ``seq_idx`` (total_tokens,) int32, the
        number of each token's document. The padding is one trailing document: its positions restart at 0, its ``seq_idx`` is -1.

    Raises:
        TypeError: ``cu_seqlens`` is not int32 or int64.
        ValueError: it is not one-dimensional or empty, or ``total_tokens`` is negative; on the CPU also if it does not start at
            0, decreases or exceeds ``total_tokens``. On CUDA such values give unspecified ids, never a bad memory access, and
            the error only if :func:`packops.checks` is on.
    """
    _check_cu_seqlens("packed_metadata", cu_seqlens, total_tokens)
    try:
        return torch.ops.packops.packed_metadata(cu_seqlens, total_tokens)
    except RuntimeError as error:
        raise_typed(error)


def packed_labels(labels: Tensor, cu_seqlens: Tensor, *, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Labels of a packed axis that never score one document's token against another document, and how many each document has.

    Args:
        labels: int32 or int64, ``labels[t]`` is token t's own id or ``ignore_index`` (as Hugging Face passes them). Any shape,
            of as many elements as the packed axis has tokens.
        cu_seqlens: (documents + 1,) int32 or int64 on the same device; see :func:`packed_metadata`.
        shift: True returns next-token targets: row t holds ``labels[t + 1]``, a document's last row ``ignore_index``.
            False returns labels that a model shifts later: unchanged, but ``ignore_index`` at every document's first token.
        ignore_index: what a row that is not scored holds. Padding always does.

    Returns:
        ``target``, of the shape and dtype of ``labels``, and ``counts`` (documents,) int64: scored tokens per document, the same
        for both values of ``shift``. ``counts.sum()`` is the token count of a mean loss, ``(counts > 0).sum()`` its documents.

    Raises:
        TypeError, ValueError: as :func:`packed_metadata`, and where ``labels`` and ``cu_seqlens`` are on two devices.
    """
    _check_cu_seqlens("packed_labels", cu_seqlens, labels.numel())
    try:
        target, counts = torch.ops.packops.packed_labels(labels.reshape(-1), cu_seqlens, shift=shift, ignore_index=ignore_index)
    except RuntimeError as error:
        raise_typed(error)
    return target.view(labels.shape), counts


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
        cu_seqlens: ``(documents + 1,)`` int32 or int64. Positions restart at each document, counted over flattened tokens;
            tokens past the last document pass through unchanged. Together with ``position_ids`` it only says which those are.
            With neither, positions are ``0 .. S-1`` in every batch row (``0 .. T-1`` for ``"thd"``).
        layout: ``"thd"`` for 3-D input; ``"bshd"`` (the default) or ``"bhsd"`` for 4-D input.
        interleaved: pairs are features ``(2i, 2i+1)`` (GPT-J, Meta), not ``(i, i + rotary_dim/2)`` (Hugging Face, GPT-NeoX).
        rotary_dim: how many features of a head turn; the others pass through bit for bit. None: twice the width of ``cos``, or
            its width where twice that is more than a head. A table with both halves alike that is narrower than a head (partial
            rotary in Hugging Face) therefore needs ``rotary_dim=cos.shape[-1]``.
        rotary_offset: first feature that turns: 0 for the leading part, ``head_dim - rotary_dim`` for the trailing part (MLA).
        mrope_section: three numbers of pairs that add up to ``rotary_dim / 2``: which of the three ``position_ids`` turns them,
            in contiguous blocks (Qwen2-VL); with ``mrope_interleaved`` axis 1 takes pairs 1, 4, 7, ... below
            ``3 * section[1]``, axis 2 takes 2, 5, 8, ... below ``3 * section[2]``, axis 0 the rest (Qwen3-VL).
        per_token_table: row t of ``cos`` and ``sin`` belongs to token t: ``(T, width)``, ``(B, S, width)`` or ``(1, S, width)``.
        inplace: write over q and k, and return them. Not for leaves that need a gradient.

    Returns:
        ``(q, k)`` rotated; k is None where it was. New tensors are dense, in the memory order of their inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        IndexError: a position outside the table, on the CPU. On CUDA the rotated features of such a token are NaN and their
            gradients 0, unless :func:`packops.checks` is on.
    """
    tables = (cos, sin, position_ids, cu_seqlens)
    if torch.compiler.is_compiling():
        return _apply_rope_compiled(
            q,
            k,
            inplace,
            tables,
            {
                "layout": layout,
                "rotary_dim": rotary_dim,
                "rotary_offset": rotary_offset,
                "interleaved": interleaved,
                "mrope_section": mrope_section,
                "mrope_interleaved": mrope_interleaved,
                "per_token_table": per_token_table,
            },
        )
    options = (layout, rotary_dim, rotary_offset, interleaved, mrope_section, mrope_interleaved, per_token_table)
    if q.is_cuda and _checks.enabled():
        _checks.raise_bad_positions("rope", q, cos, position_ids, cu_seqlens, layout, per_token_table)
    try:
        if inplace:
            _rope.rotate_in_place(_ROPE, _ROPE_IN_PLACE, q, k, tables, options)
            return q, k
        if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
            _rope.check_tables_are_constant(cos, sin)
            return _rope.Rope.apply(_ROPE, q, k, *tables, options, False)
        return _ROPE(q, k, *tables, *_rope.given(options))
    except RuntimeError as error:
        raise_typed(error)


def _apply_rope_compiled(
    q: Tensor, k: Tensor | None, inplace: bool, tables: tuple, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
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
    options = (
        eps,
        zero_centered,
        layout,
        rotary_dim,
        rotary_offset,
        interleaved,
        mrope_section,
        mrope_interleaved,
        per_token_table,
    )
    if q.is_cuda and _checks.enabled():
        _checks.raise_bad_positions("qk_norm_rope", q, cos, position_ids, cu_seqlens, layout, per_token_table)
    try:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:4]):
            _rope.check_tables_are_constant(cos, sin)
            return _qk_norm_rope.QkNormRope.apply(_QK_NORM_ROPE, _QK_NORM_ROPE_BACKWARD, *tensors, options)
        return _QK_NORM_ROPE(*tensors, *options)
    except RuntimeError as error:
        raise_typed(error)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
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
            later, and ``head_dim`` 64, 128 or 256; on the CPU also fp32 and fp64, and any ``head_dim``, in plain code:
            ``scaled_dot_product_attention`` per document is faster there.
        k, v: ``(T, kv_heads, head_dim)``, where ``kv_heads`` divides ``heads``: query head h meets ``h * kv_heads // heads``.
        cu_seqlens: ``(documents + 1,)`` int32 or int64, where documents begin, on the device of ``q``. Tokens at or past
            ``cu_seqlens[-1]`` are padding: their rows of the result and of all gradients are 0, whatever they hold.
        causal: a token sees no later one.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it. Only with ``causal``.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None: as they are.
        scale: of the products of queries and keys, positive; None: ``head_dim ** -0.5``.

    Returns:
        ``(T, heads, head_dim)``, contiguous, of the dtype of ``q``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what it got and what it wants.
        ValueError: ``cu_seqlens`` that do not start at 0, decrease, or end past T; on CUDA only with :func:`packops.checks` on
            (without, no address outside the tensors is read, and what comes out is unspecified).
    """
    rule = (causal, window, softcap, scale)
    if torch.compiler.is_compiling():
        return torch.ops.packops._attention(q, k, v, cu_seqlens, *rule)[0]
    if cu_seqlens.is_cuda and _checks.enabled():
        _checks.raise_bad_cu_seqlens("attention", cu_seqlens, q.shape[0])
    try:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _attention.Attention.apply(_ATTENTION, _ATTENTION_BACKWARD, q, k, v, cu_seqlens, rule)
        return _ATTENTION(q, k, v, cu_seqlens, *rule)[0]
    except RuntimeError as error:
        raise_typed(error)


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
    if torch.compiler.is_compiling():
        return torch.ops.packops.rms_norm(x, weight, eps=eps, zero_centered=zero_centered)
    try:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _rms_norm.RmsNorm.apply(_RMS_NORM, _RMS_NORM_BACKWARD, x, weight, eps, zero_centered)
        return _RMS_NORM(x, weight, eps, zero_centered)
    except RuntimeError as error:
        raise_typed(error)


def gated_activation(gate: Tensor, up: Tensor, *, activation: Activation = "silu") -> Tensor:
    """``act(gate) * up``, the gate of a SwiGLU or GeGLU, in one pass forward and one backward; autograd keeps gate and up only.

    Args:
        gate, up: (..., columns) of one dtype, bf16, fp16 or fp32 (fp64 on the CPU). The last dimension is contiguous, rows may
            lie apart: the two halves of a fused projection are not copied.
        activation: ``"silu"``, ``"gelu_tanh"`` (the tanh approximation) or ``"gelu"`` (erf).

    Returns:
        The product, contiguous, computed in fp32 (fp64 for fp64) and rounded once. Differentiable once, in gate and up.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; it is named.
    """
    if torch.compiler.is_compiling():
        return torch.ops.packops.gated_activation(gate, up, activation=activation)
    try:
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            return _gated.GatedActivation.apply(_GATED, _GATED_BACKWARD, gate, up, activation)
        return _GATED(gate, up, activation)
    except RuntimeError as error:
        raise_typed(error)


def gated_linear(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "silu"
) -> Tensor:
    """``linear(act(gate) * up, weight, bias)``, the second half of a gated MLP. Autograd keeps gate, up and weight.

    Eager code keeps act(gate) and the product as well, twice the memory. Here the backward pass makes the product anew, in the
    kernel that makes the gradients of gate and up. What needs no gradient costs no matrix product.

    Args:
        gate, up, activation: as in :func:`gated_activation`.
        weight: (features, columns), of their dtype: a plain tensor.
        bias: (features,) or None.

    Returns:
        (..., features). Under autocast all inputs are cast as for a linear layer. Differentiable once.

    Raises:
        TypeError, ValueError: as :func:`gated_activation`.
    """
    kind = gate.device.type
    if torch.is_autocast_enabled(kind):
        gate, up, weight = (_autocast(x, kind) for x in (gate, up, weight))
        bias = None if bias is None else _autocast(bias, kind)
    _check_projection(gate, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gate, up, weight, bias)):
        try:
            return _gated.GatedLinear.apply(_GATED, _GATED_BACKWARD, gate, up, weight, bias, activation)
        except RuntimeError as error:
            raise_typed(error)
    return linear(gated_activation(gate, up, activation=activation), weight, bias)


def _autocast(x: Tensor, kind: str) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))


def _check_projection(gate: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors that name the arguments of :func:`gated_linear`; torch's would name those of a product."""
    columns = gate.shape[-1] if gate.dim() else 1
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise ValueError(
            f"packops.gated_linear: weight must have shape (features, {columns}) for gate {tuple(gate.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    for name, x, shape in (("weight", weight, weight.shape), ("bias", bias, weight.shape[:1])):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"packops.gated_linear: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != gate.dtype:
            raise TypeError(f"packops.gated_linear: {name} must have the dtype of gate, {gate.dtype}, got {x.dtype}")
        if x.device != gate.device:
            raise ValueError(f"packops.gated_linear: {name} must be on the device of gate, {gate.device}, got {x.device}")
