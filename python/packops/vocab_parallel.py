"""The loss where each process of a tensor-parallel group holds some of the classes: nobody ever sees a whole row of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks
from ._errors import raise_typed
from ._register import ce_loss as _ce
from ._register import vocab_parallel as _vp
from .functional import Reduction, _as_num_items

_OPS = _vp.raw_ops("packops")


def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
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
) -> Tensor:
    """:func:`packops.cross_entropy` of logits whose classes are split over the processes of ``group``.

    Rank r of the group holds the classes after those of ranks 0 .. r-1. All ranks pass the same labels and options, and get the
    same loss, bit for bit; each gets the gradient of its own logits. What travels is one all-gather of four fp32 numbers per
    row: the shard's maximum, its sum of exponentials, the label's logit where the shard has it, and the sum that label smoothing
    needs. Nothing waits for the device, and on NCCL the whole can be captured in a CUDA graph.

    The logits are read once in the forward and once in the backward, which writes the gradient.

    Args:
        local_logits: (..., V_local), this rank's columns; bf16, fp16 or fp32 (fp64 on the CPU). Rows may be strided, so that the
            last rank's padding columns are sliced off without a copy: ``logits[..., :real]``. V_local may be 0.
        labels: (...) int32 or int64, numbered over the whole vocabulary; the same on every rank.
        group: the processes that share the vocabulary; None: the default group.
        shard_sizes: every rank's V_local, in rank order. None: all are as wide as this one. The loss is NaN on CUDA, and on the
            CPU a ValueError, if that is not so.
        class_weight: (V,) float per class of the whole vocabulary, the same on every rank.
        num_items: as in :func:`packops.cross_entropy`. Count tokens once per data-parallel rank, not once per rank of ``group``:
            ``loss_normalizer(..., group=data_parallel_group)``.
        inplace: the backward overwrites the logits with their gradient. The logits must not be a leaf.
        cu_seqlens, shift, reduction, ignore_index, token_weight, label_smoothing, z_loss, softcap, logit_scale: as in
            :func:`packops.cross_entropy`; label smoothing spreads over the whole vocabulary.

    Returns:
        The loss of the whole vocabulary, fp32 (fp64 for fp64 logits), the same on every rank. Its gradient is that of
        ``local_logits`` alone; where hidden states are replicated, the layer before must add up theirs over ``group``, as
        tensor-parallel output layers do.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; it is named.
        IndexError: a label outside [0, V) that is not ``ignore_index``, on the CPU and under :func:`packops.checks`; else that
            row's loss is NaN and its gradient 0.
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    shard = _shard_of(local_logits, group, shard_sizes, "vocab_parallel_cross_entropy")
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
    if inplace and local_logits.is_leaf and local_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "packops.vocab_parallel_cross_entropy: inplace=True would overwrite a leaf tensor that needs its value; "
            "pass a computed one"
        )
    try:
        loss, ints = _apply(shard, local_logits, labels, options, inplace)
    except RuntimeError as error:
        raise_typed(error)
    if local_logits.is_cuda and _checks.enabled():
        _checks.raise_bad_rows(
            labels, cu_seqlens, ints[_ce.TARGET], shift=shift, ignore_index=ignore_index, vocab=shard.vocab_size
        )
    return loss


class Shard(NamedTuple):
    """Which classes this process holds, and how to hear of the others."""

    first_class: int
    vocab_size: int
    gather: Callable[[Tensor], Tensor]

    @property
    def classes(self) -> dict[str, int]:
        return {"first_class": self.first_class, "vocab_size": self.vocab_size}


@torch.compiler.disable(reason="it communicates over a process group")
def _apply(shard: Shard, local_logits: Tensor, labels: Tensor, options: dict, inplace: bool) -> tuple[Tensor, Tensor]:
    return _vp.VocabParallelCrossEntropyFunction.apply(
        _OPS, shard.gather, local_logits, labels, options, shard.classes, inplace
    )


def _shard_of(local: Tensor, group: dist.ProcessGroup | None, shard_sizes: Sequence[int] | None, op: str) -> Shard:
    """The shard that this rank's columns (the last dimension of ``local``) are."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"packops.{op}: torch.distributed is not initialised, so there is no group to share a vocabulary")
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"packops.{op}: this process is not in group")
    if local.dim() == 0:
        raise ValueError(f"packops.{op}: local_logits must have shape (..., V_local), got a 0-d tensor")
    width = local.shape[-1]
    sizes = [width] * world_size if shard_sizes is None else [int(size) for size in shard_sizes]
    if len(sizes) != world_size:
        raise ValueError(f"packops.{op}: shard_sizes must have one entry per rank ({world_size}), got {len(sizes)}")
    if min(sizes) < 0 or sizes[rank] != width:
        raise ValueError(f"packops.{op}: shard_sizes must hold this rank's width, {width}, at place {rank}, got {sizes}")

    def gather(partial: Tensor) -> Tensor:
        partials = partial.new_empty(world_size * partial.numel())
        # torch 2.13 renamed it, and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(partials, partial, group=group)
        if partials.is_cuda and _checks.enabled():
            _raise_bad_shards(partials.view(world_size, -1), op, sum(sizes))
        return partials

    return Shard(sum(sizes[:rank]), sum(sizes), gather)


def _raise_bad_shards(partials: Tensor, op: str, vocab_size: int) -> None:
    """ValueError unless the shards, as their owners describe them, follow each other and make up the vocabulary."""
    begins, widths = partials[:, -2:].long().T.tolist()
    ends = [sum(widths[: r + 1]) for r in range(len(widths))]
    if begins != [0, *ends[:-1]] or ends[-1] != vocab_size:
        raise ValueError(
            f"packops.{op}: the shards of the vocabulary do not line up: their widths are {widths}, they begin at {begins}, in a "
            f"vocabulary of {vocab_size}; shards that differ in width need shard_sizes"
        )
