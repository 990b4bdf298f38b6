"""Losses over several micro-batches and processes: the denominators they share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .data.batch import DENOMINATORS, PackedBatch, check_reduction
from .functional import packed_labels
from .ops.arguments import NUMBERS, check_plain, checks_annotations, describe
from .ops.document_sums import document_sums

__all__ = ["loss_normalizer"]


@checks_annotations
def loss_normalizer(
    labels_or_counts: Any,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    gradients: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""The ``num_items`` that makes micro-batches on several processes add up to one big batch.

    With it, ``cross_entropy(..., reduction=reduction, num_items=...)`` summed over the micro-batches of every process gives the
    loss :math:`\frac{1}{N} \sum_g \sum_{t \in g} \ell_t` of one batch of all their tokens (or, for the two sequence reductions,
    documents), and so do the gradients. N counts over all of them: neither a mean of micro-batch means nor of rank means.

    Args:
        labels_or_counts: this process's part of the step, one item or an iterable of one per micro-batch. An item is a
            :class:`packops.PackedBatch`, whose tokens count as much as its ``token_weight`` says; or a labels tensor, (T,) or
            (B, L) with a document a row; or a count, as a number or a one-element tensor without dimensions (tokens for
            ``"mean"``, documents for the others).
        reduction: ``"mean"`` counts scored tokens, ``"seq-mean-token-mean"`` and ``"seq-mean-token-sum"`` documents with at
            least one scored token.
        group: processes that share the step; None: the default group if ``torch.distributed`` is initialised, else this process.
            Every process of it must call; one without labels passes an empty iterable.
        cu_seqlens: documents of a (T,) labels tensor, for the sequence reductions and ``shift``.
        shift: as in :func:`packops.cross_entropy`: ``labels[i]`` is token i's own id, so that a document's first label is not
            scored. Labels of a :class:`packops.PackedBatch` need no ``shift``, theirs is masked.
        ignore_index: a label that is not scored.
        gradients: what the trainer does with gradients of several processes. ``"mean"`` (DDP, FSDP): N is divided by the number
            of processes, to make up for it. ``"sum"``: N itself.

    Returns:
        A float64 tensor without dimensions, where the labels are (for counts on the host, where the group communicates).
        Nothing waits for the device.

    Raises:
        ValueError: another ``reduction`` or ``gradients``, or labels whose documents are not known.
    """
    check_reduction(reduction, "packops.loss_normalizer: ")
    if gradients not in ("mean", "sum"):
        raise ValueError(f"packops.loss_normalizer: gradients must be 'mean' or 'sum', got {gradients!r}")
    is_one = isinstance(labels_or_counts, (PackedBatch, Tensor, *NUMBERS)) or not isinstance(labels_or_counts, Iterable)
    items: Iterable[Any] = [labels_or_counts] if is_one else labels_or_counts
    counts = [_count(item, reduction, cu_seqlens, shift, ignore_index) for item in items]
    on_device = next((c.device for c in counts if isinstance(c, Tensor) and not c.is_cpu), None)
    total = torch.zeros((), dtype=torch.float64, device=on_device or _communication_device(group))
    for count in counts:
        total += count
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
        if gradients == "mean":
            total /= dist.get_world_size(group)
    return total


def _count(item: Any, reduction: str, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Tensor | float:
    of_tokens = DENOMINATORS[reduction] == "tokens"
    if isinstance(item, PackedBatch):
        return item.denominator_of(reduction)
    if not isinstance(item, Tensor):
        if isinstance(item, bool) or not isinstance(item, NUMBERS):
            raise TypeError(f"packops.loss_normalizer: labels_or_counts must be batches, labels or numbers, got {describe(item)}")
        if not 0 <= item < math.inf:
            raise ValueError(f"packops.loss_normalizer: a count must be finite and at least 0, got {item}")
        return float(item)
    check_plain("packops.loss_normalizer", "labels_or_counts", item)
    if item.dtype == torch.bool or item.is_complex() or (item.is_floating_point() and item.dim()):
        got = f"{item.dtype} of shape {tuple(item.shape)}"
        raise TypeError(f"packops.loss_normalizer: labels must be integers, and a count a tensor of no dimension, got {got}")
    if item.dim() == 0:
        return _count(item.item(), reduction, None, shift, ignore_index) if item.is_cpu else item
    scored = item != ignore_index
    if cu_seqlens is not None:
        if shift:
            counts = packed_labels(item, cu_seqlens, ignore_index=ignore_index)[1]
        else:
            counts = document_sums(scored.double(), cu_seqlens)
        return counts.sum() if of_tokens else (counts > 0).sum()
    if item.dim() == 1 and (shift or not of_tokens):
        raise ValueError(
            f"packops.loss_normalizer: labels of shape {tuple(item.shape)} need cu_seqlens to tell their documents apart"
        )
    if shift:
        scored = scored[..., 1:]
    return scored.sum() if of_tokens else scored.any(-1).sum()


def _communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a number that is on the host must be for the group's backend."""
    if dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
