"""One packed row and what attention, the loss and the trainer need to know about it: :class:`PackedBatch`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import packed_labels, packed_metadata
from .documents import document_begins

__all__ = ["PackedBatch"]


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
        num_items: tokens scored: this batch's share of a token mean.
        num_valid: the same number, for ``packops.linear_cross_entropy(num_valid=...)``, where it is always this row's own count.
        num_sequences: documents with at least one scored token: this batch's share of a mean over documents.
        boundaries: ``cu_seqlens`` as host ints.
        lengths: tokens of each document, without padding.
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
        boundaries = tuple(boundaries)
        if boundaries[0] != 0 or boundaries[-1] != len(input_ids):
            raise ValueError(
                f"boundaries must run from 0 to the {len(input_ids)} tokens, got {boundaries[0]} to {boundaries[-1]}"
            )
        spans = tuple(end - begin for begin, end in itertools.pairwise(boundaries))
        if capacity is not None:
            if len(spans) > capacity:
                raise ValueError(f"{len(spans)} documents (padding is one) do not fit a cu_seqlens for {capacity}")
            boundaries += (boundaries[-1],) * (capacity - len(spans))
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=input_ids.device)
        position_ids, seq_idx = packed_metadata(cu_seqlens, len(input_ids))
        masked, counts = packed_labels(labels, cu_seqlens, shift=False, ignore_index=ignore_index)
        counts_on_host = counts.tolist()
        lengths = spans if lengths is None else tuple(lengths)
        real_tokens = None
        if sum(lengths) < len(input_ids):
            size = torch.zeros(len(boundaries) - 1, dtype=torch.int64)
            size[: len(lengths)] = torch.tensor(lengths, dtype=torch.int64)
            real_tokens = (position_ids < size.to(input_ids.device)[seq_idx.long()])[None]
        num_items = sum(counts_on_host)
        return cls(
            input_ids=input_ids[None],
            labels=masked[None],
            position_ids=position_ids[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(spans, default=0),
            seq_idx=seq_idx[None],
            num_items=num_items,
            num_valid=num_items,
            num_sequences=sum(count > 0 for count in counts_on_host),
            boundaries=boundaries,
            lengths=lengths,
            shift_labels=packed_labels(labels, cu_seqlens, ignore_index=ignore_index)[0][None] if shift_labels else None,
            real_tokens=real_tokens,
            columns={name: column[None] for name, column in (columns or {}).items()},
            ignore_index=ignore_index,
        )

    @classmethod
    def from_cu_seqlens(
        cls, input_ids: Tensor, cu_seqlens: Tensor, *, labels: Tensor | None = None, **options: Any
    ) -> PackedBatch:
        """From a packed row (T,) or (1, T) and its ``cu_seqlens``; tokens past ``cu_seqlens[-1]`` are padding.

        ``labels`` are the input ids unless given. Reads ``cu_seqlens`` on the host, which waits for the device.
        """
        tokens = _one_row(input_ids, "input_ids")
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] > len(tokens) or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to at most the {len(tokens)} tokens, got {bounds}")
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        targets = _one_row(tokens if labels is None else labels, "labels").clone()
        if bounds[-1] < len(tokens):
            targets[bounds[-1] :] = options.get("ignore_index", -100)
            bounds.append(len(tokens))
        return cls.build(tokens, targets, bounds, lengths=lengths, **options)

    @classmethod
    def from_position_ids(
        cls, input_ids: Tensor, position_ids: Tensor, *, labels: Tensor | None = None, **options: Any
    ) -> PackedBatch:
        """From a packed row and its position ids: a document begins wherever they do not go up by one."""
        positions = _one_row(position_ids, "position_ids")
        boundaries = [*document_begins(positions).nonzero().flatten().tolist(), len(positions)]
        cu_seqlens = torch.tensor(boundaries if len(positions) else [0], dtype=torch.int32)
        return cls.from_cu_seqlens(input_ids, cu_seqlens, labels=labels, **options)

    @classmethod
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor, *, labels: Tensor | None = None, **options: Any
    ) -> PackedBatch:
        """From a padded (B, L) batch: its documents one after the other, without the padding of either side."""
        if input_ids.shape != attention_mask.shape or input_ids.dim() != 2:
            raise ValueError(
                "input_ids and attention_mask must share one shape (batch, length), "
                f"got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        keep = attention_mask.bool()
        lengths = [length for length in keep.sum(1).tolist() if length]
        targets = input_ids if labels is None else labels
        return cls.build(input_ids[keep], targets[keep], [0, *itertools.accumulate(lengths)], **options)

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
        rows = values[0] if values.dim() > 1 and values.shape[:2] == (1, self.num_tokens) else values
        if rows.dim() < 1 or rows.shape[0] != self.num_tokens:
            raise ValueError(
                f"values must have shape (1, {self.num_tokens}, ...) or ({self.num_tokens}, ...), got {tuple(values.shape)}"
            )
        return [rows[begin : begin + length] for begin, length in zip(self.boundaries, self.lengths, strict=False)]

    def attention_mask(self, kind: str = "4d", *, dtype: torch.dtype | None = None) -> Tensor:
        """(1, 1, T, T): which token may attend to which, causally and within its document.

        ``dtype`` None gives bool (True: may attend), a floating dtype 0 and its most negative number, to be added to the scores.
        Costs T^2 memory; :meth:`block_mask` does not.
        """
        if kind != "4d":
            raise ValueError(f"kind must be '4d', got {kind!r}; block_mask() makes the FlexAttention mask")
        row = torch.arange(self.num_tokens, device=self.device)
        allowed = (self.seq_idx[0, :, None] == self.seq_idx[0, None, :]) & (row[:, None] >= row[None, :])
        if dtype is not None:
            allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        return allowed[None, None]

    def block_mask(self, *, compile: bool = False) -> Any:
        """A FlexAttention ``BlockMask``: causal within each document. ``compile``: build it without its T^2 intermediate."""
        from torch.nn.attention.flex_attention import create_block_mask

        document = self.seq_idx[0]

        def same_document_and_causal(batch, head, query, key):
            return (document[query] == document[key]) & (query >= key)

        size = self.num_tokens
        return create_block_mask(same_document_and_causal, 1, None, size, size, device=str(self.device), _compile=compile)

    def to_hf(self, *, seq_idx: bool = False) -> dict[str, Any]:
        """Keyword arguments of a Hugging Face causal language model, for any of its attention backends.

        No ``attention_mask``, since one of ones would turn the detection of packed rows off; ``use_cache=False``, since the cache
        that a configuration asks for by default does the same. ``cu_seq_lens_*`` spare FlashAttention a host sync in every layer,
        and ``num_valid`` spares the lm_head of :func:`packops.hf.apply` the tokens that are not scored; other models ignore it.
        Where there is padding, ``real_tokens`` keeps it out of the router loss of a mixture of experts after
        :func:`packops.hf.apply`. ``seq_idx`` adds that too, for models with Mamba layers.
        """
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            "use_cache": False,
            "num_valid": self.num_valid,
        }
        if self.shift_labels is not None:
            inputs["shift_labels"] = self.shift_labels
        if self.real_tokens is not None:
            inputs["real_tokens"] = self.real_tokens
        if seq_idx:
            inputs["seq_idx"] = self.seq_idx
        return inputs | self.columns

    def __repr__(self) -> str:
        padding = self.num_tokens - sum(self.lengths)
        return (
            f"PackedBatch({self.num_documents} documents, {self.num_tokens} tokens ({padding} padding), {self.num_items} scored, "
            f"longest {self.max_seqlen}, on {self.device})"
        )

    def _map(self, f) -> PackedBatch:
        moved: dict[str, Any] = {
            field.name: f(value) for field in dataclasses.fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, columns={name: f(column) for name, column in self.columns.items()}, **moved)


def _one_row(values: Tensor, name: str) -> Tensor:
    if values.dim() == 1:
        return values
    if values.dim() == 2 and values.shape[0] == 1:
        return values[0]
    raise ValueError(f"{name} must be one packed row, (T,) or (1, T), got {tuple(values.shape)}")
