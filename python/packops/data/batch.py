"""One packed row and what attention, the loss and the trainer need to know about it: :class:`PackedBatch`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..functional import packed_labels, packed_metadata
from ..ops.arguments import checks_annotations, describe
from ..ops.document_sums import document_sums
from .counts import as_integers, counted
from .documents import document_begins

__all__ = ["PackedBatch"]

T = TypeVar("T")
WEIGHT = "token_weight"  # the column of weights in the loss
DENOMINATORS = {"mean": "tokens", "seq-mean-token-mean": "documents", "seq-mean-token-sum": "documents"}


@dataclasses.dataclass
class PackedBatch:
    """Documents packed into one row of T tokens.

    Padding at the end is one trailing document of its own: attention kernels, which want ``cu_seqlens`` to end at T, see a
    document like any other, and no token of it is ever scored. ``num_documents`` and ``lengths`` leave it out.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64, each token's own id where it is scored, ``ignore_index`` elsewhere and at every document's first
            token: for a model that shifts labels itself (Hugging Face), or ``packops.cross_entropy(..., shift=True)``.
        position_ids: (1, T) int64, restarting at 0 in every document.
        cu_seqlens: (S + 1,) int32, where each document begins; ends at T.
        max_seqlen: length of the longest document, padding included (a host int, as attention kernels want it).
        seq_idx: (1, T) int32, the document of each token.
        num_items: tokens scored, those of ``token_weight`` 0 left out: this batch's share of a token mean without other weights
            (:meth:`denominator_of` has those).
        num_valid: the same number, these included, for ``packops.linear_cross_entropy(num_valid=...)``, where it is always this
            row's own count.
        num_sequences: documents with at least one scored token: this batch's share of a mean over documents.
        boundaries: ``cu_seqlens`` as host ints.
        lengths: tokens of each document, without padding. :class:`packops.PackingCollator` leaves empty documents out.
        shift_labels: (1, T) int64, row t scored against token t + 1; None unless asked for.
        real_tokens: (1, T) bool, False for padding; None where there is none.
        columns: further (1, T) tensors by name.
        ignore_index: what a label that is not scored holds.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    seq_idx: Tensor
    num_items: int
    num_valid: int
    num_sequences: int
    boundaries: tuple[int, ...]
    lengths: tuple[int, ...]
    shift_labels: Tensor | None = None
    real_tokens: Tensor | None = None
    columns: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ignore_index: int = -100

    # ---- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    @checks_annotations
    def build(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        boundaries: Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
        capacity: int | None = None,
        shift_labels: bool = False,
        columns: Mapping[str, Tensor] | None = None,
        ignore_index: int = -100,
    ) -> PackedBatch:
        """Everything else from a row's tokens, labels and document boundaries.

        Args:
            input_ids, labels: (T,); ``labels[t]`` is token t's id or ``ignore_index``.
            boundaries: (S + 1,) from 0 to T.
            lengths: tokens without padding of the first ``len(lengths)`` documents; the rest is padding. None: none is padded.
            capacity: make ``cu_seqlens`` (capacity + 1,) by repeating T: the same shape for every batch.
            shift_labels: also fill :attr:`shift_labels`.
            columns: further (T,) tensors.
        """
        input_ids, labels, columns = _int64(input_ids, "input_ids"), _int64(labels, "labels"), checked_columns(columns)
        for name, row in (("input_ids", input_ids), ("labels", labels)):
            if row.dim() != 1:
                raise ValueError(f"{name} must have shape (tokens,), got {tuple(row.shape)}")
        for name, values in {"labels": labels, **columns}.items():
            _check_one_each(values, name, len(input_ids))
        boundaries = tuple(as_integers("boundaries", boundaries).tolist())
        if boundaries[:1] != (0,) or boundaries[-1] != len(input_ids) or any(a > b for a, b in itertools.pairwise(boundaries)):
            raise ValueError(f"boundaries must rise from 0 to the {len(input_ids)} tokens, got {_some(boundaries)}")
        spans = tuple(end - begin for begin, end in itertools.pairwise(boundaries))
        lengths = spans if lengths is None else tuple(as_integers("lengths", lengths).tolist())
        if len(lengths) > len(spans) or any(not 0 <= length <= span for length, span in zip(lengths, spans, strict=False)):
            raise ValueError(f"lengths must fit the documents between the boundaries, {_some(spans)}, got {_some(lengths)}")
        if capacity is not None:
            if len(spans) > capacity:
                raise ValueError(f"{len(spans)} documents (padding is one) do not fit a cu_seqlens for {capacity}")
            boundaries += (boundaries[-1],) * (capacity - len(spans))
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=input_ids.device)
        position_ids, seq_idx = packed_metadata(cu_seqlens, len(input_ids))
        masked, counts = packed_labels(labels, cu_seqlens, shift=False, ignore_index=ignore_index)
        stray = masked[(masked < 0) & (masked != ignore_index)]
        if len(stray):  # transformers leaves out -100, which would be counted here
            raise ValueError(f"labels must be token ids or ignore_index = {ignore_index}, got {int(stray[0])}")
        num_valid = int(counts.sum())
        if WEIGHT in columns:  # that of a row, which is scored against the token behind it
            weighed = labels.masked_fill(columns[WEIGHT].roll(1) == 0, ignore_index)
            counts = packed_labels(weighed, cu_seqlens, shift=False, ignore_index=ignore_index)[1]
        counts_on_host = counts.tolist()
        real_tokens = None
        if sum(lengths) < len(input_ids):
            size = torch.zeros(len(boundaries) - 1, dtype=torch.int64)
            size[: len(lengths)] = torch.tensor(lengths, dtype=torch.int64)
            real_tokens = (position_ids < size.to(input_ids.device)[seq_idx.long()])[None]
        return cls(
            input_ids=input_ids[None],
            labels=masked[None],
            position_ids=position_ids[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(spans, default=0),
            seq_idx=seq_idx[None],
            num_items=sum(counts_on_host),
            num_valid=num_valid,
            num_sequences=sum(count > 0 for count in counts_on_host),
            boundaries=boundaries,
            lengths=lengths,
            shift_labels=packed_labels(labels, cu_seqlens, ignore_index=ignore_index)[0][None] if shift_labels else None,
            real_tokens=real_tokens,
            columns={name: column[None] for name, column in columns.items()},
            ignore_index=ignore_index,
        )

    @classmethod
    @checks_annotations
    def from_cu_seqlens(
        cls, input_ids: Tensor, cu_seqlens: Tensor, *, labels: Tensor | None = None, **options: Any
    ) -> PackedBatch:
        """From a packed row (T,) or (1, T) and its ``cu_seqlens``; tokens past ``cu_seqlens[-1]`` are padding.

        ``labels`` are the input ids unless given. Reads ``cu_seqlens`` on the host, which waits for the device.
        """
        tokens = _int64(_one_row(input_ids, "input_ids"), "input_ids")
        bounds = as_integers("cu_seqlens", cu_seqlens.cpu()).tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] > len(tokens) or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to at most the {len(tokens)} tokens, got {_some(bounds)}")
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        targets = _int64(_one_row(tokens if labels is None else labels, "labels"), "labels").clone()
        if bounds[-1] < len(tokens):
            targets[bounds[-1] :] = options.get("ignore_index", -100)
            bounds.append(len(tokens))
        return cls.build(tokens, targets, bounds, lengths=lengths, **options)

    @classmethod
    @checks_annotations
    def from_position_ids(
        cls, input_ids: Tensor, position_ids: Tensor, *, labels: Tensor | None = None, **options: Any
    ) -> PackedBatch:
        """From a packed row and its position ids: a document begins wherever they do not go up by one."""
        positions = _int64(_one_row(position_ids, "position_ids"), "position_ids")
        _check_one_each(positions, "position_ids", len(_one_row(input_ids, "input_ids")))
        boundaries = [*document_begins(positions).nonzero().flatten().tolist(), len(positions)]
        cu_seqlens = torch.tensor(boundaries if len(positions) else [0], dtype=torch.int32)
        return cls.from_cu_seqlens(input_ids, cu_seqlens, labels=labels, **options)

    @classmethod
    @checks_annotations
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor, *, labels: Tensor | None = None, **options: Any
    ) -> PackedBatch:
        """From a padded (B, L) batch: its documents one after the other, without padding.

        ``attention_mask`` is 0 for padding, which may lie before, after and between documents, and 1 (or True) for the document
        of a row; or it numbers the documents of a row, as ``(1, 1, 1, 2, 2, 0)`` does.

        Raises:
            TypeError: a mask of floats. One that is added to the scores has 0 where this one has 1.
            ValueError: a document that padding or another document interrupts, a negative number, another shape.
        """
        if input_ids.shape != attention_mask.shape or input_ids.dim() != 2:
            raise ValueError(
                "input_ids and attention_mask must share one shape (batch, length), "
                f"got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        targets = input_ids if labels is None else labels
        if targets.shape != input_ids.shape:
            raise ValueError(f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(targets.shape)}")
        keep, begins = _documents_of_mask(attention_mask)
        tokens = input_ids[keep]
        return cls.build(tokens, targets[keep], [*begins[keep].nonzero().flatten().tolist(), len(tokens)], **options)

    # ---- using it ------------------------------------------------------------------------------------------------------

    @property
    def num_documents(self) -> int:
        """Documents in the row, the padding left out."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.input_ids.shape[1]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The batch with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def unpack(self, values: Tensor) -> list[Tensor]:
        """Per document, its part of (1, T, ...) or (T, ...) values, without padding. No copy, no host sync."""
        rows = self._rows_of(values)
        return [rows[begin : begin + length] for begin, length in zip(self.boundaries, self.lengths, strict=False)]

    def document_sums(self, values: Tensor) -> Tensor:
        """(documents,) the sum of each document's (1, T) or (T,) values: log-probabilities, say, which are 0 where nothing is
        scored. Differentiable, the same bits in every run: :func:`packops.document_sums`."""
        return document_sums(self._numbers_of(values), self.cu_seqlens)[: self.num_documents]

    def denominator_of(self, reduction: str) -> Tensor | float:
        """What this batch adds to the ``num_items`` of a step: its documents, or its tokens, each with its ``token_weight``."""
        check_reduction(reduction)
        if DENOMINATORS[reduction] == "documents":
            return self.num_sequences
        if WEIGHT not in self.columns:
            return self.num_items
        return torch.where(self.labels != self.ignore_index, self._weight_of_labels().double(), 0.0).sum()

    def attention_mask(self, kind: str = "4d", *, dtype: torch.dtype | None = None) -> Tensor:
        """(1, 1, T, T): which token may attend to which, causally and within its document.

        ``dtype`` None gives bool (True: may attend), a floating dtype 0 and its most negative number, to be added to the scores.
        Costs T^2 memory; :meth:`block_mask` does not.
        """
        if kind != "4d":
            raise ValueError(f"kind must be '4d', got {kind!r}; block_mask() makes the FlexAttention mask")
        row = torch.arange(self.num_tokens, device=self.device)
        allowed = self._sees()(row[:, None], row[None, :])
        if dtype is not None:
            if not dtype.is_floating_point:
                raise TypeError(f"dtype must be floating point, or None for a mask of bools, got {dtype}")
            allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        return allowed[None, None]

    def block_mask(self, *, compile: bool = False) -> Any:
        """A FlexAttention ``BlockMask``: causal within each document. ``compile``: build it without its T^2 intermediate."""
        from torch.nn.attention.flex_attention import create_block_mask

        sees, size = self._sees(), self.num_tokens

        def mask(batch, head, query, key):
            return sees(query, key)

        return create_block_mask(mask, 1, None, size, size, device=str(self.device), _compile=compile)

    def to_hf(self, *, seq_idx: bool = False, static: bool = False) -> dict[str, Any]:
        """Keyword arguments of a Hugging Face causal language model, for any of its attention backends.

        No ``attention_mask``, since one of ones would turn the detection of packed rows off; ``use_cache=False``, since the cache
        that a configuration asks for by default does the same. ``cu_seq_lens_*`` spare FlashAttention a host sync in every layer,
        and ``num_valid`` spares the lm_head of :func:`packops.hf.apply` the tokens that are not scored; other models ignore it.
        Labels whose ``token_weight`` is 0 are -100, so that Trainer, which counts labels, counts none that is not scored.
        Where there is padding, ``real_tokens`` keeps it out of the router loss of a mixture of experts after
        :func:`packops.hf.apply`. ``seq_idx`` adds that too, for models with Mamba layers.

        ``static`` is for a compiled model: no number in the result changes from batch to batch, for each would be a graph of its
        own. ``max_length_*`` are the row's length, an upper bound, and ``num_valid`` is left out. Shapes are those of the
        collator: ``PackingCollator(pad_to_length=..., num_documents=...)``.
        """
        longest = self.num_tokens if static else self.max_seqlen
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "labels": self._hf_labels(self.labels, shifted=False),
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
            "use_cache": False,
        }
        if not static:
            inputs["num_valid"] = self.num_valid
        if self.shift_labels is not None:
            inputs["shift_labels"] = self._hf_labels(self.shift_labels, shifted=True)
        if seq_idx:
            inputs["seq_idx"] = self.seq_idx
        return inputs | self._real_tokens(static) | self.columns

    def __repr__(self) -> str:
        padding = self.num_tokens - sum(self.lengths)
        return (
            f"PackedBatch({counted(self.num_documents, 'document')}, {counted(self.num_tokens, 'token')} ({padding:,} padding), "
            f"{self.num_items:,} scored, longest {self.max_seqlen:,}, on {self.device})"
        )

    def own_rows(self, document: int) -> Tensor:
        """(n,) int64: the rows of one document, those that it shares with others left out."""
        document = range(self.num_documents)[document]  # -1 is the last one, and not the padding
        begin = self.boundaries[document]
        return torch.arange(begin, begin + self.lengths[document], device=self.device)

    def _hf_labels(self, labels: Any, *, shifted: bool) -> Tensor:
        """With -100 where nothing is scored: transformers and Trainer know no other."""
        if WEIGHT in self.columns:
            weight = self.columns[WEIGHT] if shifted else self._weight_of_labels()
            labels = labels.masked_fill(weight == 0, -100)
        return labels if self.ignore_index == -100 else labels.masked_fill(labels == self.ignore_index, -100)

    def _weight_of_labels(self) -> Tensor:
        """(1, T), where ``token_weight`` is that of a row, which is scored against the token behind it."""
        return self.columns[WEIGHT].roll(1)

    def _real_tokens(self, static: bool) -> dict[str, Tensor]:
        if self.real_tokens is not None:
            return {"real_tokens": self.real_tokens}
        return {"real_tokens": torch.ones_like(self.input_ids, dtype=torch.bool)} if static else {}

    def _sees(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Whether a query may attend to a key, both numbers of tokens."""
        document = self.seq_idx[0]
        return lambda query, key: (document[query] == document[key]) & (query >= key)

    def _rows_of(self, values: Tensor) -> Tensor:
        """(T, ...) of (1, T, ...) or (T, ...) values."""
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor, got {describe(values)}")
        rows = values[0] if values.dim() > 1 and values.shape[:2] == (1, self.num_tokens) else values
        if rows.dim() < 1 or rows.shape[0] != self.num_tokens:
            raise ValueError(
                f"values must have shape (1, {self.num_tokens}, ...) or ({self.num_tokens}, ...), got {tuple(values.shape)}"
            )
        return rows

    def _numbers_of(self, values: Tensor) -> Tensor:
        """(T,) of (1, T) or (T,) values."""
        rows = self._rows_of(values)
        if rows.dim() != 1:  # their sums would be of other tokens
            raise ValueError(f"values must have one number per token ({self.num_tokens}), got shape {tuple(values.shape)}")
        return rows

    def _map(self, f) -> Any:
        moved: dict[str, Any] = {
            field.name: f(value) for field in dataclasses.fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, columns={name: f(column) for name, column in self.columns.items()}, **moved)


def check_reduction(reduction: str, place: str = "") -> None:
    if reduction not in DENOMINATORS:
        raise ValueError(f"{place}reduction must be one of {', '.join(map(repr, DENOMINATORS))}, got {reduction!r}")


# What a batch has in any case, under either set of names. An attention_mask would end the search for packed documents.
OWN_NAMES = frozenset(field.name for field in dataclasses.fields(PackedBatch)) | {
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache", "attention_mask", "parents"),
}


def checked_columns(columns: Mapping[str, T] | None) -> Mapping[str, T]:
    """The columns that come on top of a batch's own, or an error where one would take the place of its own."""
    if not isinstance(columns, Mapping | None):
        raise TypeError(f"columns must be a mapping with their names as keys or None, got {type(columns).__name__}")
    for name in columns or {}:
        if name in OWN_NAMES:
            raise ValueError(f"columns must not hold {name!r}: that is made from the documents")
    return columns or {}


def column_dtype(name: str, parts: Sequence[np.ndarray], fill: float) -> np.dtype:
    """A type that holds the values of all documents and the padding."""
    pad = np.asarray(fill)
    if pad.ndim or pad.dtype.kind not in "biuf":
        raise TypeError(f"column {name!r} must be padded with a number that its type can hold, got {fill!r}")
    dtype = np.result_type(*{part.dtype for part in parts}) if parts else pad.dtype
    if dtype.kind not in "biuf":
        raise TypeError(f"column {name!r} must hold numbers or bool, got {dtype}")
    with np.errstate(all="ignore"):
        if dtype.kind != "f" and pad.astype(dtype) != fill:
            dtype = np.result_type(dtype, np.min_scalar_type(fill))
        if dtype.kind != "f":
            return dtype
        for part in (*parts, pad):
            if (np.isfinite(part) & ~np.isfinite(part.astype(np.float32))).any():
                raise ValueError(f"column {name!r} holds numbers that float32 cannot hold: {part}")
            if part.dtype.kind in "iu" and not np.array_equal(part.astype(np.float32).astype(np.float64), part.astype(object)):
                raise ValueError(f"column {name!r} holds floats and integers that float32 cannot hold: make it one or the other")
    return np.dtype(np.float32)


def _documents_of_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) bool twice: which tokens are not padding, and which begin a document."""
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integers (0: padding; 1, or the number of the document: a token), got {mask.dtype}"
        )
    document = mask.long()
    if (document < 0).any():
        raise ValueError(f"attention_mask must not be negative, got {int(document.min())}")
    before = torch.nn.functional.pad(document[:, :-1], (1, 0))[:, : document.shape[1]]
    keep = document > 0
    begins = keep & (document != before)
    in_order = document.sort(1).values
    first = torch.nn.functional.pad(in_order[:, :-1], (1, 0))[:, : document.shape[1]] != in_order
    interrupted = begins.sum(1) > first.sum(1)
    if interrupted.any():
        row = int(interrupted.nonzero()[0])
        raise ValueError(
            f"attention_mask of row {row} interrupts a document: the tokens of each must lie together, got "
            f"{_some(document[row].tolist())}"
        )
    return keep, begins


def _int64(values: Tensor, name: str) -> Tensor:
    """In int64: the smaller types, above all the unsigned ones, cannot hold every ignore_index."""
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values.long()


def _check_one_each(values: Tensor, name: str, tokens: int) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(values)}")
    if values.shape[:1] != (tokens,):
        raise ValueError(f"{name} must have one entry per token ({tokens}), got shape {tuple(values.shape)}")


def _some(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 16 else f"[{', '.join(map(str, values[:12]))}, ..., {values[-1]}]"


def _one_row(values: Tensor, name: str) -> Tensor:
    if values.dim() == 1:
        return values
    if values.dim() == 2 and values.shape[0] == 1:
        return values[0]
    raise ValueError(f"{name} must be one packed row, (T,) or (1, T), got {tuple(values.shape)}")


# torch.load takes what torch.save made of a batch; it holds tensors and numbers, and runs nothing.
torch.serialization.add_safe_globals([PackedBatch])
