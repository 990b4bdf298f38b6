"""Documents -> :class:`packops.PackedBatch`: the ``collate_fn`` of a packed ``DataLoader``."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, overload

import numpy as np
import torch

from ..ops.attention_paths import max_docs_for_flash_attention
from .batch import PackedBatch, check_reduction, checked_columns, column_dtype
from .counts import as_array, as_count, as_integers
from .documents import tokens_of, without_padding
from .forest import PackedForest
from .prefixes import MIN_SHARED, prefix_forest

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PackingCollator", "max_docs_for_flash_attention"]

# So many documents in one row are worth a warning, whatever the model.
MANY_DOCUMENTS = 1024

# Columns that say which tokens of a document are scored (TRL's names).
SCORED_MASKS = ("completion_mask", "assistant_masks")

# What processors make of images and videos, and of sound. Their tokens have positions that only the model can tell (M-RoPE).
IMAGES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
OTHER_THAN_TEXT = (*IMAGES, "input_features")

# What tells of the documents in a packed row, and how many numbers it has for a single one.
SEVERAL = {"seq_lengths": 1, "cu_seqlens": 2, "cu_seq_lens_q": 2}

Batch = TypeVar("Batch")  # what ``names`` asks for: a PackedBatch or a dictionary


class CollatorOptions(TypedDict, total=False):
    """The arguments of :class:`PackingCollator`, for its overloads: ``names`` alone decides what it returns."""

    pad_token_id: int
    ignore_index: int
    pad_to_multiple_of: int | None
    pad_to_length: int | None
    pad_doc_to_multiple_of: int
    num_documents: int | None
    shift_labels: bool
    columns: Mapping[str, float] | None
    attention_shape: tuple[int, int] | None
    share_prefixes: bool
    min_shared: int
    reduction: str


class PackingCollator(Generic[Batch]):
    """Concatenates documents into one :class:`packops.PackedBatch`.

    A document is a sequence of token ids, or a mapping with ``input_ids`` and, optionally, ``labels`` (its ids, ``ignore_index``
    where not scored), ``completion_mask`` or ``assistant_masks`` (true where scored), ``attention_mask`` (0 for padding before or
    after the document, which is cut off, 1 elsewhere), and the columns asked for. Without labels
    and masks every token is scored but a document's first. Positions begin at 0, whatever ``position_ids`` it has. Text only: a
    document that holds images or sound is refused. No document at all is legal and gives a row of nothing but padding, which
    costs a rank that has run out of documents a step without a gradient. A document without tokens is left out of a
    :class:`packops.PackedBatch`, also of its ``lengths`` and of what it unpacks to.

    Args:
        pad_token_id: fills the padding.
        ignore_index: label of a token that is not scored.
        pad_to_multiple_of: the row's length is rounded up to this, its padding one trailing document.
        pad_to_length: the row has exactly this length, for static shapes.
        pad_doc_to_multiple_of: every document is padded to a multiple of this, inside its own boundaries (context parallelism).
            So is the row, whose padding is a document too: this must divide ``pad_to_length``.
        num_documents: ``cu_seqlens`` always has this many documents, padding included, the last ones empty: static shapes again.
        shift_labels: also make ``shift_labels``.
        columns: further per-token columns to pack, with the value that pads each: ``{"token_weight": 0.0}``. Floats are packed
            as float32, integers and bool as they are unless only a wider type holds the padding too.
        names: ``"packops"`` gives a :class:`packops.PackedBatch`, ``"hf"`` the keyword arguments of a Hugging Face model
            (:meth:`packops.PackedBatch.to_hf`).
        attention_shape: (num_heads, head_dim) of the model, if it uses FlashAttention-2: a row of so many documents that its
            backward would overflow raises instead.
        share_prefixes: a prefix that several documents begin with stands once: the batch is a :class:`packops.PackedForest`.
        min_shared: with it, prefixes of fewer tokens than this are repeated.
        reduction: with it, which mean over tokens or documents the batch's weights make: ``"mean"``, ``"seq-mean-token-mean"``
            or ``"seq-mean-token-sum"``, as in :func:`packops.cross_entropy`.
    """

    @overload
    def __init__(
        self: PackingCollator[PackedBatch], *, names: Literal["packops"] = "packops", **options: Unpack[CollatorOptions]
    ) -> None: ...
    @overload
    def __init__(self: PackingCollator[dict[str, Any]], *, names: Literal["hf"], **options: Unpack[CollatorOptions]) -> None: ...
    def __init__(
        self,
        *,
        pad_token_id: int = 0,
        ignore_index: int = -100,
        pad_to_multiple_of: int | None = None,
        pad_to_length: int | None = None,
        pad_doc_to_multiple_of: int = 1,
        num_documents: int | None = None,
        shift_labels: bool = False,
        columns: Mapping[str, float] | None = None,
        names: Literal["packops", "hf"] = "packops",
        attention_shape: tuple[int, int] | None = None,
        share_prefixes: bool = False,
        min_shared: int = MIN_SHARED,
        reduction: str = "mean",
    ):
        if names not in ("packops", "hf"):
            raise ValueError(f"names must be 'packops' or 'hf', got {names!r}")
        if pad_token_id is None:
            raise TypeError("pad_token_id must be an integer, got None: where a tokenizer has none, any of its ids will do")
        self.pad_token_id = as_count("pad_token_id", pad_token_id, least=-(2**63))
        self.ignore_index = as_count("ignore_index", ignore_index, least=-(2**63))
        self.pad_to_multiple_of = as_count("pad_to_multiple_of", pad_to_multiple_of, optional=True)
        self.pad_to_length = as_count("pad_to_length", pad_to_length, optional=True)
        self.pad_doc_to_multiple_of = as_count("pad_doc_to_multiple_of", pad_doc_to_multiple_of)
        if (self.pad_to_length or 0) % self.pad_doc_to_multiple_of:  # the row's padding is a document, too
            raise ValueError(f"pad_doc_to_multiple_of must divide pad_to_length = {pad_to_length}, got {pad_doc_to_multiple_of}")
        self.num_documents = as_count("num_documents", num_documents, optional=True)
        self.shift_labels = shift_labels
        self.columns = dict(checked_columns(columns))
        for name, fill in self.columns.items():
            column_dtype(name, [], fill)  # what cannot pad is an error here, not in the training loop
        self.names = names
        self.attention_shape = None if attention_shape is None else _checked_shape(attention_shape)
        self.share_prefixes = share_prefixes
        self.min_shared = as_count("min_shared", min_shared)
        self.reduction = reduction
        if share_prefixes and pad_doc_to_multiple_of != 1:
            raise ValueError("share_prefixes packs documents without padding inside: pad_doc_to_multiple_of must be 1")
        check_reduction(reduction)
        if not share_prefixes and reduction != "mean":
            raise ValueError("reduction is for share_prefixes, where the batch holds the weights; else the loss takes it")

    def __call__(self, documents: Sequence[Any]) -> Batch:
        if isinstance(documents, Mapping):
            raise TypeError(
                "documents must be a list of documents, got a mapping of columns: [dict(zip(batch, row)) for row in "
                "zip(*batch.values())] makes a list of a batch, [document] of one document"
            )
        documents = [_real_part(document, number) for number, document in enumerate(documents)]
        tokens = [
            as_integers(f"input_ids of document {number}", tokens_of(document)) for number, document in enumerate(documents)
        ]
        numbered = list(zip(documents, tokens, range(len(tokens)), strict=True))
        labels = [self._labels(*entry) for entry in numbered]
        if self.share_prefixes:
            forest = self._share(tokens, labels, numbered)
            return forest.to_hf() if self.names == "hf" else forest  # type: ignore[return-value]
        lengths = [len(ids) for ids in tokens if len(ids)]
        multiple = self.pad_doc_to_multiple_of
        padded = [-(-len(ids) // multiple) * multiple for ids in tokens]
        boundaries = [0, *itertools.accumulate(size for size in padded if size)]
        total = self._total(boundaries[-1])
        self._check_attention(len(lengths) + (total > boundaries[-1]), total)

        def packed(parts, fill, dtype):
            row = np.full(total, fill, dtype)
            begin = 0
            for part, size in zip(parts, padded, strict=True):
                row[begin : begin + len(part)] = part
                begin += size
            return torch.from_numpy(row)

        columns = {}
        for name, fill in self.columns.items():
            parts = [self._column(name, *entry) for entry in numbered]
            columns[name] = packed(parts, fill, column_dtype(name, parts, fill))
        batch = PackedBatch.build(
            packed(tokens, self.pad_token_id, np.int64),
            packed(labels, self.ignore_index, np.int64),
            boundaries if boundaries[-1] == total else [*boundaries, total],
            lengths=lengths,
            capacity=self.num_documents,
            shift_labels=self.shift_labels,
            columns=columns,
            ignore_index=self.ignore_index,
        )
        return batch.to_hf() if self.names == "hf" else batch  # type: ignore[return-value]

    def _share(self, tokens: list[np.ndarray], labels: list[np.ndarray], numbered: list[Any]) -> PackedForest:
        forest = prefix_forest(tokens, min_shared=self.min_shared)
        return PackedForest.from_documents(
            tokens,
            labels=labels,
            columns={name: [self._column(name, *entry) for entry in numbered] for name in self.columns},
            fills=self.columns,
            forest=forest,
            reduction=self.reduction,
            pad_token_id=self.pad_token_id,
            length=self._total(forest.num_tokens),
            capacity=self.num_documents,
            ignore_index=self.ignore_index,
        )

    def _labels(self, document: Any, ids: np.ndarray, number: int) -> np.ndarray:
        labels = ids
        if isinstance(document, Mapping):
            if document.get("labels") is not None:
                labels = as_integers(f"labels of document {number}", document["labels"])
                labels = _same_length(labels, "labels", ids, number)
            for name in SCORED_MASKS:
                if document.get(name) is not None:
                    mask = as_array(f"{name} of document {number}", document[name])
                    scored = _scored(_same_length(mask, name, ids, number), name, number)
                    labels = np.where(scored, labels, self.ignore_index)
        return labels

    def _column(self, name: str, document: Any, ids: np.ndarray, number: int) -> np.ndarray:
        if not isinstance(document, Mapping) or name not in document:
            raise KeyError(f"document {number} has no column {name!r}")
        values = document[name]
        if isinstance(values, torch.Tensor):  # numpy has no bfloat16, and takes nothing that has a gradient
            values = values.detach().float() if values.dtype == torch.bfloat16 else values.detach()
        return _same_length(as_array(f"{name} of document {number}", values), name, ids, number)

    def _total(self, tokens: int) -> int:
        if self.pad_to_length is not None:
            if tokens > self.pad_to_length:
                raise ValueError(f"the documents have {tokens} tokens, more than pad_to_length = {self.pad_to_length}")
            return self.pad_to_length
        multiple = math.lcm(self.pad_to_multiple_of or 1, self.pad_doc_to_multiple_of)
        return max(1, -(-tokens // multiple)) * multiple

    def _check_attention(self, documents: int, total: int) -> None:
        num_heads, head_dim = self.attention_shape or (64, 128)
        most = max_docs_for_flash_attention(total, num_heads, head_dim)
        if documents <= most:
            return
        message = (
            f"a packed row of {documents} documents and {total} tokens overflows FlashAttention-2's backward in a model with "
            f"{num_heads} heads of {head_dim}: at most {most} documents; pack with max_docs_per_pack={most}"
        )
        if self.attention_shape:
            raise ValueError(message)
        if documents >= MANY_DOCUMENTS:
            warnings.warn(message + ", or name your model's attention_shape=(num_heads, head_dim)", stacklevel=3)


def _real_part(document: Any, number: int) -> Any:
    if isinstance(document, Mapping):
        _check_text(document, number)
        document = without_padding(document, f"document {number}")
        _check_one(document, number)
    return document


def _check_text(document: Mapping[str, Any], number: int) -> None:
    other = [name for name in OTHER_THAN_TEXT if document.get(name) is not None]
    if other:
        raise ValueError(
            f"document {number} holds {', '.join(other)}: PackingCollator packs text and gives tokens the positions of text. "
            "Collate images yourself, with the positions of the model's get_rope_index"
        )


def _check_one(document: Mapping[str, Any], number: int) -> None:
    why = ""
    for name, most in SEVERAL.items():
        if (values := document.get(name)) is not None and as_array(name, values).size > most:
            why = f"{name} are of several documents"
    positions = document.get("position_ids")
    if positions is not None and np.ndim(positions) == 1 and (np.diff(as_integers("position_ids", positions)) != 1).any():
        why = "position_ids do not go up by one"
    if why:
        raise ValueError(
            f"document {number} is a packed row: its {why}. Hand over its documents one by one, or the row to "
            "PackedBatch.from_position_ids or from_cu_seqlens"
        )


def _checked_shape(shape: Any) -> tuple[int, int]:
    try:
        heads, features = shape
    except (TypeError, ValueError):
        raise TypeError(f"attention_shape must be (num_heads, head_dim), got {shape!r}") from None
    return as_count("num_heads of attention_shape", heads), as_count("head_dim of attention_shape", features)


def _scored(mask: np.ndarray, name: str, number: int) -> np.ndarray:
    if mask.size and (mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} of document {number} must be 1 for tokens that are scored and 0 for others, got {mask}")
    return mask.astype(bool)


def _same_length(values: np.ndarray, name: str, ids: np.ndarray, number: int) -> np.ndarray:
    if values.shape != ids.shape:
        raise ValueError(f"{name} of document {number} must have one entry per token ({len(ids)}), got shape {values.shape}")
    return values
