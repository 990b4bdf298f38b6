"""The loss where each process of a tensor-parallel group holds some of the classes: nobody ever sees a whole row of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

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
from .derivatives import check_constants, is_differentiated, refuse_transforms
from .op import maths_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .ce_loss import CrossEntropyOptions
    from .linear_ce_loss import LinearCrossEntropyOptions
    from .linear_log_probs import LinearLogProbsOptions

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy", "vocab_parallel_linear_log_probs"]

_OPS = vocab_shard.raw_ops("packops")

UNLIKE_SHARDS = "the shards of the vocabulary do not line up:"
MOST_CLASSES = 1 << 24
#: What decides how much travels, and how often.
ALIKE = ("labels", "fp64", "gradient of hidden", "num_valid", "chunk_tokens")
NONE = -1  # one that was not given
REFUSED = -2  # a rank says so instead of a width


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
            a ValueError on the CPU and under :func:`packops.checks`; else, on CUDA, where telling each other would wait for the
            device, the loss is NaN.
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

    def work(ranks: _Ranks) -> Tensor:
        options["num_items"] = as_num_items(op, options["num_items"])
        _check(op, {"local_logits": local_logits, "labels": labels, "shard_sizes": shard_sizes, **options})
        inplace = options.pop("inplace")
        if local_logits.dim() == 0:
            raise ValueError(f"packops.{op}: local_logits must have shape (..., V_local), got a 0-d tensor")
        shard = ranks.shard(local_logits.shape[-1], shard_sizes, labels, local_logits.dtype)
        ranks.will_send(ce.PARTIAL_STATES, labels.numel(), local_logits)
        if inplace and local_logits.requires_grad and torch.is_grad_enabled():
            ce.check_may_overwrite(local_logits, op)
        function = vocab_shard.VocabParallelCrossEntropyFunction
        loss, ints = function.apply(_OPS, shard, local_logits, labels, options, inplace)
        if local_logits.is_cuda and _checks.enabled():
            rule = {"shift": options["shift"], "ignore_index": options["ignore_index"], "vocab": shard.vocab_size}
            _checks.raise_bad_rows(labels, options["cu_seqlens"], ints[ce.TARGET], op=op, **cast(Any, rule))
        return loss

    return cast(Tensor, _together(op, group, (local_logits, labels), work))


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
        local_weight: (V_local, H), this rank's classes, which come after those of the ranks before it. V_local may be 0.
        labels: (...) int32 or int64, numbered over the whole vocabulary.
        group: the processes that share the vocabulary; None: the default group.
        shard_sizes: every rank's V_local, in rank order. None: all are as wide as this one. If that is not so, all ranks raise
            a ValueError on the CPU and under :func:`packops.checks`; else the loss is NaN.
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

    def work(ranks: _Ranks) -> Tensor:
        options["num_items"] = as_num_items(op, options["num_items"])
        head = {"hidden": hidden, "local_weight": local_weight, "local_bias": local_bias}
        _check(op, {**head, "labels": labels, "shard_sizes": shard_sizes, **options})
        h, weight, bias = _cast_head(hidden, local_weight, local_bias)
        chunks: dict[str, Any] = {name: cast(Any, options)[name] for name in linear.CHUNKS}
        linear.check_arguments(h, weight, bias, labels, **chunks, op=op, least=0)
        lm_head.check_main_grad(op, options["main_grad"], weight, h.dtype)
        chunk_tokens = options["chunk_tokens"]
        if chunk_tokens is None:
            copies = 1 if options["logits_dtype"] in (None, h.dtype) else 3
            options["chunk_tokens"] = chunk_tokens = _choose_chunk_tokens(h, labels, options["num_valid"], copies)
        shard = ranks.shard(len(weight), shard_sizes, labels, h.dtype, hidden=h, **_numbers(options, "num_valid", "chunk_tokens"))
        rows = labels.numel() if options["num_valid"] is None else options["num_valid"]
        if not rows:  # there is nothing to add up: who waited for that would not hear of a refusal
            shard = shard._replace(add_up=lambda x: None)
        ranks.will_send(ce.PARTIAL_STATES, min(rows, chunk_tokens), h)
        with autocast.off(h.device.type):
            ops = vocab_shard.linear_ops(_OPS, op, shard)
            loss = cast(Tensor, linear.LinearCrossEntropyFunction.call(ops, h, weight, bias, labels, cast(Any, options)))
        if not rows:  # nor is there a chunk, whose ranks would meet
            ranks.meet(shard, len(weight))
        return loss

    return cast(Tensor, _together(op, group, (hidden, local_weight, labels), work))


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

    Ranks exchange five fp32 numbers per row in the forward, once, and nothing in the backward but the gradient of ``hidden``,
    which is added up over the group in fp32, so that every rank gets the whole of it.

    Args:
        hidden, local_weight, labels, group, shard_sizes, local_bias: as in :func:`vocab_parallel_linear_cross_entropy`.
        cu_seqlens, shift, ignore_index, logit_scale, softcap, entropy, num_valid: as in :func:`packops.linear_log_probs`; the
            same on every rank.
        chunk_tokens: rows of a chunk, also other ones on each rank.
        main_grad: of ``local_weight``'s shape, as in :func:`packops.linear_cross_entropy`.

    Returns:
        :class:`packops.LinearLogProbs` of the whole vocabulary, the same bits on every rank. Differentiable once in ``hidden``,
        ``local_weight`` and ``local_bias``; every rank has to pass the same gradients on.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`packops.linear_log_probs` and
            :func:`vocab_parallel_cross_entropy`.
    """
    op = "vocab_parallel_linear_log_probs"

    def work(ranks: _Ranks) -> lp.LinearLogProbs:
        head = {"hidden": hidden, "local_weight": local_weight, "local_bias": local_bias}
        _check(op, {**head, "labels": labels, "shard_sizes": shard_sizes, **options})
        h, weight, bias = _cast_head(hidden, local_weight, local_bias)
        lp.check(op, h, weight, bias, labels, dict(options), least=0)
        lm_head.check_main_grad(op, options["main_grad"], weight, h.dtype)
        shard = ranks.shard(len(weight), shard_sizes, labels, h.dtype, hidden=h, **_numbers(options, "num_valid"))
        ranks.will_send(lp.PARTIAL_STATES, labels.numel(), h)
        if shard.vocab_size > MOST_CLASSES:  # places of shards travel as fp32
            raise ValueError(
                f"packops.{op}: a vocabulary over several processes may have at most 2^24 classes, got {shard.vocab_size}"
            )
        with autocast.off(h.device.type):
            ops = lp.as_ops(lp.forward_and_backward(lp.raw_ops("packops"), op, shard))
            found = lp.LinearLogProbsFunction.apply(ops, h, weight, bias, labels, options)
        log_probs, entropies, lse = lp.results(found, labels.shape, options["entropy"])
        return lp.LinearLogProbs(log_probs, entropies if options["entropy"] else None, lse)

    return cast(lp.LinearLogProbs, _together(op, group, (hidden, local_weight, labels), work))


_KINDS = {**linear.KINDS, "local_logits": "Tensor", "local_weight": "Tensor", "local_bias": "Tensor?", "inplace": "bool"}
_KINDS |= {"entropy": "bool", "shard_sizes": "int[]?"}


def _check(op: str, arguments: Mapping[str, Any]) -> None:
    """TypeError or ValueError for what can be said before the group is asked anything."""
    refuse_transforms(op, "no process can wait for the others in them")
    check_types(op, _KINDS, arguments.items())
    check_constants(op, {name: arguments.get(name) for name in ce.CONSTANTS})


def _cast_head(hidden: Tensor, local_weight: Tensor, local_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast treats a linear layer. Without what needs no gradient now: a function of autograd asks the tensor alone."""
    head = (x if x is None or is_differentiated(x) else x.detach() for x in (hidden, local_weight, local_bias))
    return cast(Any, autocast.lower_precision(hidden.device.type, tuple(head)))


def _choose_chunk_tokens(hidden: Tensor, labels: Tensor, num_valid: int | None, copies: int) -> int:
    """Rows of a chunk, as if this shard were as wide as can be: ranks of unlike width must take as many turns."""
    compacted = num_valid if num_valid is not None and num_valid < labels.numel() else None
    return lm_head.choose_chunk_tokens(labels.numel(), hidden.shape[-1], MOST_CLASSES, num_valid=compacted, copies=copies)


def _numbers(options: Mapping[str, Any], *names: str) -> dict[str, int]:
    """These options as ranks tell each other of them."""
    return {name: NONE if options[name] is None else options[name] for name in names}


@torch.compiler.disable(reason="it communicates over a process group")
def _together(op: str, group: dist.ProcessGroup | None, tensors: tuple[Any, ...], work: Callable[[_Ranks], Any]) -> Any:
    """What ``work`` returns. Where it raises on one rank it raises on all of them, if they may tell each other."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"packops.{op}: torch.distributed is not initialised, so there is no group to share a vocabulary")
    on_cuda = next((x.device for x in tensors if isinstance(x, Tensor) and x.is_cuda), None)
    ranks = _Ranks(op, group, on_cuda or torch.device("cpu"))
    try:
        return work(ranks)
    except Exception as error:
        ranks.refuse()
        raise_typed(error, op)


class _Ranks:
    """The processes of a group that make one call of ``op``.

    On the CPU, and on CUDA with checks on, they tell each other what they were given before anything else travels, so that all
    of them raise where one does: the others would wait for it, or take what it sends in its next call for an answer to this one.
    On CUDA this would wait for the device.
    """

    def __init__(self, op: str, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.op, self.group, self.device = op, group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"packops.{op}: this process is not in group")
        self.are_waiting = device.type == "cpu" or _checks.enabled()  #: for this rank's numbers
        self.owes: tuple[int, Tensor] | None = None  #: elements that the others will gather from this rank, and of which kind

    def shard(
        self,
        width: int,
        shard_sizes: Sequence[int] | None,
        labels: Tensor,
        dtype: torch.dtype,
        hidden: Tensor | None = None,
        **chunks: int,
    ) -> vocab_shard.Shard:
        """This rank's shard, ``width`` classes of the vocabulary.

        ValueError on every rank if one of them refuses its arguments, or if what they were given does not go together.
        """
        sizes = [width] * self.world_size if shard_sizes is None else [int(size) for size in shard_sizes]
        if len(sizes) != self.world_size:
            self.fail(f"shard_sizes must have one entry per rank ({self.world_size}), got {len(sizes)}")
        if min(sizes) < 0 or sizes[self.rank] != width:
            self.fail(f"shard_sizes must hold this rank's width, {width}, at place {self.rank}, got {sizes}")
        if self.are_waiting:
            given = {"labels": labels.numel(), "fp64": dtype == torch.float64, **chunks}
            given["gradient of hidden"] = hidden is not None and hidden.requires_grad
            self._compare([width, *(given.get(name, NONE) for name in ALIKE), *sizes])
        # One rank alone may think that there are no classes at all: it goes on, and the others see that it has none.
        vocab_size = max(sum(sizes), 1)

        def gather(partial: Tensor) -> Tensor:
            return self._gather(partial, vocab_size)

        def add_up(x: Tensor) -> None:
            dist.all_reduce(x, group=self.group)

        return vocab_shard.Shard(sum(sizes[: self.rank]), vocab_size, gather, add_up)

    def will_send(self, states: int, rows: int, like: Tensor) -> None:
        """So many numbers for each of so many rows, and two more: what the others wait for if this rank raises now."""
        self.owes = (states * rows + 2, like)

    def refuse(self) -> None:
        """This rank raises: let the others hear of it where they wait."""
        if self.are_waiting:
            self._exchange([REFUSED])
        elif self.owes is not None:
            self._all_gather(self._owed(REFUSED))

    def meet(self, shard: vocab_shard.Shard, width: int) -> None:
        """Send what this rank owes where there are no rows to speak of: its place and its width."""
        own = self._owed(shard.first_class)
        own[1] = width
        shard.gather(own)

    def _owed(self, value: int) -> Tensor:
        numel, like = cast(tuple[int, Tensor], self.owes)
        return torch.full((numel,), value, dtype=maths_dtype(like), device=like.device)

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"packops.{self.op}: {problem}")

    def _compare(self, numbers: list[int]) -> None:
        told = self._exchange(numbers)
        self._raise_refusals([other[0] for other in told])
        widths = [other[0] for other in told]
        for other in told:
            claim = other[1 + len(ALIKE) :]
            if claim != widths:
                self.fail(f"{UNLIKE_SHARDS} their widths are {widths}, not {claim}; shards that differ in width need shard_sizes")
        for name, *values in zip(ALIKE, *(other[1 : 1 + len(ALIKE)] for other in told), strict=True):
            if len(set(values)) > 1:
                self.fail(f"{name} must be the same on every rank, got {values}")

    def _exchange(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of every rank, in rank order."""
        self.are_waiting = False
        length = 1 + len(ALIKE) + self.world_size
        own = torch.tensor([*numbers, *[NONE] * (length - len(numbers))], device=self.device)
        return self._all_gather(own).view(-1, length).tolist()

    def _gather(self, partial: Tensor, vocab_size: int) -> Tensor:
        partials = self._all_gather(partial)
        if not partials.is_cuda or _checks.enabled():
            begins, widths = partials.view(self.world_size, -1)[:, -2:].long().T.tolist()
            self._raise_refusals(widths)
            ends = [sum(widths[: r + 1]) for r in range(len(widths))]
            if begins != [0, *ends[:-1]] or ends[-1] != vocab_size:
                self.fail(
                    f"{UNLIKE_SHARDS} their widths are {widths}, they begin at {begins}, in a vocabulary of {vocab_size}; shards "
                    "that differ in width need shard_sizes"
                )
        return partials

    def _all_gather(self, own: Tensor) -> Tensor:
        self.owes = None
        of_all = own.new_empty(self.world_size * own.numel())
        # torch 2.13 renamed it, and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(of_all, own, group=self.group)
        return of_all

    def _raise_refusals(self, widths: list[int]) -> None:
        if REFUSED in widths:
            self.fail(f"rank {widths.index(REFUSED)} refuses its arguments; its error says why")
