"""Documents that begin with the same tokens -> the segments of a row in which every shared prefix stands once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .. import _C
from .counts import as_count, as_integers
from .packing import IntArray

__all__ = ["MIN_SHARED", "PrefixForest", "prefix_forest", "shared_prefixes"]

MIN_SHARED = 64  # a shorter prefix is not worth a segment of its own


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixForest:
    """Segments in depth-first order: a parent before its children, every subtree contiguous.

    A document is the path from a root to the segment at which it ends. Where a prefix branches, its last token stays out of the
    parent and begins every child, because it has a next token, hence a label, for each branch.

    Attributes:
        document, start, length: (segments,) int64. Segment s holds ``length[s]`` tokens of ``document[s]`` from position
            ``start[s]`` on.
        parents: (segments,) int64, the segment that a segment continues, -1 for a root.
        last: (documents,) int64, the segment at which a document ends, -1 for an empty document.
    """

    document: IntArray
    start: IntArray
    length: IntArray
    parents: IntArray
    last: IntArray

    @property
    def num_tokens(self) -> int:
        """Tokens of the row: what the documents have, less what they share."""
        return int(self.length.sum())

    def path(self, document: int) -> list[int]:
        """The segments of one document, the root first."""
        segments = []
        segment = int(self.last[document])
        while segment >= 0:
            segments.append(segment)
            segment = int(self.parents[segment])
        return segments[::-1]


def prefix_forest(documents: Sequence[ArrayLike], *, min_shared: int = MIN_SHARED) -> PrefixForest:
    """The forest of documents that share prefixes. Equal documents share all of their tokens.

    Args:
        documents: token ids, one sequence of integers a document; empty ones are legal.
        min_shared: prefixes of fewer tokens than this are repeated instead of shared.

    Raises:
        TypeError: a document is not a sequence of integers.
        ValueError: ``min_shared`` is not positive.
    """
    arrays = [as_integers(f"document {number}", document) for number, document in enumerate(documents)]
    offsets = np.array([0, *itertools.accumulate(len(array) for array in arrays)], np.int64)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    return PrefixForest(*_C.prefix_forest(tokens, offsets, as_count("min_shared", min_shared)))


def shared_prefixes(documents: Sequence[ArrayLike], groups: ArrayLike | None = None, *, min_shared: int = MIN_SHARED) -> IntArray:
    """(documents,) int64: how many tokens each document need not repeat after the document before it in its group.

    The argument ``shared`` of :func:`packops.pack`. It is exact where the documents of a group stand in lexicographic order or
    have one prefix in common, as the responses to one prompt have; in any other order it promises less than is shared.

    Args:
        documents: token ids, one sequence of integers a document.
        groups: (documents,) integers: documents of one number may share prefixes. None: all may.
        min_shared: as :func:`prefix_forest` takes it.
    """
    min_shared = as_count("min_shared", min_shared)
    arrays = [as_integers(f"document {number}", document) for number, document in enumerate(documents)]
    numbers = np.zeros(len(arrays), np.int64) if groups is None else as_integers("groups", groups)
    if numbers.shape != (len(arrays),):
        raise ValueError(f"groups must have one number per document ({len(arrays)}), got shape {numbers.shape}")
    shared = np.zeros(len(arrays), np.int64)
    before: dict[int, np.ndarray] = {}
    for i, (array, group) in enumerate(zip(arrays, numbers.tolist(), strict=True)):
        if group in before:
            shared[i] = _shared(before[group], array, min_shared)
        before[group] = array
    return shared


def _shared(before: np.ndarray, document: np.ndarray, min_shared: int) -> int:
    both = min(len(before), len(document))
    different = before[:both] != document[:both]
    common = int(different.argmax()) if different.any() else both
    if common == len(before) == len(document):
        return common
    return common - 1 if common - 1 >= min_shared else 0  # the last token of a shared prefix begins every branch
