"""The loss where each process of a tensor-parallel group holds some of the classes: nobody ever sees a whole row of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .._errors import raise_typed
from . import autocast, lm_head, vocab_shard
from . import ce_loss as ce
from . import linear_ce_loss as linear
from . import linear_log_probs as lp
from .arguments import check_types, with_options_of
from .ce_loss import as_num_items
from .derivatives import check_constants, refuse_transforms

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .ce_loss import CrossEntropyOptions
    from .linear_ce_loss import LinearCrossEntropyOptions
    from .linear_log_probs import LinearLogProbsOptions

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy", "vocab_parallel_linear_log_probs"]

_OPS = vocab_shard.raw_ops("packops")

UNLIKE_SHARDS = "the shards of the vocabulary do not line up:"
REFUSED = -1  # a rank says so instead of a width


@with_options_of(ce.cross_entropy, without=("return_stats",))
def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    **options: Unpack[CrossEntropyOptions],
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
        shard_sizes: every rank's V_local, in rank order. None: all are as wide as this one. If that is not so, all ranks raise
            a ValueError on the CPU; on CUDA, where telling each other would wait for the device, the loss is NaN.
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
    op = "vocab_parallel_cross_entropy"
    options["num_items"] = as_num_items(op, options["num_items"])
    _check(op, {"local_logits": local_logits, "labels": labels, **options})
    inplace = options.pop("inplace")
    if local_logits.dim() == 0:
        raise ValueError(f"packops.{op}: local_logits must have shape (..., V_local), got a 0-d tensor")
    shard = _shard(local_logits.shape[-1], group, shard_sizes, op, labels)[0]
    if inplace and local_logits.requires_grad and torch.is_grad_enabled():
        ce.check_may_overwrite(local_logits, op)
    try:
        loss, ints = _apply(
            vocab_shard.VocabParallelCrossEntropyFunction.apply, _OPS, shard, local_logits, labels, options, inplace
        )
    except Exception as error:
        raise_typed(error, op)
    if local_logits.is_cuda and _checks.enabled():
        rule = {"shift": options["shift"], "ignore_index": options["ignore_index"], "vocab": shard.vocab_size}
        _checks.raise_bad_rows(labels, options["cu_seqlens"], ints[ce.TARGET], op=op, **cast(Any, rule))
    return loss


@with_options_of(linear.linear_cross_entropy, without=("bias", "return_stats"))
def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    local_weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    local_bias: Tensor | None = None,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor:
    """:func:`packops.linear_cross_entropy` with the rows of ``weight`` split over the processes of ``group``.

    Every rank has all hidden states and some classes of the lm_head, and holds one chunk of their logits at a time. A chunk's
    ranks exchange four fp32 numbers per row (see :func:`vocab_parallel_cross_entropy`); the gradient of ``hidden`` is added up
    over the group, in ``accum_dtype``, so that every rank gets the whole of it: nothing else has to be reduced.

    Args:
        hidden: (..., H), the same on every rank, as are labels, options, and whether it needs a gradient.
        local_weight: (V_local, H), this rank's classes, which come after those of the ranks before it. At least one.
        labels: (...) int32 or int64, numbered over the whole vocabulary.
        group: the processes that share the vocabulary; None: the default group.
        shard_sizes: every rank's V_local, in rank order. None: all are as wide as this one. Ranks whose widths differ must say
            so: what they exchange depends on it.
        local_bias: (V_local,) or None.
        class_weight: (V,) float per class of the whole vocabulary.
        chunk_tokens: rows of a chunk, the same on every rank; None: chosen from the shapes.
        cu_seqlens, shift, reduction, num_items, ignore_index: as in :func:`packops.linear_cross_entropy`.
        token_weight, label_smoothing, z_loss, softcap, logit_scale: as in :func:`packops.linear_cross_entropy`.
        num_valid, accum_dtype, logits_dtype: as in :func:`packops.linear_cross_entropy`.
        main_grad: of ``local_weight``'s shape, as in :func:`packops.linear_cross_entropy`.

    Returns:
        The loss of the whole vocabulary, fp32 (fp64 for fp64), the same bits on every rank. Differentiable once in ``hidden``,
        ``local_weight`` and ``local_bias``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`packops.linear_cross_entropy` and
            :func:`vocab_parallel_cross_entropy`.
    """
    op = "vocab_parallel_linear_cross_entropy"
    options["num_items"] = as_num_items(op, options["num_items"])
    head = {"hidden": hidden, "local_weight": local_weight, "local_bias": local_bias}
    _check(op, {**head, "labels": labels, **options})
    hidden, local_weight, local_bias = _cast_head(hidden, local_weight, local_bias)
    shard, sizes = _shard(len(local_weight), group, shard_sizes, op, labels, least=1)
    chunks: dict[str, Any] = {name: cast(Any, options)[name] for name in linear.CHUNKS}
    linear.check_arguments(hidden, local_weight, local_bias, labels, **chunks, op=op)
    lm_head.check_main_grad(op, options["main_grad"], local_weight, hidden.dtype)
    if options["chunk_tokens"] is None:  # of the widest shard: ranks with different turns would wait for each other forever
        copies = 1 if options["logits_dtype"] in (None, hidden.dtype) else 3
        options["chunk_tokens"] = lm_head.choose_chunk_tokens(
            labels.numel(), hidden.shape[-1], max(sizes), num_valid=_compacted(labels, options["num_valid"]), copies=copies
        )
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            ops = vocab_shard.linear_ops(_OPS, shard)
            return _apply(linear.LinearCrossEntropyFunction.call, ops, hidden, local_weight, local_bias, labels, options)
    except Exception as error:
        raise_typed(error, op)


@with_options_of(lp.linear_log_probs, without=("bias",))
def vocab_parallel_linear_log_probs(
    hidden: Tensor,
    local_weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    local_bias: Tensor | None = None,
    **options: Unpack[LinearLogProbsOptions],
) -> lp.LinearLogProbs:
    """:func:`packops.linear_log_probs` with the rows of ``weight`` split over the processes of ``group``.

    A chunk's ranks exchange five fp32 numbers per row in the forward and nothing in the backward but the gradient of ``hidden``,
    which is added up over the group in fp32, so that every rank gets the whole of it.

    Args:
        hidden, local_weight, labels, group, shard_sizes, local_bias: as in :func:`vocab_parallel_linear_cross_entropy`.
        chunk_tokens: rows of a chunk, the same on every rank; None: chosen from the shapes.
        cu_seqlens, shift, ignore_index, logit_scale, softcap, entropy, num_valid: as in :func:`packops.linear_log_probs`; the
            same on every rank.
        main_grad: of ``local_weight``'s shape, as in :func:`packops.linear_cross_entropy`.

    Returns:
        :class:`packops.LinearLogProbs` of the whole vocabulary, the same bits on every rank. Differentiable once in ``hidden``,
        ``local_weight`` and ``local_bias``; every rank has to pass the same gradients on.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`packops.linear_log_probs` and
            :func:`vocab_parallel_cross_entropy`.
    """
    op = "vocab_parallel_linear_log_probs"
    head = {"hidden": hidden, "local_weight": local_weight, "local_bias": local_bias}
    _check(op, {**head, "labels": labels, **options})
    hidden, local_weight, local_bias = _cast_head(hidden, local_weight, local_bias)
    shard, sizes = _shard(len(local_weight), group, shard_sizes, op, labels, least=1)
    lp.check(op, hidden, local_weight, local_bias, labels, dict(options))
    lm_head.check_main_grad(op, options["main_grad"], local_weight, hidden.dtype)
    if sum(sizes) > 1 << 24:  # places of shards travel as fp32
        raise ValueError(f"packops.{op}: a vocabulary over several processes may have at most 2^24 classes, got {sum(sizes)}")
    if options["chunk_tokens"] is None:
        compacted = _compacted(labels, options["num_valid"])
        sizes_of_head = (labels.numel(), hidden.shape[-1], max(sizes))
        options["chunk_tokens"] = lp.choose_chunk_tokens(*sizes_of_head, hidden.dtype, num_valid=compacted)
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            ops = lp.as_ops(lp.forward_and_backward(lp.raw_ops("packops"), op, shard))
            found = _apply(lp.LinearLogProbsFunction.apply, ops, hidden, local_weight, local_bias, labels, options)
    except Exception as error:
        raise_typed(error, op)
    log_probs, entropies, lse = lp.results(found, labels.shape, options["entropy"])
    return lp.LinearLogProbs(log_probs, entropies if options["entropy"] else None, lse)


_KINDS = {**linear.KINDS, "local_logits": "Tensor", "local_weight": "Tensor", "local_bias": "Tensor?", "inplace": "bool"}
_KINDS["entropy"] = "bool"


def _check(op: str, arguments: Mapping[str, Any]) -> None:
    """TypeError or ValueError for what can be said before the group is asked anything."""
    refuse_transforms(op, "no process can wait for the others in them")
    check_types(op, _KINDS, arguments.items())
    check_constants(op, {name: arguments.get(name) for name in ce.CONSTANTS})


def _cast_head(hidden: Tensor, local_weight: Tensor, local_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast treats a linear layer."""
    return cast(Any, autocast.lower_precision(hidden.device.type, (hidden, local_weight, local_bias)))


def _compacted(labels: Tensor, num_valid: int | None) -> int | None:
    return num_valid if num_valid is not None and num_valid < labels.numel() else None


@torch.compiler.disable(reason="it communicates over a process group")
def _apply(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _shard(
    width: int, group: dist.ProcessGroup | None, shard_sizes: Sequence[int] | None, op: str, labels: Tensor, least: int = 0
) -> tuple[vocab_shard.Shard, list[int]]:
    """This rank's shard, ``width`` classes of the vocabulary, and the widths of all ranks.

    On the CPU the ranks tell each other first, so that all of them raise where one does: the others would wait for it, or take
    what it sends in its next call for an answer to this one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"packops.{op}: torch.distributed is not initialised, so there is no group to share a vocabulary")
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"packops.{op}: this process is not in group")
    sizes = [width] * world_size if shard_sizes is None else [int(size) for size in shard_sizes]
    problem = None
    if len(sizes) != world_size:
        problem = f"shard_sizes must have one entry per rank ({world_size}), got {len(sizes)}"
    elif min(sizes) < 0 or sizes[rank] != width:
        problem = f"shard_sizes must hold this rank's width, {width}, at place {rank}, got {sizes}"
    elif min(sizes) < least:
        problem = f"every rank must have at least one class, got shard_sizes {sizes}"
    if isinstance(labels, Tensor) and labels.is_cpu:
        told = _exchange([width, *sizes] if problem is None else [REFUSED] * (1 + world_size), group)
        widths, claims = [numbers[0] for numbers in told], [numbers[1:] for numbers in told]
        if problem is None and REFUSED in widths:
            problem = f"rank {widths.index(REFUSED)} refuses its shard; its error says why"
        elif problem is None and any(claim != widths for claim in claims):
            expected = next(claim for claim in claims if claim != widths)
            problem = f"{UNLIKE_SHARDS} their widths are {widths}, not {expected}; shards that differ in width need shard_sizes"
    if problem is not None:
        raise ValueError(f"packops.{op}: {problem}")

    def gather(partial: Tensor) -> Tensor:
        partials = partial.new_empty(world_size * partial.numel())
        # torch 2.13 renamed it, and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(partials, partial, group=group)
        if not partials.is_cuda or _checks.enabled():
            _raise_bad_shards(partials.view(world_size, -1), op, sum(sizes))
        return partials

    def add_up(x: Tensor) -> None:
        dist.all_reduce(x, group=group)

    return vocab_shard.Shard(sum(sizes[:rank]), sum(sizes), gather, add_up), sizes


@torch.compiler.disable(reason="it communicates over a process group")
def _exchange(numbers: list[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """The numbers of every rank, in rank order."""
    own = torch.tensor(numbers, device="cpu")
    of_all = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, own, group=group)
    return [other.tolist() for other in of_all]


def _raise_bad_shards(partials: Tensor, op: str, vocab_size: int) -> None:
    """ValueError unless the shards, as their owners describe them, follow each other and make up the vocabulary."""
    begins, widths = partials[:, -2:].long().T.tolist()
    ends = [sum(widths[: r + 1]) for r in range(len(widths))]
    if begins != [0, *ends[:-1]] or ends[-1] != vocab_size:
        raise ValueError(
            f"packops.{op}: {UNLIKE_SHARDS} their widths are {widths}, they begin at {begins}, in a "
            f"vocabulary of {vocab_size}; shards that differ in width need shard_sizes"
        )
