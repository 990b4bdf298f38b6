"""What ``transformers.Trainer`` divides losses by: documents or weights in the place of labels, in its own way to count."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..functional import packed_labels
from ..ops.document_sums import document_sums
from .loss import CausalLMLoss, documents_of
from .record import pretrained


def count_documents(trainer: Any) -> None:
    """Have a ``transformers.Trainer`` count documents, not tokens, for the two sequence reductions.

    ``Trainer`` counts the scored tokens of all micro-batches and processes of a step and passes that as ``num_items_in_batch``.
    After this it counts the documents that have a scored token, in the same way: by ``cu_seq_lens_q`` of each batch, without it
    by ``position_ids`` that do not go up by one, without these each row is a document.

    Raises:
        ValueError: nothing in this trainer divides by documents: neither a ``compute_loss_func`` nor the model's loss, which has
            reduction ``"mean"``, is not of packops, or is passed by (TRL's trainers compute their own).
    """
    if getattr(trainer, "compute_loss_func", None) is None:
        loss = getattr(pretrained(trainer.model), "loss_function", None)
        if not isinstance(loss, CausalLMLoss) or loss.reduction == "mean":
            raise ValueError(
                f"packops.hf.count_documents: this model's loss ({loss!r}) divides by tokens, as Trainer counts them; "
                "packops.hf.apply(model, reduction=...) chooses another"
            )
        compute_loss = getattr(type(trainer), "compute_loss", None)
        if getattr(compute_loss, "__module__", "").startswith("trl."):
            raise ValueError(
                f"packops.hf.count_documents: {type(trainer).__name__} computes a loss of its own and divides it by this count. "
                "Let the model compute the loss, by a subclass whose compute_loss is transformers.Trainer's "
                "(docs/hugging_face.md, TRL)"
            )
    count_tokens = trainer._get_num_items_in_batch

    def count(batch_samples: list, device: torch.device) -> Any:
        # A label for each document, of which Trainer then counts those that are not ignored, and knows what to do with the count.
        labels = [_documents_as_labels(batch) for batch in batch_samples if "labels" in batch]
        counted = count_tokens([{"labels": row, "shift_labels": row} for row in labels], device)
        return counted.double() if isinstance(counted, Tensor) else counted

    trainer._get_num_items_in_batch = count


def count_weights(trainer: Any) -> None:
    """Have a ``transformers.Trainer`` add up the weights of tokens, not count labels: for a token mean with ``token_weight``.

    ``Trainer`` counts labels, and the mean divides by their weights. So does a row of
    ``PackingCollator(share_prefixes=True, names="hf", reduction=...)``, which is scored once for all documents through it, with
    the sum of their weights; or by documents, where that is its reduction. After this ``Trainer`` adds up what the losses of all
    micro-batches and processes of a step are divided by. A label without a weight counts as 1.

    Raises:
        ValueError: the model's loss divides by documents, no loss here knows weights, or this trainer counts nothing.
    """
    loss = getattr(pretrained(trainer.model), "loss_function", None)
    if getattr(trainer, "compute_loss_func", None) is not None or not isinstance(loss, CausalLMLoss):
        raise ValueError(
            "packops.hf.count_weights: neither a compute_loss_func nor the loss of a model without packops.hf.apply knows "
            "weights, which it would only be divided by"
        )
    if loss.reduction != "mean":
        raise ValueError(
            f"packops.hf.count_weights: this model's loss has reduction={loss.reduction!r}, which divides by documents: "
            "packops.hf.count_documents(trainer) counts them"
        )
    count_labels = trainer._get_num_items_in_batch

    def count(batch_samples: list, device: torch.device) -> Any:
        sums = [_Counted(_weights_of(batch)) for batch in batch_samples if "labels" in batch]
        total = count_labels([{"labels": found, "shift_labels": found} for found in sums], device)
        if sums and total is None:
            raise ValueError(
                "packops.hf.count_weights: this trainer counts nothing, so each micro-batch would be divided by its own"
            )
        return total

    trainer._get_num_items_in_batch = count


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Takes the place of labels in Trainer's count, which knows of processes and devices."""

    number: Tensor

    def __getitem__(self, _shifted: Any) -> _Counted:
        return self

    def ne(self, _ignore_index: int) -> Tensor:
        return self.number


def _weights_of(batch: Any) -> Tensor:
    """() float64: what the loss of a batch is divided by."""
    given = batch.get("num_items_in_batch")
    if given is not None:
        return torch.as_tensor(given, dtype=torch.float64)
    weight, shifted = batch.get("token_weight"), batch.get("shift_labels")
    scored = (batch["labels"][..., 1:] if shifted is None else shifted) != -100
    if weight is None:
        return scored.sum().double()
    weight = weight[..., :-1] if shifted is None else weight  # that of a row, which is scored against the token behind it
    return torch.where(scored, weight.double(), 0.0).sum()


def _documents_as_labels(batch: Any) -> Tensor:
    shifted, weight = batch.get("shift_labels"), batch.get("token_weight")
    labels = batch["labels"] if shifted is None else shifted
    if weight is not None:  # a row of weight 0 is not scored; without shifted labels it is that of the token before
        weight = weight.to(labels.device)
        labels = labels.masked_fill((weight if shifted is not None else weight.roll(1, -1)) == 0, -100)
    cu_seqlens = batch.get("cu_seq_lens_q")
    if cu_seqlens is None and batch.get("position_ids") is not None:
        cu_seqlens = documents_of(batch["position_ids"], labels.shape)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, labels.numel() + 1, labels.shape[-1], device=labels.device, dtype=torch.int32)
    cu_seqlens = cu_seqlens.to(labels.device)
    counts = packed_labels(labels, cu_seqlens)[1] if shifted is None else document_sums((labels != -100).double(), cu_seqlens)
    return torch.where(counts > 0, 0, -100)
