"""Lengths of documents -> packs: :func:`pack` and its :class:`PackingPlan`.

Numpy only: nothing here needs a tensor, and the packers themselves are C++ (``csrc/packing.cpp``).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _C
from .counts import as_array, as_count, as_integer, as_integers, counted

__all__ = ["STRATEGIES", "DocumentSlice", "PackingPlan", "pack"]

Strategy = Literal["best_fit", "bfd", "ffd", "next_fit", "sequential", "wrapped"]
Overlong = Literal["error", "truncate", "split", "drop"]
IntArray = NDArray[np.int64]

STRATEGIES: tuple[str, ...] = get_args(Strategy)
OVERLONG: tuple[str, ...] = get_args(Overlong)


class DocumentSlice(NamedTuple):
    """Tokens ``[start, start + length)`` of document number ``document``."""

    document: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackingPlan:
    """Which documents share a pack. Pack ``p`` holds the pieces ``indices[offsets[p]:offsets[p + 1]]``, in that order.

    A piece is a whole document unless the plan cut documents (``is_cut``): then ``starts`` and ``lengths`` say which part.

    Attributes:
        indices: (pieces,) int64, the document of each piece.
        offsets: (packs + 1,) int64, from 0 upwards.
        starts: (pieces,) int64, where in its document a piece begins.
        lengths: (pieces,) int64, how many tokens of its document it holds.
        max_length: capacity of a pack in tokens.
        strategy: how it was packed.
        num_documents: documents asked for, those in no pack included.
        num_empty: documents of no token; they are in no pack.
        num_overlong: documents longer than ``max_length`` that were truncated, split or dropped.
        dropped_tokens: tokens in no pack, cut off or of dropped documents.
        pad_doc_to_multiple_of: a piece takes its length rounded up to this in its pack.
        shared: (pieces,) int64, tokens of a piece that its pack holds already, as a prefix of the document before it; None
            without ``groups``.
    """

    indices: IntArray
    offsets: IntArray
    starts: IntArray
    lengths: IntArray
    max_length: int
    strategy: str
    is_cut: bool
    num_documents: int
    num_empty: int = 0
    num_overlong: int = 0
    dropped_tokens: int = 0
    pad_doc_to_multiple_of: int = 1
    shared: IntArray | None = None

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return self.num_packs

    def __getitem__(self, pack: int) -> IntArray:
        """(pieces,) int64: the documents of one pack."""
        return self.indices[self._pieces(pack)]

    def __iter__(self) -> Iterator[IntArray]:
        return (self[pack] for pack in range(self.num_packs))

    def slices(self, pack: int) -> list[DocumentSlice]:
        """The pieces of one pack, as parts of documents."""
        pieces = self._pieces(pack)
        columns = (column[pieces].tolist() for column in (self.indices, self.starts, self.lengths))
        return [DocumentSlice(*piece) for piece in zip(*columns, strict=True)]

    def _pieces(self, pack: int) -> slice:
        pack = as_integer("pack", pack)
        if not -self.num_packs <= pack < self.num_packs:
            raise IndexError(f"pack {pack} of a plan with {self.num_packs} packs")
        pack %= self.num_packs
        return slice(self.offsets[pack], self.offsets[pack + 1])

    @cached_property
    def docs_per_pack(self) -> IntArray:
        """(packs,) int64: pieces in each pack."""
        return np.diff(self.offsets)

    @cached_property
    def padded_lengths(self) -> IntArray:
        """(pieces,) int64: the room each piece takes."""
        multiple = self.pad_doc_to_multiple_of
        return self.own_lengths if multiple == 1 else -(-self.lengths // multiple) * multiple

    @property
    def own_lengths(self) -> IntArray:
        """(pieces,) int64: tokens of each piece that its pack would not hold without it."""
        return self.lengths if self.shared is None else self.lengths - self.shared

    def per_pack(self, values: ArrayLike) -> NDArray[Any]:
        """(packs,) sums of one number per piece."""
        return np.add.reduceat(as_array("values", values), self.offsets[:-1]) if self.num_packs else np.zeros(0, np.int64)

    @cached_property
    def tokens_per_pack(self) -> IntArray:
        """(packs,) int64: tokens in each pack, without padding; shared prefixes count once."""
        return self.per_pack(self.own_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in all packs, without padding; shared prefixes count once."""
        return int(self.own_lengths.sum())

    @property
    def efficiency(self) -> float:
        """Useful tokens / (packs * max_length), between 0 and 1; 1 for a plan without packs."""
        return self.num_tokens / (self.num_packs * self.max_length) if self.num_packs else 1.0

    def hash(self) -> str:
        """128 bits in hexadecimal over every pack: equal on all ranks if and only if their plans are equal."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(f"{self.max_length} {self.pad_doc_to_multiple_of}".encode(), digest_size=16)
        for array in (self.indices, self.offsets, self.starts, self.lengths, *([] if self.shared is None else [self.shared])):
            digest.update(np.ascontiguousarray(array).astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def stats(self) -> dict[str, float | int | str]:
        """The plan in numbers, ready for JSON."""
        docs = self.docs_per_pack
        return {
            "strategy": self.strategy,
            "max_length": self.max_length,
            "num_documents": self.num_documents,
            "num_empty": self.num_empty,
            "num_overlong": self.num_overlong,
            "dropped_tokens": self.dropped_tokens,
            "num_packs": self.num_packs,
            "num_tokens": self.num_tokens,
            "efficiency": self.efficiency,
            "docs_per_pack_mean": float(docs.mean()) if self.num_packs else 0.0,
            "docs_per_pack_max": int(docs.max(initial=0)),
        }

    def __repr__(self) -> str:
        docs = self.docs_per_pack
        notes = [f"{self.num_empty:,} empty"] if self.num_empty else []
        if self.num_overlong:
            notes.append(f"{self.num_overlong:,} overlong, {counted(self.dropped_tokens, 'token')} dropped")
        return (
            f"PackingPlan({self.strategy}: {counted(self.num_documents, 'document')} -> {counted(self.num_packs, 'pack')} of "
            f"{counted(self.max_length, 'token')}, {100 * self.efficiency:.2f} % full, "
            f"{len(self.indices) / max(1, self.num_packs):.1f} documents a pack (at most {docs.max(initial=0):,})"
            + "".join(f"; {note}" for note in notes)
            + ")"
        )


def as_lengths(lengths: ArrayLike) -> IntArray:
    """A one-dimensional int64 array, or an error that says what came instead."""
    array = as_array("lengths (tokens per document)", lengths)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers (tokens per document), got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional (one number per document), got shape {array.shape}")
    return np.ascontiguousarray(as_integers("lengths", array))


def pack(
    lengths: ArrayLike,
    max_length: int,
    *,
    strategy: Strategy = "best_fit",
    seed: int | None = 0,
    epoch: int = 0,
    max_docs_per_pack: int | None = None,
    overlong: Overlong = "error",
    pad_doc_to_multiple_of: int = 1,
    groups: ArrayLike | None = None,
    shared: ArrayLike | None = None,
) -> PackingPlan:
    """Pack documents into as few packs of at most ``max_length`` tokens as the strategy manages.

    Every document with a token is in exactly one pack (under ``split`` and ``wrapped``, every token), whatever the lengths are.
    The plan is a function of the arguments alone, the same on every machine and rank.

    Args:
        lengths: (documents,) integers, tokens per document. Documents of length 0 are left out and counted.
        max_length: capacity of a pack in tokens, 1 to 2^31 - 1.
        strategy: how to pack.

            * ``"best_fit"``: documents in random order, each into the pack with the least free space that still holds it. As
              full as ``bfd`` to a fraction of a percent, while each pack stays a random mixture of documents.
            * ``"bfd"``, ``"ffd"``: best fit and first fit, longest document first (Johnson 1974). The fullest packs, but each
              holds documents of alike lengths, some of them very many short ones.
            * ``"next_fit"``: documents in random order, each into the last pack, or else into a new one.
            * ``"sequential"``: ``next_fit`` in the given order.
            * ``"wrapped"``: documents in random order, concatenated and cut every ``max_length`` tokens.

        seed, epoch: choose the random order; another epoch, another plan. Under ``bfd`` and ``ffd`` they order documents of
            equal length. ``seed=None`` keeps the given order. ``sequential`` uses neither.
        max_docs_per_pack: at most so many documents (or parts of one) a pack; None: any number.
        overlong: what becomes of a document longer than ``max_length``: ``"error"``; ``"truncate"`` keeps its first
            ``max_length`` tokens; ``"split"`` makes documents of ``max_length`` tokens and a rest; ``"drop"`` leaves it out.
            Under ``wrapped`` no document is overlong.
        pad_doc_to_multiple_of: in its pack a document takes its length rounded up to this, which divides ``max_length``
            (context parallelism wants ``2 * cp_size``). :class:`packops.PackingCollator` takes the same argument.
        groups: (documents,) integers. Documents of one number stay together, in their order, so that they can share prefixes:
            a prompt's responses, say. A group that is too long is cut between documents, into as few packs as hold it.
        shared: (documents,) integers, with ``groups``: how many tokens a document need not repeat after the document before it
            in its group (:func:`packops.shared_prefixes`); the first document of a pack repeats all. None: nothing is shared.

    Raises:
        ValueError: a negative length, an overlong document under ``overlong="error"`` (with its index and length), an argument
            out of range.
        TypeError: what must be an integer is none.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(map(repr, OVERLONG))}, got {overlong!r}")
    max_docs_per_pack = as_count("max_docs_per_pack", max_docs_per_pack, optional=True)
    seed = as_count("seed", seed, least=0, bits=64, optional=True)
    epoch = as_count("epoch", epoch, least=0, bits=64)
    max_length = as_count("max_length", max_length, bits=31)
    pad_doc_to_multiple_of = as_integer("pad_doc_to_multiple_of", pad_doc_to_multiple_of)
    if groups is not None or shared is not None:
        if groups is None:
            raise ValueError("shared needs groups: documents share prefixes within their group")
        if strategy == "wrapped" or overlong in ("truncate", "split") or pad_doc_to_multiple_of != 1:
            raise ValueError(
                "groups keep their documents whole and unpadded: strategy='wrapped', overlong='truncate' or 'split' and "
                "pad_doc_to_multiple_of do not go with them"
            )
        return _pack_groups(
            as_lengths(lengths),
            groups,
            shared,
            max_length,
            max_docs_per_pack,
            strategy=strategy,
            seed=seed,
            epoch=epoch,
            overlong=overlong,
        )
    array = as_lengths(lengths)
    indices, offsets, starts, piece_lengths, empty, overlong_count, dropped = _C.pack(
        array,
        max_length,
        strategy="next_fit" if strategy == "sequential" else strategy,
        seed=None if strategy == "sequential" else seed,
        epoch=epoch,
        max_docs=max_docs_per_pack or 0,
        overlong=overlong,
        multiple=pad_doc_to_multiple_of,
    )
    is_cut = len(starts) == len(indices) and len(indices) > 0
    return PackingPlan(
        indices=indices,
        offsets=offsets,
        starts=starts if is_cut else np.broadcast_to(np.int64(0), indices.shape),
        lengths=piece_lengths if is_cut else array[indices],
        max_length=max_length,
        strategy=strategy,
        is_cut=is_cut,
        num_documents=len(array),
        num_empty=empty,
        num_overlong=overlong_count,
        dropped_tokens=dropped,
        pad_doc_to_multiple_of=pad_doc_to_multiple_of,
    )


def _pack_groups(
    lengths: IntArray,
    groups: ArrayLike,
    shared: ArrayLike | None,
    max_length: int,
    max_docs: int | None,
    *,
    overlong: Overlong,
    **order: Any,
) -> PackingPlan:
    """Packs parts of groups, each as long as a pack allows, as if they were documents."""
    numbers = as_integers("groups", groups)
    common = np.zeros_like(lengths) if shared is None else as_integers("shared", shared)
    overlong_count = int((lengths > max_length).sum())
    if (lengths < 0).any():
        pack(lengths, max_length)  # raises, and names the document
    if overlong == "error" and overlong_count:
        bad = int((lengths > max_length).argmax())
        raise ValueError(f'lengths[{bad}] = {lengths[bad]} is longer than max_length = {max_length}; overlong="drop" accepts it')
    for name, array in (("groups", numbers), ("shared", common)):
        if array.shape != lengths.shape:
            raise ValueError(f"{name} must have one number per document ({len(lengths)}), got shape {array.shape}")
    if (outside := (common < 0) | (common > lengths)).any():
        bad = int(outside.argmax())
        raise ValueError(f"shared[{bad}] must be between 0 and lengths[{bad}] = {lengths[bad]}, got {common[bad]}")

    _, first, group_of = np.unique(numbers, return_index=True, return_inverse=True)
    documents = np.argsort(first[group_of], kind="stable")  # groups by their first document
    follows = group_of[documents][1:] == group_of[documents][:-1]
    too_much = follows & (common[documents][1:] > lengths[documents][:-1])
    if too_much.any():
        place = int(too_much.argmax())
        bad, before = int(documents[place + 1]), int(documents[place])
        raise ValueError(
            f"shared[{bad}] must be at most lengths[{before}] = {lengths[before]}, of the document before it in its group, "
            f"got {common[bad]}"
        )
    is_kept = (lengths > 0) & (lengths <= max_length)
    common = _shared_with_kept(common, documents, is_kept)
    documents = documents[is_kept[documents]]
    begins, sizes = _cut_groups(group_of[documents], lengths[documents], common[documents], max_length, max_docs)
    counts = np.diff([*begins, len(documents)])
    parts = pack(
        sizes,
        max_length,
        max_docs_per_pack=None if max_docs is None else max(1, max_docs // int(counts.max(initial=1))),
        **order,
    )
    part_lengths = counts[parts.indices]
    ends = np.cumsum(part_lengths)
    indices = documents[np.repeat(begins[parts.indices] - (ends - part_lengths), part_lengths) + np.arange(len(documents))]
    piece_shared = common[indices]
    piece_shared[ends - part_lengths] = 0
    return dataclasses.replace(
        parts,
        indices=indices,
        offsets=np.concatenate([np.zeros(1, np.int64), ends])[parts.offsets],
        starts=np.broadcast_to(np.int64(0), indices.shape),
        lengths=lengths[indices],
        num_documents=len(lengths),
        num_empty=int((lengths == 0).sum()),
        num_overlong=overlong_count,
        dropped_tokens=int(lengths[lengths > max_length].sum()),
        shared=piece_shared,
    )


def _shared_with_kept(shared: IntArray, documents: IntArray, is_kept: NDArray[np.bool_]) -> IntArray:
    """What each document that is kept shares with the last one before it that is: no more than any between share with theirs."""
    shared, least = shared.copy(), np.iinfo(np.int64).max
    for document in documents[np.flatnonzero(~is_kept[documents])[0] :] if not is_kept.all() else ():
        least = min(least, shared[document])
        if is_kept[document]:
            shared[document], least = least, np.iinfo(np.int64).max
    return shared


def _cut_groups(
    group_of: IntArray, lengths: IntArray, shared: IntArray, max_length: int, max_docs: int | None
) -> tuple[IntArray, IntArray]:
    """Where the parts of groups begin among documents that are sorted by group, and how many tokens each part has."""
    begins: list[int] = []
    sizes: list[int] = []
    group, room = -1, 0
    for i, (own_group, length, common) in enumerate(zip(group_of.tolist(), lengths.tolist(), shared.tolist(), strict=True)):
        if own_group != group or length - common > room or (max_docs is not None and i - begins[-1] == max_docs):
            group, room, common = own_group, max_length, 0
            begins.append(i)
            sizes.append(0)
        sizes[-1] += length - common
        room -= length - common
    return np.array(begins, np.int64), np.array(sizes, np.int64)
