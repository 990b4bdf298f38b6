"""What the packed axis says about its tokens. Nothing here is differentiable: every input and output is an integer."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks
from .arguments import check_types, explain, kinds_of
from .op import register_fake

__all__ = ["packed_labels", "packed_metadata"]


def register(namespace: str) -> None:
    def metadata(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
        position_ids = cu_seqlens.new_empty((total_tokens,), dtype=torch.int64)
        return position_ids, cu_seqlens.new_empty((total_tokens,), dtype=torch.int32)

    def forest(cu_seqlens: Tensor, total_tokens: int, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seq_idx = cu_seqlens.new_empty((total_tokens,), dtype=torch.int32)
        return cu_seqlens.new_empty((total_tokens,), dtype=torch.int64), seq_idx, torch.empty_like(seq_idx)

    def labels_like(labels: Tensor, cu_seqlens: Tensor, *, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
        counts = cu_seqlens.new_empty((cu_seqlens.shape[0] - 1,), dtype=torch.int64)
        return labels.new_empty((labels.shape[0],)), counts

    register_fake(namespace, "packed_metadata", metadata)
    register_fake(namespace, "packed_forest", forest)
    register_fake(namespace, "packed_labels", labels_like)


_METADATA = {**kinds_of(torch.ops.packops.packed_metadata.default), "parents": "Tensor?"}
_LABELS = kinds_of(torch.ops.packops.packed_labels.default)


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    if not is_compiling() and _checks.enabled() and cu_seqlens.is_cuda:
        _checks.raise_bad_cu_seqlens(op, cu_seqlens, tokens)


@overload
def packed_metadata(cu_seqlens: Tensor, total_tokens: int, parents: None = None) -> tuple[Tensor, Tensor]: ...
@overload
def packed_metadata(cu_seqlens: Tensor, total_tokens: int, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
def packed_metadata(cu_seqlens: Tensor, total_tokens: int, parents: Tensor | None = None) -> tuple[Tensor, ...]:
    """Position ids and document ids of a packed axis, on the device of ``cu_seqlens`` and without a host sync.

    Args:
        cu_seqlens: (documents + 1,) int32 or int64, from 0 upwards. Document ``s`` is the tokens
            ``[cu_seqlens[s], cu_seqlens[s + 1])``. Empty documents are legal, so a ``cu_seqlens`` of fixed size (for CUDA
            graphs) repeats its last value.
        total_tokens: length of the packed axis, in tokens. Tokens at or past ``cu_seqlens[-1]`` are padding.
        parents: (documents,) int32 or int64, for documents that share prefixes: what each segment, which is then what
            ``cu_seqlens`` cuts, continues, or -1; depth first (:class:`packops.PackedForest`).

    Returns:
        ``position_ids`` (total_tokens,) int64, which restart at 0 in every document, and ``seq_idx`` (total_tokens,) int32, the
        number of each token's document. The padding is one trailing document: its positions restart at 0, its ``seq_idx`` is -1.
        With ``parents`` positions continue the parent's, ``seq_idx`` numbers segments, and ``ends`` (total_tokens,) int32 is a
        third result: token q sees token k if ``k <= q < ends[k]``. The ends of padding are 0.

    Raises:
        TypeError: ``cu_seqlens`` is not int32 or int64.
        ValueError: it is not one-dimensional or empty, or ``total_tokens`` is negative; on the CPU also if it does not start at
            0, decreases or exceeds ``total_tokens``. On CUDA such values give unspecified ids, never a bad memory access, and
            the error only if :func:`packops.checks` is on.
    """
    named = (("cu_seqlens", cu_seqlens), ("total_tokens", total_tokens), ("parents", parents))
    if is_compiling():
        check_types("packed_metadata", _METADATA, named)
        return _metadata(cu_seqlens, total_tokens, parents)
    try:
        if type(total_tokens) is not int:
            check_types("packed_metadata", _METADATA, named)
        _check_cu_seqlens("packed_metadata", cu_seqlens, total_tokens)
        return _metadata(cu_seqlens, total_tokens, parents)
    except Exception as error:
        explain(error, "packed_metadata", _METADATA, named)


def _metadata(cu_seqlens: Tensor, total_tokens: int, parents: Tensor | None) -> tuple[Tensor, ...]:
    if parents is None:
        return torch.ops.packops.packed_metadata(cu_seqlens, total_tokens)
    return torch.ops.packops.packed_forest(cu_seqlens, total_tokens, parents)


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
    named = (("labels", labels), ("cu_seqlens", cu_seqlens), ("shift", shift), ("ignore_index", ignore_index))
    if is_compiling():
        check_types("packed_labels", _LABELS, named)
        target, counts = torch.ops.packops.packed_labels(labels.reshape(-1), cu_seqlens, shift=shift, ignore_index=ignore_index)
        return target.view(labels.shape), counts
    try:
        if type(shift) is not bool or type(ignore_index) is not int:
            check_types("packed_labels", _LABELS, named)
        _check_cu_seqlens("packed_labels", cu_seqlens, labels.numel())
        target, counts = torch.ops.packops.packed_labels(labels.reshape(-1), cu_seqlens, shift=shift, ignore_index=ignore_index)
    except Exception as error:
        explain(error, "packed_labels", _LABELS, named)
    return target.view(labels.shape), counts
