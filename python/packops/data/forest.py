"""One packed row in which documents share their prefixes: :class:`PackedForest`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import packed_metadata
from ..ops.arguments import checks_annotations
from ..ops.document_sums import document_sums
from .batch import WEIGHT, PackedBatch, check_reduction, checked_columns, column_dtype
from .counts import as_array, as_integers, counted
from .packing import IntArray
from .prefixes import PrefixForest, prefix_forest

__all__ = ["PackedForest"]


@dataclasses.dataclass
class PackedForest(PackedBatch):
    """Documents packed into one row of T tokens, in which a prefix that several of them begin with stands once.

    The row is made of segments (:class:`packops.PrefixForest`): ``cu_seqlens`` says where each begins, ``parents`` what it
    continues. A token is scored once for all documents through it, with the sum of their weights, so that

    ``cross_entropy(logits, batch.shift_labels, token_weight=batch.token_weight, num_items=batch.denominator)``

    is the loss of the documents one by one. There is no ``labels``: a loss that shifts labels within segments would lose the last
    token of every shared prefix.

    Attributes:
        cu_seqlens: (S + 1,) int32, where each segment begins; ends at T.
        parents: (S,) int32, the segment that a segment continues, -1 for a root.
        position_ids: (1, T) int64, each token's place in its documents.
        seq_idx: (1, T) int32, the segment of each token.
        shift_labels: (1, T) int64, the next token of each token that is scored, ``ignore_index`` elsewhere.
        token_weight: (1, T) fp64, what all documents through a token give its loss; 0 where it is not scored.
        reduction: which mean the weights make, as in :func:`packops.cross_entropy`.
        denominator: what the weighted sum of losses is divided by: the weights of all tokens, or documents for the two sequence
            reductions. Add it up over micro-batches and ranks.
        max_seqlen: length of the longest document.
        num_items, num_sequences: scored tokens and documents with one, as of the documents one by one.
        num_valid: rows that are scored.
        lengths: tokens of each document.
        rows: (sum of lengths,) int64, the rows of all documents, one document after the other.
        scored_rows, scored_cu_seqlens: the same of the rows that a document scores.
    """

    labels: Tensor | None  # type: ignore[assignment]
    parents: Tensor = dataclasses.field(kw_only=True)
    token_weight: Tensor = dataclasses.field(kw_only=True)
    rows: Tensor = dataclasses.field(kw_only=True)
    scored_rows: Tensor = dataclasses.field(kw_only=True)
    scored_cu_seqlens: Tensor = dataclasses.field(kw_only=True)
    denominator: float = dataclasses.field(kw_only=True)
    reduction: str = dataclasses.field(kw_only=True)

    @classmethod
    @checks_annotations
    def from_documents(
        cls,
        documents: Sequence[NDArray[Any]],
        *,
        labels: Sequence[NDArray[Any]] | None = None,
        columns: Mapping[str, Sequence[NDArray[Any]]] | None = None,
        fills: Mapping[str, float] | None = None,
        forest: PrefixForest | None = None,
        reduction: str = "mean",
        pad_token_id: int = 0,
        length: int | None = None,
        capacity: int | None = None,
        ignore_index: int = -100,
    ) -> PackedForest:
        """One row from its documents.

        Args:
            documents: token ids of each document, (n,) integers.
            labels: per document its ids, ``ignore_index`` where a token is not scored; None: all are, but a document's first.
            columns: further per-token columns, an (n,) array per document. Documents must agree on them where they share tokens,
                but for ``token_weight``, the weight of a row in its document's loss.
            fills: what pads each column; 0 unless it is named.
            forest: of these documents; None: :func:`packops.prefix_forest`.
            reduction: ``"mean"``, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``.
            length: tokens of the row, the rest is padding; None: no padding.
            capacity: make ``cu_seqlens`` (capacity + 1,) by repeating T: the same shape for every batch.

        Raises:
            ValueError: the documents do not fit, or disagree about a label or a column of a token that they share.
        """
        check_reduction(reduction)
        forest = prefix_forest(documents) if forest is None else forest
        begins = np.array([0, *itertools.accumulate(forest.length.tolist())], np.int64)
        own = int(begins[-1])
        total = max(own, 1) if length is None else length
        if own > total:
            raise ValueError(f"the documents have {own} tokens, shared prefixes counted once; the row has {total}")
        boundaries, parents = begins.tolist(), forest.parents.tolist()
        if own < total:
            boundaries.append(total)
            parents.append(-1)
        if capacity is not None:
            if len(parents) > capacity:
                raise ValueError(f"{len(parents)} segments (padding is one) do not fit a cu_seqlens for {capacity}")
            boundaries += [total] * (capacity - len(parents))
            parents += [-1] * (capacity - len(parents))

        rows = [_rows(forest, begins, number) for number in range(len(documents))]
        extra = {name: [as_array(name, part) for part in parts] for name, parts in checked_columns(columns).items()}
        for name, parts in {"input_ids": documents, **({} if labels is None else {"labels": labels}), **extra}.items():
            _check_one_each(name, parts, rows)
        fills = {name: (fills or {}).get(name, 0) for name in extra}
        padding = {name: np.full(total, fill, column_dtype(name, extra[name], fill)) for name, fill in fills.items()}
        scored = _score(documents if labels is None else labels, rows, extra.pop(WEIGHT, None), total, reduction, ignore_index)
        positions = np.arange(total) - np.repeat(begins, np.diff([*begins, total]))
        positions[:own] += np.repeat(forest.start, forest.length)
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        return cls(
            input_ids=_spread(documents, rows, np.full(total, pad_token_id), "input_ids"),
            labels=None,
            position_ids=torch.from_numpy(positions)[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(map(len, documents), default=0),
            seq_idx=torch.repeat_interleave(torch.arange(len(parents), dtype=torch.int32), cu_seqlens.diff().long())[None],
            num_items=int(scored.counts.sum()),
            num_valid=int((scored.labels != ignore_index).sum()),
            num_sequences=int((scored.counts > 0).sum()),
            boundaries=tuple(boundaries),
            lengths=tuple(map(len, documents)),
            shift_labels=torch.from_numpy(scored.labels)[None],
            real_tokens=(torch.arange(total) < own)[None] if own < total else None,
            columns={name: _spread(parts, rows, padding[name], name) for name, parts in extra.items()},
            ignore_index=ignore_index,
            parents=torch.tensor(parents, dtype=torch.int32),
            token_weight=torch.from_numpy(scored.weight)[None],
            rows=torch.from_numpy(_joined(rows)),
            scored_rows=torch.from_numpy(scored.rows),
            scored_cu_seqlens=torch.tensor([0, *itertools.accumulate(scored.counts.tolist())], dtype=torch.int32),
            denominator=float(scored.weight.sum()) if reduction == "mean" else float((scored.counts > 0).sum()),
            reduction=reduction,
        )

    def unpack(self, values: Tensor) -> list[Tensor]:
        """Per document, its part of (1, T, ...) or (T, ...) values. A copy, since shared rows belong to several documents."""
        return list(self._rows_of(values)[self.rows].split(list(self.lengths)))

    def document_sums(self, values: Tensor) -> Tensor:
        """(documents,) the sum of each document's values over the rows that it scores, whoever else scores them."""
        return document_sums(self._numbers_of(values)[self.scored_rows], self.scored_cu_seqlens)

    def denominator_of(self, reduction: str) -> float:
        if reduction != self.reduction:
            raise ValueError(f"the weights of this PackedForest are those of reduction {self.reduction!r}, not of {reduction!r}")
        return self.denominator

    def own_rows(self, document: int) -> Tensor:
        documents_through = self.rows.bincount(minlength=self.num_tokens)
        rows = self.rows.split(list(self.lengths))[document]
        return rows[documents_through[rows] == 1]

    def to_hf(
        self, *, seq_idx: bool = False, static: bool = False, attention: Literal["packops_varlen", "sdpa"] = "packops_varlen"
    ) -> dict[str, Any]:
        """Keyword arguments of a Hugging Face causal language model after :func:`packops.hf.apply`.

        Args:
            attention: of the model. ``"packops_varlen"`` (:func:`packops.hf.apply`) takes the forest as it is. ``"sdpa"``, of a
                model without sliding windows, takes a (1, 1, T, T) mask. No other attention knows forests.
            seq_idx: is refused: layers with a state cannot branch.
            static: as in :meth:`PackedBatch.to_hf`.
        """
        if seq_idx:
            raise ValueError("seq_idx is for layers with a state, which cannot branch where documents part")
        labels = self._hf_labels(self.shift_labels, shifted=True)
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": labels,  # what makes transformers' models compute a loss
            "shift_labels": labels,
            WEIGHT: self.token_weight,
            "use_cache": False,
        }
        if not static:
            inputs["num_valid"] = self.num_valid
        if self.reduction == "seq-mean-token-sum":  # else the weights of the row add up to it
            inputs["num_items_in_batch"] = self.denominator
        inputs |= self._real_tokens(static)
        if attention == "packops_varlen":
            inputs |= {"cu_seq_lens_q": self.cu_seqlens, "cu_seq_lens_k": self.cu_seqlens, "parents": self.parents}
        elif attention == "sdpa":
            inputs["attention_mask"] = self.attention_mask()
        else:
            raise ValueError(f"attention must be 'packops_varlen' or 'sdpa', got {attention!r}")
        return inputs | self.columns

    def __repr__(self) -> str:
        return (
            f"PackedForest({counted(self.num_documents, 'document')} of {counted(sum(self.lengths), 'token')} in "
            f"{self.num_tokens:,}, {self.num_items:,} scored, longest {self.max_seqlen:,}, on {self.device})"
        )

    def _sees(self) -> Callable[[Tensor, Tensor], Tensor]:
        ends = packed_metadata(self.cu_seqlens, self.num_tokens, self.parents)[2]
        return lambda query, key: (key <= query) & (query < ends[key])


torch.serialization.add_safe_globals([PackedForest])  # as for a PackedBatch


class _Scored(NamedTuple):
    labels: IntArray  # (T,)
    weight: NDArray[np.float64]  # (T,)
    counts: IntArray  # (documents,)
    rows: IntArray  # (sum of counts,)


def _score(
    labels: Sequence[NDArray[Any]],
    rows: Sequence[IntArray],
    weights: Sequence[NDArray[Any]] | None,
    total: int,
    reduction: str,
    ignore_index: int,
) -> _Scored:
    """What each row is scored against, and with how much of which documents."""
    row_labels, row_weight = np.full(total, ignore_index, np.int64), np.zeros(total)
    scored_rows = []
    for number, (own_labels, own_rows) in enumerate(zip(labels, rows, strict=True)):
        targets = as_integers(f"labels of document {number}", own_labels)[1:]
        weight = np.ones(len(targets)) if weights is None else np.asarray(weights[number], np.float64)[:-1]
        scored = (targets != ignore_index) & (weight != 0)
        at, targets, weight = own_rows[:-1][scored], targets[scored], weight[scored]
        if (targets < 0).any():
            raise ValueError(
                f"labels of document {number} must be token ids or ignore_index = {ignore_index}, got {targets.min()}"
            )
        known = row_labels[at]
        if ((known != ignore_index) & (known != targets)).any():
            raise ValueError(f"labels of document {number} differ from those of another where the two share a prefix")
        row_labels[at] = targets
        if reduction == "seq-mean-token-mean":
            weight = weight / weight.sum() if weight.sum() != 0 else np.zeros_like(weight)  # as packops.cross_entropy has it
        row_weight[at] += weight
        scored_rows.append(at)
    counts = np.array([len(at) for at in scored_rows], np.int64)
    return _Scored(row_labels, row_weight, counts, _joined(scored_rows))


def _check_one_each(name: str, parts: Sequence[Any], rows: Sequence[IntArray]) -> None:
    if len(parts) != len(rows):
        raise ValueError(f"{name} must have one array per document ({len(rows)}), got {len(parts)}")
    for number, (part, own_rows) in enumerate(zip(parts, rows, strict=True)):
        if np.shape(part) != own_rows.shape:
            raise ValueError(f"{name} of document {number} must have one entry per token ({len(own_rows)}), got {np.shape(part)}")


def _rows(forest: PrefixForest, begins: IntArray, document: int) -> IntArray:
    """(n,) the rows of one document."""
    return _joined([np.arange(begins[segment], begins[segment + 1]) for segment in forest.path(document)])


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _spread(values: Sequence[NDArray[Any]], rows: Sequence[IntArray], row: NDArray[Any], name: str) -> Tensor:
    """(1, T) a row of what every document says of its tokens."""
    is_set = np.zeros(len(row), bool)
    for number, (own_rows, own_values) in enumerate(zip(rows, values, strict=True)):
        own_values = as_array(f"{name} of document {number}", own_values).astype(row.dtype)
        if (is_set[own_rows] & (row[own_rows] != own_values)).any():
            raise ValueError(f"{name} of document {number} differs from that of another where the two share a prefix")
        row[own_rows] = own_values
        is_set[own_rows] = True
    return torch.from_numpy(row)[None]
