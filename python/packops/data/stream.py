"""Packing documents that arrive one by one: :class:`StreamPacker`."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from .counts import as_count, as_integer
from .documents import length_of, slice_document
from .packing import OVERLONG, Overlong

__all__ = ["StreamPacker"]

Document = TypeVar("Document")


class StreamPacker(Generic[Document]):
    """Best fit over a bounded number of open packs: for iterable data, whose lengths nobody knows in advance.

    Each document goes into the open pack with the least free space that still holds it, or into a new one; a pack leaves when it
    is full or, when ``open_packs`` others are open, when it is the oldest. So memory stays below
    ``open_packs * max_length`` tokens and no document waits for more than ``open_packs`` packs.

        packer = StreamPacker(4096)
        for documents in packer.pack(stream):
            batch = collator(documents)

    To resume, keep ``packer.state_dict()``, load it into a packer of the same settings, and continue the stream after its first
    ``packer.num_documents`` documents.

    Args:
        max_length: capacity of a pack in tokens.
        open_packs: how many packs wait for more documents.
        max_docs_per_pack, overlong, pad_doc_to_multiple_of: as :func:`packops.pack`.
        length: tokens in a document; by default its ``input_ids``' length, or its own.
        cut: ``cut(document, start, length)``, for ``overlong`` "truncate" and "split".
    """

    def __init__(
        self,
        max_length: int,
        *,
        open_packs: int = 256,
        max_docs_per_pack: int | None = None,
        overlong: Overlong = "error",
        pad_doc_to_multiple_of: int = 1,
        length: Callable[[Document], int] = length_of,
        cut: Callable[[Document, int, int], Document] = slice_document,
    ):
        self.max_length = max_length = as_count("max_length", max_length)
        self.open_packs = as_count("open_packs", open_packs)
        self.max_docs_per_pack = as_count("max_docs_per_pack", max_docs_per_pack, optional=True)
        self.pad_doc_to_multiple_of = as_integer("pad_doc_to_multiple_of", pad_doc_to_multiple_of)
        if pad_doc_to_multiple_of < 1 or max_length % pad_doc_to_multiple_of:
            raise ValueError(f"pad_doc_to_multiple_of must divide max_length = {max_length}, got {pad_doc_to_multiple_of}")
        if overlong not in OVERLONG:
            raise ValueError(f"overlong must be one of {', '.join(map(repr, OVERLONG))}, got {overlong!r}")
        self.overlong = overlong
        self._length, self._cut = length, cut
        self._open: dict[int, list[Document]] = {}  # by age: number of the pack -> its documents
        self._free: list[tuple[int, int]] = []  # (free space, number of the pack), ascending
        self._space: dict[int, int] = {}  # number of the pack -> free space
        self._ready: deque[list[Document]] = deque()
        self._next_number = 0
        self.num_documents = 0  # taken from the stream
        self.num_empty = 0
        self.num_overlong = 0

    def pack(self, documents: Iterable[Document]) -> Iterator[list[Document]]:
        """Packs, as lists of documents; at the end of the stream also those that are not full."""
        for document in documents:
            self.add(document)
            yield from self._take_ready()
        self.flush()
        yield from self._take_ready()

    def add(self, document: Document) -> None:
        """Place one document."""
        length = as_integer(f"the length of document {self.num_documents}", self._length(document))
        if length < 0:
            raise ValueError(f"document {self.num_documents} has a negative length, {length}")
        if length > self.max_length and self.overlong == "error":
            raise ValueError(
                f"document {self.num_documents} has {length} tokens, more than max_length = {self.max_length}; "
                'overlong="truncate", "split" or "drop" accepts it'
            )
        self.num_documents += 1
        self.num_empty += length == 0
        if length > self.max_length:
            self.num_overlong += 1
            end = {"truncate": self.max_length, "split": length, "drop": 0}[self.overlong]
            for start in range(0, end, self.max_length):
                part = min(self.max_length, end - start)
                self._place(self._cut(document, start, part), part)
        elif length:
            self._place(document, length)

    def flush(self) -> None:
        """Close every open pack, oldest first."""
        for number in list(self._open):
            self._close(number)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the documents that are in no finished pack yet; as picklable as the documents."""
        return {
            "open": [(self._space[number], list(pack)) for number, pack in self._open.items()],
            "ready": [list(pack) for pack in self._ready],
            "num_documents": self.num_documents,
            "num_empty": self.num_empty,
            "num_overlong": self.num_overlong,
            **self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the state is of a packer with other settings, or none. The packer stays as it was.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"not the state of a StreamPacker: {state!r}")
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"not the state of a StreamPacker: it has no {missing[0]!r}")
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(f"the state is of a packer with {name} = {state[name]!r}, this one has {own!r}")
        opened = {number: list(pack) for number, (_, pack) in enumerate(state["open"])}
        space = {number: free for number, (free, _) in enumerate(state["open"])}
        for number, pack in opened.items():
            taken = sum(self._size(self._length(document)) for document in pack)
            if taken + space[number] != self.max_length:
                raise ValueError(
                    f"the state says that documents take {self.max_length - space[number]} tokens, they take {taken}"
                )
        self._open, self._space = opened, space
        self._free = sorted((free, number) for number, free in space.items())
        self._ready = deque(list(pack) for pack in state["ready"])
        self._next_number = len(opened)
        self.num_documents, self.num_empty, self.num_overlong = (
            state[key] for key in ("num_documents", "num_empty", "num_overlong")
        )

    def _settings(self) -> dict[str, Any]:
        names = ("max_length", "open_packs", "max_docs_per_pack", "overlong", "pad_doc_to_multiple_of")
        return {name: getattr(self, name) for name in names}

    def _size(self, length: int) -> int:
        return -(-length // self.pad_doc_to_multiple_of) * self.pad_doc_to_multiple_of

    def _place(self, document: Document, length: int) -> None:
        size = self._size(length)
        slot = bisect.bisect_left(self._free, (size, -1))
        if slot < len(self._free):
            free, number = self._free.pop(slot)
        else:
            free, number = self.max_length, self._next_number
            self._next_number += 1
            self._open[number] = []
        self._open[number].append(document)
        self._space[number] = free - size
        bisect.insort(self._free, (free - size, number))
        if free == size or len(self._open[number]) == self.max_docs_per_pack:
            self._close(number)
        elif len(self._open) > self.open_packs:
            self._close(next(iter(self._open)))

    def _close(self, number: int) -> None:
        entry = (self._space.pop(number), number)
        del self._free[bisect.bisect_left(self._free, entry)]
        self._ready.append(self._open.pop(number))

    def _take_ready(self) -> Iterator[list[Document]]:
        while self._ready:
            yield self._ready.popleft()
