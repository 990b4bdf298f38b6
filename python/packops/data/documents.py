"""Documents as data pipelines pass them: a sequence of token ids, or a mapping with ``input_ids`` and per-token columns.

Where a mapping has an ``attention_mask``, the tokens that it masks are padding and no part of the document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .counts import as_array
from .packing import DocumentSlice

__all__ = ["SlicedDataset", "document_begins", "length_of", "slice_document", "tokens_of", "without_padding"]

TOKENS = "input_ids"
PADDING_MASK = "attention_mask"


def tokens_of(document: Any) -> Any:
    """The document's token ids: itself, or its ``input_ids``."""
    if isinstance(document, Mapping):
        if TOKENS not in document:
            raise KeyError(f"a document must have {TOKENS!r}, found {sorted(map(str, document))}")
        return document[TOKENS]
    return document


def without_padding(document: Any, name: str = "a document") -> Any:
    """The document, and its every per-token column, without what its ``attention_mask`` says is padding."""
    mask = document.get(PADDING_MASK) if isinstance(document, Mapping) else None
    if mask is None:
        return document
    mask = as_array(f"{PADDING_MASK} of {name}", mask)
    total = len(tokens_of(document))
    if mask.shape != (total,):
        batch = ": documents are handed over one by one, without a dimension for a batch" if mask.ndim > 1 else ""
        raise ValueError(f"{PADDING_MASK} of {name} must have one entry per token ({total}), got shape {mask.shape}{batch}")
    if mask.size and mask.dtype.kind not in "biu":
        raise TypeError(f"{PADDING_MASK} of {name} must be bool or integers (0: padding, 1: a token), got {mask.dtype}")
    inside = np.flatnonzero(mask)
    begin, end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
    if not (mask[begin:end] == 1).all():
        raise ValueError(
            f"{PADDING_MASK} of {name} must be 1 for its tokens, which lie together, and 0 for padding; hand over the documents "
            "of a packed row one by one"
        )
    return document if end - begin == total else _part(document, begin, end - begin, total)


def length_of(document: Any, name: str = "a document") -> int:
    """Tokens in the document.

    Raises:
        TypeError: text, or more dimensions than one. Their ``len`` is a number of something else.
    """
    tokens = tokens_of(without_padding(document, name))
    count = len(tokens)
    if np.ndim(tokens[:1]) != 1:
        what = "text" if isinstance(tokens, (str, bytes)) else f"one of {np.ndim(tokens[:1])} dimensions"
        raise TypeError(f"{name} must be a sequence of token ids, got {what}")
    return count


def slice_document(document: Any, start: int, length: int) -> Any:
    """Tokens ``[start, start + length)`` of a document, and of its every per-token column."""
    document = without_padding(document)
    total = len(tokens_of(document))
    if start < 0 or length < 0 or start + length > total:
        raise ValueError(f"tokens [{start}, {start + length}) of a document of {total}: the lengths packed were not its lengths")
    if start == 0 and length == total:
        return document
    return _part(document, start, length, total)


def _part(document: Any, start: int, length: int, total: int) -> Any:
    if not isinstance(document, Mapping):
        return document[start : start + length]
    return {key: value[start : start + length] if _is_per_token(value, total) else value for key, value in document.items()}


def document_begins(position_ids: Tensor) -> Tensor:
    """(..., L) bool: where a document begins. That is at the start of each row, and wherever positions do not rise by one."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[..., 1:] = position_ids[..., 1:] != position_ids[..., :-1] + 1
    return begins


def _is_per_token(value: Any, total: int) -> bool:
    if isinstance(value, (list, tuple)):  # ragged ones, too, in which numpy sees no dimensions
        return len(value) == total
    return not isinstance(value, (str, bytes, Mapping)) and np.ndim(value) >= 1 and len(value) == total


class SlicedDataset:
    """A map-style dataset for plans that cut documents (``overlong="truncate"``, ``"split"``, strategy ``"wrapped"``).

    A sampler over such a plan asks for :class:`packops.DocumentSlice` instead of an index, and this answers with that part of
    ``dataset[document]``. Plain indices pass through.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | DocumentSlice) -> Any:
        if isinstance(key, DocumentSlice):
            return slice_document(self.dataset[key.document], key.start, key.length)
        return self.dataset[key]
