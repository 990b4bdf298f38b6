"""The loss of one model: ``model.loss_function`` is packops', and in training the lm_head is part of it.

Hugging Face's causal language models end alike: ``logits = self.lm_head(hidden)``, perhaps a scale or a soft cap, then
``self.loss_function(logits, labels, ...)``. The model's forward keeps every line, and gets one branch before these: where nobody
wants the logits, :func:`packops.linear_cross_entropy` takes the hidden states, with the scale and the cap that stand there.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import packops

from ..data.batch import check_reduction
from ..data.documents import document_begins
from ..functional import cross_entropy, packed_labels
from . import families, rewrite
from .adapters import drops_positions, reason_against_packing
from .attention_documents import begin_anew, go_back, go_on, may_read
from .record import Record, pretrained
from .record import is_plain_linear as _is_plain_linear
from .rewrite import CannotRewriteError
from .rope import check_layers


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
        elif cu_seqlens is None and (positions := kwargs.get("position_ids")) is not None:
            cu_seqlens = self._documents_by(positions, rows, shift_labels is None)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
        num_items = self._denominator(num_items, device)
        weight = None if (weight := kwargs.get("token_weight")) is None else weight.to(device)
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
        return documents_of(positions, rows) if self.reduction != "mean" or (shift and positions.dim() <= 2) else None

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


class AppliedLoss(CausalLMLoss):
    """The loss that :func:`packops.hf.apply` put into a model."""


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
    if shifted is None:
        counts = packed_labels(labels, cu_seqlens.to(labels.device))[1]
    else:
        scored = torch.nn.functional.pad((labels.reshape(-1) != -100).long().cumsum(0), (1, 0))
        counts = scored[cu_seqlens.long().to(labels.device)].diff()
    return torch.where(counts > 0, 0, -100)


# ---- the model's forward ------------------------------------------------------------------------------------------------------

_WANTED, _SKIP, _ROUTER = "__packops_skip_logits__", "__packops_skip__", "__packops_router_loss__"
ROUTER_LOSS = "load_balancing_loss_func"


@dataclasses.dataclass(frozen=True)
class Model:
    """A causal language model that refuses calls whose loss would be wrong.

    Attributes:
        fused: its forward may end without logits.
        never_looks: as :func:`packops.hf.families.never_looks`, which takes too long to ask at every call.
    """

    fused: bool
    never_looks: bool

    def methods(self, base: Any) -> dict[str, Callable]:
        inner, fused, never_looks = _model_forward(base, self.fused).function, self.fused, self.never_looks
        names = list(inspect.signature(base.forward).parameters)[1:]

        @functools.wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_forward(self, names, args, kwargs, never_looks)
            if fused and not _returns_dict(self, kwargs):
                if kwargs.get("skip_logits"):
                    raise ValueError("packops.hf: skip_logits=True would leave a hole in a tuple: it needs return_dict=True")
                kwargs["skip_logits"] = False
            return inner(self, *args, **kwargs)

        def set_attribute(self: Any, name: str, value: Any) -> None:
            base.__setattr__(self, name, _watched(self, value, never_looks) if name == "forward" else value)

        return {"forward": forward, "__setattr__": set_attribute}


def _returns_dict(model: Any, kwargs: Mapping[str, Any]) -> bool:
    wanted = kwargs.get("return_dict")
    return bool(model.config.return_dict if wanted is None else wanted)


def _missing_positions(given: Mapping[str, Any]) -> Tensor | None:
    """(B, S) the positions in packed documents, where boundaries are given and positions are not: the model would count on. None
    where there is nothing to add."""
    bounds, tokens = given.get("cu_seq_lens_q"), given.get("input_ids")
    if bounds is None or bounds.numel() <= 2 or tokens is None or given.get("past_key_values") is not None:
        return None
    if any(given.get(name) is not None for name in ("position_ids", "parents", *_IMAGES)):
        return None
    return packops.packed_metadata(bounds.to(tokens.device), tokens.numel())[0].view(tokens.shape)


def check_forward(
    model: Any, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], never_looks: bool, **fixed: Any
) -> None:
    """:func:`check_call` of a forward whose arguments have these names; adds missing positions to ``kwargs``."""
    given = {**dict(zip(names, args, strict=False)), **kwargs, **fixed}
    if "position_ids" in names and (positions := _missing_positions(given)) is not None:
        given["position_ids"] = kwargs["position_ids"] = positions
    check_call(model, given, never_looks)


def check_call(model: Any, given: Mapping[str, Any], never_looks: bool) -> None:
    """Raise for calls whose result would be wrong without a word. Waits for no device, unless :func:`packops.checks` is on."""
    scored = given.get("labels") is not None or given.get("shift_labels") is not None
    trains = model.training and torch.is_grad_enabled()
    if (scored or trains) and not torch.compiler.is_compiling():  # not for each token that is generated
        check_layers(model)
    if not scored and trains and _by_document(model):
        raise ValueError(_ignored(model, "it was called without labels"))
    if given.get("token_weight") is not None:
        why = ""
        if scored and not isinstance(model.loss_function, CausalLMLoss):
            why = "the model's loss is not packops'. packops.hf.apply(model, cross_entropy=True) replaces it"
        elif trains and given.get("labels") is None:
            why = "it has no labels. The loss of a compute_loss_func, or of Trainer's label smoothing, knows no weights"
        if why:
            raise ValueError(f"packops.hf: token_weight is given, and this call would not use it: {why}")
    positions = given.get("position_ids")
    images = [name for name in _IMAGES if given.get(name) is not None]
    if images and positions is not None and positions.dim() == 2 and _has_mrope(model.config):
        raise ValueError(
            f"packops.hf: {images[0]} with position_ids of shape {tuple(positions.shape)}, but images have "
            "positions in three dimensions here (M-RoPE). Pass those of its get_rope_index, document by document, or none"
        )
    config = model.base_model.config.get_text_config(decoder=True)  # the model's own, unless its decoder is another by now
    if given.get("parents") is not None and config._attn_implementation != "packops_varlen":
        raise ValueError(
            f"packops.hf: attention {config._attn_implementation!r} does not know documents that share prefixes (parents): use "
            "packops.hf.apply(model, attention='packops_varlen') or, with 'sdpa' and no sliding windows, "
            "forest.to_hf(attention='sdpa')"
        )
    bounds, mask, cache = given.get("cu_seq_lens_q"), given.get("attention_mask"), given.get("past_key_values")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        _check_obeyed(config, mask, given.get("token_weight") is not None)
    is_row_mask = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)  # others say who sees whom
    # On a GPU these are not read. Who trains with positions and no mask has packed rows, or can leave the positions out.
    unread = trains and mask is None and positions is not None and positions.dim() == 2 and not may_read(positions)
    packed = ""
    if bounds is not None and bounds.numel() > 2:
        packed = "cu_seq_lens_q"
        if cache is not None or (positions is None and given.get("input_ids") is None):
            raise ValueError(
                f"packops.hf: cu_seq_lens_q with a cache, or with embeddings and no position_ids. {_PROMPT_LEARNING}"
            )
        if model.config.model_type in families.NO_POSITIONS:
            raise ValueError(
                f"packops.hf: packed documents (cu_seq_lens_q) have wrong positions in {model.config.model_type!r}, which takes "
                "no position_ids"
            )
    elif cache is not None and is_row_mask and (unread or go_back(positions, mask)):
        raise ValueError(
            f"packops.hf: position_ids of packed documents with a cache. {_PROMPT_LEARNING}, without position_ids or with an "
            "attention_mask"
        )
    elif (scored or trains) and drops_positions(model, given):
        raise ValueError(
            "packops.hf: embeddings, position_ids=None and a model without a parameter to train: position_ids were dropped, "
            f"which may have told documents apart. {_PROMPT_LEARNING}, or leave position_ids out where rows are not packed"
        )
    reason = reason_against_packing(model)
    tells = bool(packed) or given.get("parents") is not None or unread
    if reason is not None and (tells or (is_row_mask and begin_anew(positions, mask))):
        raise ValueError(
            f"packops.hf: packed documents would change each other by {reason}. Train it on padded rows, without position_ids or "
            "with an attention_mask"
        )
    if not is_row_mask or config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return  # whatever attends was told who sees whom, or takes the boundaries
    if not packed and begin_anew(positions, mask):
        packed = "position_ids that begin at 0 again"
    if not packed:
        return
    family, name = model.config.model_type, config._attn_implementation
    if never_looks:
        raise ValueError(
            f"packops.hf: with {name!r}, {family!r} of transformers {families.installed()} never looks where packed documents "
            f"({packed}) begin: they would see each other. packops.hf.apply(model, attention='packops_varlen') keeps them "
            "apart where the family takes it; a newer transformers may look"
        )
    if positions is None:  # beside images, whose positions are the model's to find
        raise ValueError(
            f"packops.hf: cu_seq_lens_q without position_ids, by which alone {name!r} tells documents apart: they would see each "
            "other. Pass position_ids too"
        )
    if go_on(positions, bounds):
        raise ValueError(
            f"packops.hf: position_ids go on from one document of cu_seq_lens_q to the next, and {name!r} tells documents apart "
            "by positions alone: pass positions that begin anew, as packops.PackingCollator makes them, or none"
        )
    _check_told_apart(name, packed, mask, _uses_cache(config, given))


_PROMPT_LEARNING = (
    "PEFT's prompt learning (prompt, prefix and p-tuning) calls so: it puts its tokens before the first document alone, and "
    "drops or shifts the positions of all. Train it on padded rows"
)


def _check_obeyed(config: Any, mask: Tensor, is_forest: bool) -> None:
    """ValueError for a 4-D mask that transformers would take for another one."""
    if mask.dtype == torch.bool and config._attn_implementation == "eager":
        raise ValueError(
            "packops.hf: a 4-D attention_mask of bools, which 'eager' would add to the scores as 0 and 1: use 'sdpa' or "
            "packops.hf.apply(model, attention='packops_varlen')"
        )
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and window < mask.shape[-1] and (kinds is None or any("sliding" in kind for kind in kinds))
    if is_forest and slides:
        raise ValueError(
            f"packops.hf: layers with a sliding window, here of {window} tokens, obey a 4-D attention_mask in its place, and "
            "PackedForest's has no window: use packops.hf.apply(model, attention='packops_varlen') and to_hf()"
        )


def _check_told_apart(name: str, packed: str, mask: Tensor | None, uses_cache: bool) -> None:
    """ValueError unless the attention ``name`` of transformers keeps packed documents apart, which it does by positions alone."""
    if mask is not None or uses_cache:
        beside = "an attention_mask" if mask is not None else "use_cache=True, the configuration's default"
        raise ValueError(
            f"packops.hf: {packed} with {beside}, beside which transformers does not look for packed documents: with {name!r} "
            "they would see each other. Pass use_cache=False and no mask, as PackedBatch.to_hf() does, or "
            "packops.hf.apply(model, attention='packops_varlen')"
        )


def _uses_cache(config: Any, given: Mapping[str, Any]) -> bool:
    wanted = given.get("use_cache")
    return given.get("past_key_values") is not None or bool(getattr(config, "use_cache", False) if wanted is None else wanted)


_IMAGES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


def _has_mrope(config: Any) -> bool:
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return "mrope_section" in parameters


def _ignored(model: Any, why: str) -> str:
    return (
        f"packops.hf: this model's loss has reduction={model.loss_function.reduction!r}, and {why}, so it would not be used. "
        "TRL's trainers and a compute_loss_func compute a loss of their own: let the model compute it, as docs/hugging_face.md "
        "shows for TRL, or use packops.hf.apply(model, reduction='mean')"
    )


def _watched(model: Any, forward: Any, never_looks: bool) -> Any:
    """A forward that somebody puts in place of the model's: TRL's computes log-probabilities from the decoder's hidden states and
    passes by what stands in the model's own forward."""
    if not isinstance(forward, MethodType) or forward.__self__ is not model:
        return forward
    function = forward.__func__
    takes = "fused_lm_head" in getattr(getattr(function, "__code__", None), "co_varnames", ())
    if not takes and not _by_document(model):
        return forward
    names = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            if _by_document(self):
                raise ValueError(_ignored(self, "TRL asked it for log-probabilities (fused_lm_head=True)"))
            if kwargs.get("token_weight") is not None:
                raise ValueError(
                    "packops.hf: token_weight is given, and this call would not use it: TRL asked for log-probabilities "
                    "(fused_lm_head=True), of which it computes a loss of its own. Let the model compute the loss, as "
                    "docs/hugging_face.md shows for TRL"
                )
            check_forward(self, names, args, kwargs, never_looks, use_cache=False)  # as TRL calls the decoder
        return function(self, *args, **kwargs)

    return MethodType(watched, model)


def _by_document(model: Any) -> bool:
    loss = model.loss_function
    return isinstance(loss, CausalLMLoss) and loss.reduction != "mean"


def guard(model: nn.Module, record: Record) -> None:
    """Let ``model`` refuse calls whose result would be wrong, and leave its loss alone."""
    if hasattr(type(model), "loss_function") and scores_the_next_token(model):
        record.set_methods("the model", model, Model(False, families.never_looks(model)))


def patch(model: nn.Module, reduction: str, record: Record) -> None:
    """Replace the loss of ``model`` and, where its forward ends as expected, let it skip the logits in training."""
    if not hasattr(type(model), "loss_function"):
        raise ValueError(f"packops.hf cannot replace the loss of {type(model).__name__}: it has no loss_function")
    if not scores_the_next_token(model):
        raise ValueError(
            f"packops.hf cannot replace the loss of {type(model).__name__} ({model.loss_type!r}): it does not score each token's "
            "successor. cross_entropy=False leaves it alone"
        )
    record.set("the model", model, "_loss_function", AppliedLoss(reduction))
    record.replaced("loss", f"packops.cross_entropy, reduction {reduction!r}")
    ending = _model_forward(rewrite.class_of(model), True)
    reason = ending.reason
    if reason is None and getattr(model, ending.head, None) is not model.get_output_embeddings():  # type: ignore[operator]
        reason = f"{ending.head} is not the model's output embedding"
    record.set_methods("the model", model, Model(reason is None, families.never_looks(model)))
    if reason is None:
        record.replaced("lm_head", "packops.linear_cross_entropy, without logits, in training and with skip_logits=True")
        if not _is_plain_linear(head := getattr(model, ending.head)):
            record.note(f"logits are made all the same while {ending.head} ({type(head).__name__}) is more than its weight")
    else:
        record.note(f"logits are always made: {reason}")


def scores_the_next_token(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    kind = getattr(model, "loss_type", None) or "ForCausalLM"  # which is also what transformers takes None for
    return LOSS_MAPPING.get(kind) is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)


def skip_logits(model: nn.Module, head: str, labels: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether this call shall return the loss without logits; takes ``skip_logits`` out of its keyword arguments."""
    wanted = kwargs.pop("skip_logits", None)
    if labels is None:
        return False
    if wanted is None:
        wanted = model.training and torch.is_grad_enabled()
    return bool(wanted) and isinstance(model.loss_function, CausalLMLoss) and _is_plain_linear(getattr(model, head))


def router_loss(
    function: Callable, kwargs: Mapping[str, Any], *, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | float:
    """The load balancing loss of a mixture of experts, of the tokens that are not padding; 0 where there are none."""
    mask = kwargs.get("real_tokens") if attention_mask is None else attention_mask
    if mask is None:
        return function(attention_mask=None, **options)
    some = (mask != 0).any()
    return function(attention_mask=torch.where(some, mask, 1), **options) * some


class Ending(NamedTuple):
    """The rewritten forward of a model."""

    function: Callable
    head: str  # attribute of the lm_head; "" where the logits are always made
    reason: str | None  # why they are


@cache
def _model_forward(cls: type, fused: bool) -> Ending:
    """The forward of ``cls`` with a router loss that leaves out padding and, if ``fused``, a branch that skips the logits."""
    bindings: dict[str, Any] = {}
    head, reason = "", None
    try:
        definition = rewrite.parse(cls.forward)  # type: ignore[attr-defined]
        if _rewrite_router_loss(cls, definition):
            bindings[_ROUTER] = router_loss
        if fused:
            try:
                head = _add_branch(cls, definition)
                bindings[_WANTED] = skip_logits
            except CannotRewriteError as error:
                reason = str(error)
        function = rewrite.build(cls.forward, definition, bindings) if bindings else cls.forward  # type: ignore[attr-defined]
    except CannotRewriteError as error:
        return Ending(cls.forward, "", str(error))  # type: ignore[attr-defined]
    return Ending(function, head, reason)


def _rewrite_router_loss(cls: type, definition: ast.FunctionDef) -> bool:
    calls = rewrite.calls_of(definition, ROUTER_LOSS)
    function = inspect.unwrap(cls.forward).__globals__.get(ROUTER_LOSS)  # type: ignore[attr-defined]
    if not calls or not definition.args.kwarg or "attention_mask" not in inspect.signature(function).parameters:
        return False
    for call in calls:
        names = list(inspect.signature(function).parameters)
        call.keywords += [ast.keyword(name, value) for name, value in zip(names, call.args, strict=False)]
        call.args = [ast.Name(ROUTER_LOSS, ast.Load()), ast.Name(definition.args.kwarg.arg, ast.Load())]
        call.func = ast.Name(_ROUTER, ast.Load())
    return True


def _add_branch(cls: type, definition: ast.FunctionDef) -> str:
    """Let the forward skip the logits; returns the attribute of the lm_head."""
    tail = _Tail(definition)
    this, body = rewrite.self_name(definition), definition.body
    if not definition.args.kwarg or not {"labels", "position_ids"} <= rewrite.parameter_names(definition):
        raise CannotRewriteError(f"{cls.__name__}.forward does not take labels, position_ids and **kwargs")
    kwargs = definition.args.kwarg.arg
    # Only the sequence reductions look at them, but these must.
    tail.call.keywords.insert(0, ast.keyword("position_ids", ast.Name("position_ids", ast.Load())))
    first = body[tail.begin]  # a traceback shows the line of the lm_head
    ask = rewrite.statements(f"{_SKIP} = {_WANTED}({this}, {tail.head!r}, labels, {kwargs})", at=first)
    skipping = rewrite.statements(
        f"{tail.logits} = None\n"
        f"loss = {this}.loss_function.of_hidden({this}.{tail.head}, {ast.unparse(tail.hidden)}, labels, "
        f"logit_scale={tail.scale}, softcap={tail.cap}, position_ids=position_ids, **{kwargs})",
        at=first,
    )
    branch = ast.copy_location(ast.If(ast.Name(_SKIP, ast.Load()), skipping, body[tail.begin : tail.end]), first)
    definition.body = [*ask, *body[: tail.begin], branch, *body[tail.end :]]
    return tail.head


class _Tail:
    """The end of a causal language model's forward, from the lm_head to the loss.

    Statements ``begin`` to ``end`` make the logits and the loss; ``hidden`` is what goes into ``self.<head>``, ``scale`` and
    ``cap`` are the source of what happens to the logits, ``call`` is the call of the loss function.
    """

    def __init__(self, definition: ast.FunctionDef):
        body, this = definition.body, rewrite.self_name(definition)
        name = f"{definition.name} ends in a way of its own"
        found = [(i, call) for i, statement in enumerate(body) if (call := self._head_call(statement, this))]
        if len(found) != 1:
            raise CannotRewriteError(name)
        self.begin, head_call = found[0]
        self.logits = rewrite.assigned_name(body[self.begin]) or ""
        self.head, self.hidden = rewrite.attribute_of(head_call.func, this) or "", head_call.args[0]
        self.scale, self.cap = "1.0", "None"
        at = self.begin + 1
        while at < len(body) and self._shapes_logits(body[at], this):
            at += 1
        if at + 1 >= len(body) or ast.unparse(body[at]) != "loss = None":
            raise CannotRewriteError(name)
        self.end = at + 2
        call = self._loss_call(body[at + 1], this)
        if call is None:
            raise CannotRewriteError(name)
        self.call = call
        returns = [statement for statement in body[self.end :] if not isinstance(statement, ast.Return)]
        if any(rewrite.mentions(statement, self.logits) for statement in returns):
            raise CannotRewriteError(f"{name}, and uses its logits after the loss")

    @staticmethod
    def _head_call(statement: ast.stmt, this: str) -> ast.Call | None:
        if rewrite.assigned_name(statement) is None:
            return None
        call = statement.value  # type: ignore[attr-defined]
        if not isinstance(call, ast.Call) or len(call.args) != 1 or call.keywords:
            return None
        return call if rewrite.attribute_of(call.func, this) in ("lm_head", "embed_out", "output") else None

    def _shapes_logits(self, statement: ast.stmt, this: str) -> bool:
        """Whether it scales the logits, or caps them, by a number of the model or its configuration."""
        x = self.logits
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare):
            cap = ast.unparse(statement.test.left)
            known = f"if {cap} is not None:\n    {x} = {x} / {cap}\n    {x} = torch.tanh({x})\n    {x} = {x} * {cap}"
            if self.cap == "None" and cap.startswith(f"{this}.config.") and ast.unparse(statement) == known:
                self.cap = cap
                return True
            return False
        if rewrite.assigned_name(statement) != x or self.cap != "None":  # a scale after a cap is not ours
            return False
        value = statement.value  # type: ignore[attr-defined]
        if not isinstance(value, ast.BinOp) or not isinstance(value.left, ast.Name) or value.left.id != x:
            return False
        factor, operator = ast.unparse(value.right), {ast.Mult: "*", ast.Div: "/"}.get(type(value.op))
        if operator is None or not isinstance(value.right, ast.Attribute) or not factor.startswith(f"{this}."):
            return False
        self.scale = f"{self.scale} {operator} {factor}"
        return True

    def _loss_call(self, branch: ast.stmt, this: str) -> ast.Call | None:
        if not isinstance(branch, ast.If) or ast.unparse(branch.test) != "labels is not None" or branch.orelse:
            return None
        if len(branch.body) != 1 or rewrite.assigned_name(branch.body[0]) != "loss":
            return None
        call = branch.body[0].value  # type: ignore[attr-defined]
        if not isinstance(call, ast.Call) or rewrite.attribute_of(call.func, this) != "loss_function":
            return None
        given = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "logits"), None)
        return call if isinstance(given, ast.Name) and given.id == self.logits else None
