"""The public operations: arguments are put in order here, the work is done by ``torch.ops.packops``."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._errors import raise_typed
from ._register import ce_loss as _ce

Reduction = Literal["none", "sum", "mean", "seq-mean-token-mean", "seq-mean-token-sum"]

_CE_OPS = _ce.raw_ops("packops")


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
    if inplace and needs_grad and logits.is_leaf:
        raise ValueError(
            "packops.cross_entropy: inplace=True would overwrite a leaf tensor that needs its value; pass a computed one"
        )
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
