"""The loss of one model: ``model.loss_function`` is packops'. What it is divided by is checked where it could be wrong."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

import packops

from ..data.batch import check_reduction
from ..data.documents import document_begins
from ..functional import cross_entropy, packed_labels
from .attention_documents import may_read


@dataclasses.dataclass(frozen=True)
class CausalLMLoss:
    """``model.loss_function`` of a causal language model, called as transformers calls it.

    Attributes:
        reduction: ``"mean"`` over tokens, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``, as in
            :func:`packops.cross_entropy`.
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction, "packops.hf: ")

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of (B, S, V) logits.

        Args:
            labels: (B, S), each token's own id: they are shifted here.
            vocab_size: not needed; transformers passes it.
            num_items_in_batch: what the sum is divided by: tokens, each with its weight, or documents for the two sequence
                reductions; of all micro-batches and processes of a step. None: what there is in this batch. A tensor of another
                dtype than float64 is taken for Trainer's count of labels, and refused where that would be wrong:
                :func:`packops.loss_normalizer`, :func:`count_weights` and :func:`count_documents` give float64.
            shift_labels: (B, S), used in place of ``labels`` and not shifted.
            cu_seq_lens_q: where documents begin in the flattened rows. Without it, the sequence reductions find documents by
                ``position_ids`` that do not go up by one, and without these a row is a document.
            token_weight: (B, S) weight of each token.
        """
        options = self._options(logits.shape[:-1], labels, num_items_in_batch, ignore_index, shift_labels, logits.device, kwargs)
        return cross_entropy(logits, **options)

    def of_hidden(
        self,
        head: nn.Linear,
        hidden: Tensor,
        labels: Tensor,
        *,
        logit_scale: float,
        softcap: float | None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The same of the (B, S, H) hidden states below the lm_head, whose logits are never all there."""
        options = self._options(hidden.shape[:-1], labels, num_items_in_batch, ignore_index, shift_labels, hidden.device, kwargs)
        loss = packops.linear_cross_entropy(
            hidden,
            head.weight,  # under autocast the op casts, as the head itself would
            bias=head.bias,
            logit_scale=logit_scale,
            softcap=softcap,
            num_valid=kwargs.get("num_valid"),
            **options,
        )
        return cast(Tensor, loss)

    def _options(
        self,
        rows: torch.Size,
        labels: Tensor | None,
        num_items: Tensor | float | None,
        ignore_index: int,
        shift_labels: Tensor | None,
        device: torch.device,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        targets = labels if shift_labels is None else shift_labels
        if targets is None:
            raise ValueError("packops.hf: the loss needs labels or shift_labels")
        targets = targets.to(device)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if kwargs.get("parents") is not None:
            if shift_labels is None or self.reduction != "mean":
                raise ValueError(
                    "packops.hf: where documents share prefixes, the batch holds the weights of its reduction: use "
                    "PackingCollator(share_prefixes=True, reduction=...), PackedForest.to_hf() and apply(model) with "
                    f'reduction="mean", got {self.reduction!r} and shift_labels {"missing" if shift_labels is None else "given"}'
                )
            cu_seqlens = None  # of segments, which are no documents
        elif (positions := kwargs.get("position_ids")) is not None:
            if cu_seqlens is None:
                cu_seqlens = self._documents_by(positions, rows, shift_labels is None)
            else:
                _check_rows(positions, rows)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
        weight = kwargs.get("token_weight")
        _check_not_rounded(num_items_in_batch=num_items, token_weight=weight)
        num_items = self._denominator(num_items, device)
        weight = None if weight is None else weight.to(device)
        if weight is not None and isinstance(num_items, Tensor) and num_items.dtype != torch.float64:
            num_items = _checked_labels(num_items, targets, weight, ignore_index, shift_labels is None)
        is_packed = kwargs.get("cu_seq_lens_q") is not None or rows[:-1].numel() == 1  # other rows may be padded
        if num_items is not None and cu_seqlens is not None and shift_labels is None and self.reduction == "mean" and is_packed:
            num_items = _checked_count(num_items, targets, cu_seqlens, ignore_index)
        return {
            "labels": targets,
            "shift": shift_labels is None,
            "cu_seqlens": cu_seqlens,
            "reduction": self.reduction,
            "num_items": num_items,
            "ignore_index": ignore_index,
            "token_weight": weight,
        }

    def _documents_by(self, positions: Tensor, rows: torch.Size, shift: bool) -> Tensor | None:
        """The mean needs them where labels are still to be shifted, and positions in three dimensions (M-RoPE) do not tell."""
        if self.reduction == "mean" and not (shift and positions.dim() <= 2):
            return None
        _check_rows(positions, rows)
        return documents_of(positions, rows)

    def _denominator(self, num_items: Tensor | float | None, device: torch.device) -> Tensor | float | None:
        if not isinstance(num_items, Tensor):
            return num_items
        # Trainer's count of tokens is a float32 tensor (and was int64 once); counts of documents come in float64 or as numbers.
        if self.reduction != "mean" and num_items.dtype != torch.float64:
            raise ValueError(
                f"packops.hf: reduction={self.reduction!r} divides by the number of documents, and num_items_in_batch is a "
                f"{num_items.dtype} tensor, which is how transformers.Trainer passes its count of tokens: call "
                "packops.hf.count_documents(trainer) before training, or pass packops.loss_normalizer(..., reduction=...), "
                "another float64 tensor or a number"
            )
        return num_items if num_items.is_cpu else num_items.to(device)


def _check_not_rounded(**given: Any) -> None:
    """ValueError for what 16 bits cannot hold: they round 1003 tokens to 1004, or 70000 to infinity."""
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"packops.hf: {name} must be a number or a tensor of 32 or 64 bits, got {value.dtype}, which rounds it. Mixed "
                "precision of FSDP casts every tensor of floats that it is called with, unless told otherwise: "
                "MixedPrecisionPolicy(cast_forward_inputs=False), MixedPrecision(cast_root_forward_inputs=False). It leaves "
                "numbers as they are: num_items_in_batch=float(num_items)"
            )


def _check_rows(positions: Tensor, rows: torch.Size) -> None:
    if positions.shape[-1] != rows[-1]:
        raise ValueError(
            f"packops.hf: position_ids of shape {tuple(positions.shape)} cannot say where documents begin in the {rows[-1]} rows "
            "of logits that logits_to_keep leaves: leave logits_to_keep out and set labels to -100 where nothing is scored, or, "
            'with reduction="mean", pass shift_labels of the rows that are left, and neither cu_seq_lens_q nor num_valid'
        )


def _checked_labels(num_items: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """``num_items``, a count of labels, unless their weights add up to something else.

    Rows that are not to be shifted may have the weights of all documents through them. Others may have weights that make no
    difference, as those of :meth:`packops.PackedBatch.to_hf` that are 0 or 1: these are read, or, where that would wait for the
    device, a count that is wrong becomes NaN, and so does the loss.
    """
    if shift:
        scored = labels[..., 1:] != ignore_index
        counted, weighs = scored.sum(), torch.where(scored, weight[..., :-1].double(), 0.0).sum()
        is_right = (weighs - counted).abs() <= 1e-5 * counted  # weights that were scaled to a mean of 1 are off by roundings
        if not may_read(labels):
            return torch.where(is_right, num_items, float("nan"))
        if is_right:
            return num_items
        why = f"the token_weight of {int(counted)} labels adds up to {float(weighs):g}"
    else:
        why = "shift_labels come with token_weight, which may be that of several documents for a row that they share"
    raise ValueError(
        f"packops.hf: {why}, and num_items_in_batch is a {num_items.dtype} tensor, which is how transformers.Trainer passes its "
        "count of labels: call packops.hf.count_weights(trainer) before training, or pass "
        "packops.loss_normalizer(..., reduction=...), another float64 tensor or a number"
    )


def _checked_count(num_items: Tensor | float, labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor | float:
    """``num_items``, unless whoever counted the labels counted some that are not scored: the first ones of packed documents.

    ``transformers.Trainer`` counts every label but the first of a row. A count that cannot be right raises; where looking at it
    would wait for the device, it becomes NaN, and so does the loss.
    """
    counted = (labels[..., 1:] != ignore_index).sum()
    scored = packed_labels(labels, cu_seqlens, ignore_index=ignore_index)[1].sum()
    if may_read(labels):
        if counted != scored:
            raise ValueError(
                f"packops.hf: {int(counted)} labels are set and {int(scored)} of them are scored: the first token of a packed "
                "document has nothing before it to be predicted from, so its label must be -100, as packops.PackingCollator "
                "makes it. num_items_in_batch counts it otherwise, and the loss would be too small"
            )
        return num_items
    return torch.where(counted == scored, num_items, float("nan"))


def documents_of(position_ids: Tensor, rows: torch.Size) -> Tensor:
    """``cu_seqlens`` of the flattened rows, from position ids that go up by one within a document. No host sync.

    Args:
        position_ids: (S,), (B, S) or, the same in every row, (1, S).
        rows: (B, S).

    Returns:
        cu_seqlens (B·S + 1,) int32: the number of documents is not known on the host, so the last ones are empty.
    """
    if position_ids.dim() > 2:
        raise ValueError(
            f"packops.hf: position_ids of shape {tuple(position_ids.shape)} do not say where documents begin: pass cu_seq_lens_q"
        )
    begins = document_begins(position_ids.expand(rows))
    tokens = begins.numel()
    index = torch.arange(tokens, device=begins.device, dtype=torch.int32)
    starts = torch.where(begins.reshape(-1), index, tokens).to(torch.int32).sort().values
    return torch.cat((starts, starts.new_full((1,), tokens)))


def compute_loss_func(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None, *, reduction: str = "mean"
) -> Tensor:
    """``compute_loss_func`` of ``transformers.Trainer`` and TRL: packops' loss of a model's logits.

    A model that went through :func:`packops.hf.apply` needs no such function under ``Trainer``, and without it keeps its logits
    out of memory. For other reductions: ``functools.partial(compute_loss_func, reduction="seq-mean-token-mean")``.

    Args:
        outputs: what the model returned; its ``logits`` (B, S, V), scaled and capped as the model does.
        labels: (B, S), each token's own id, -100 where it is not scored, as at the first token of packed documents.
        num_items_in_batch: as :class:`CausalLMLoss`.
        reduction: the sequence reductions take each row for a document, so they refuse a single row, which is how documents come
            packed: that needs :func:`packops.hf.apply`, which is told where documents begin.
    """
    # The outputs of transformers are dictionaries too, without a key for what is None.
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            "packops.hf.compute_loss_func: the model returned no logits; a model patched by packops.hf.apply computes this loss "
            "itself: leave compute_loss_func out, or use packops.hf.apply(model, cross_entropy=False)"
        )
    if reduction != "mean" and logits.shape[0] == 1:
        raise ValueError(
            f"packops.hf.compute_loss_func: reduction={reduction!r} cannot tell which documents are in a single row, since "
            "Trainer passes it outputs and labels alone: use packops.hf.apply(model, reduction=...) in its place"
        )
    return CausalLMLoss(reduction)(logits, labels, num_items_in_batch=num_items_in_batch)


def scores_the_next_token(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    kind = getattr(model, "loss_type", None) or "ForCausalLM"  # which is also what transformers takes None for
    return LOSS_MAPPING.get(kind) is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)
