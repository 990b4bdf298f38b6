"""The documents of a packed row, and what torch's ways to attend within documents want to know of them, found out once."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .metadata import packed_metadata

# Documents of one group are at least this share of its longest: what is computed for nothing stays below a third.
GROUP_SHARE = 0.75
FLEX_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of T flattened tokens, and what attention_paths.py derives from them, once.

    Attributes:
        cu_seqlens: (documents + 1,) int32, on the tokens' device, ends at T.
        max_seqlen: length of the longest; an upper bound is right too.
        total: T.
        parents: (documents,) where documents share prefixes, what each segment of ``cu_seqlens`` continues, or -1.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    total: int
    parents: Tensor | None = None
    _block_masks: dict[int | None, Any] = field(default_factory=dict)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Of the documents that are not empty, in order. Waits for the device."""
        bounds = self.cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != self.total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"packops.attention: cu_seqlens must rise from 0 to the {self.total} tokens of the batch, got {some(bounds)}"
            )
        return [b - a for a, b in itertools.pairwise(bounds) if b > a]

    @functools.cached_property
    def paths(self) -> list[list[slice]]:
        """Of each segment that holds tokens, its path: the tokens of the segments from a root to itself. Waits for the device."""
        bounds, paths = self.cu_seqlens.tolist(), list[list[slice]]()
        parents = [] if self.parents is None else self.parents.tolist()
        for segment, parent in enumerate(parents):
            before = paths[parent] if parent >= 0 else []
            paths.append([*before, slice(bounds[segment], bounds[segment + 1])])
        return [path for path in paths if path[-1].stop > path[-1].start]

    @functools.cached_property
    def pairs(self) -> int:
        """Of a token and one that it sees on its path. Waits for the device."""
        count = 0
        for *before, own in self.paths:
            length = own.stop - own.start
            count += length * sum(x.stop - x.start for x in before) + length * (length + 1) // 2
        return count

    @functools.cached_property
    def starts(self) -> Tensor:
        """(T,) int64, where each token's document begins. Does not wait."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - packed_metadata(self.cu_seqlens, self.total)[0]

    @functools.cached_property
    def groups(self) -> tuple[list[tuple[Tensor, int]], Tensor]:
        """Documents of about equal length together: for each group the tokens of its (documents, longest) grid, row by row, and
        how many documents; and (T,) where each token is in all grids one after the other."""
        lengths = torch.tensor(self.lengths)
        begins = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True, stable=True)
        grids, place, at = [], torch.empty(self.total, dtype=torch.int64), 0
        for group in _split_sorted(lengths[order].tolist()):
            chosen = order[group]
            longest = int(lengths[chosen[0]])
            column = torch.arange(longest)
            rows = begins[chosen, None] + column.clamp(max=lengths[chosen, None] - 1)
            real = column < lengths[chosen, None]
            place[rows[real]] = at + torch.arange(rows.numel()).view_as(rows)[real]
            grids.append((rows.flatten().to(self.cu_seqlens.device), len(chosen)))
            at += rows.numel()
        return grids, place.to(self.cu_seqlens.device)

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask of causal attention within documents, made block by block and without a host sync.

        The visible tokens of a query reach from ``first`` = its document's start, or where its window begins, to itself, and
        ``first`` never falls from a token to the next. So a block of queries needs the key blocks from the ``first`` of its first
        token on, and those from the ``first`` of its last token on, its own excepted, whole.
        """
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import BlockMask

            device, size = self.cu_seqlens.device, FLEX_BLOCK
            token = torch.arange(self.total, device=device)
            first = self.starts if window is None else torch.maximum(self.starts, token - window + 1)
            block = torch.arange(-(-self.total // size), device=device)
            last_token = (block * size + size - 1).clamp(max=self.total - 1)
            query, key = block[:, None], block[None, :]
            needed = (key <= query) & (key >= first[block * size, None] // size)
            whole = (key < query) & (key * size >= first[last_token, None])

            def visible(batch, head, query, key):
                return (key <= query) & (key >= first[query])

            def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
                indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
                return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None]

            self._block_masks[window] = BlockMask.from_kv_blocks(
                *listed(needed & ~whole), *listed(whole), BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(self.total, self.total)
            )
        return self._block_masks[window]


def _split_sorted(lengths: list[int]) -> Iterator[slice]:
    """Falling lengths cut into groups whose shortest is at least ``GROUP_SHARE`` of their longest, up to a few tokens."""
    begin = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] + 8 < GROUP_SHARE * lengths[begin]:
            yield slice(begin, i)
            begin = i


# What a forward's first layer finds out, its other layers look up: by the tensor that says it and its version.
_found: Any = WeakTensorKeyDictionary()
_found_lock = threading.Lock()


def look_up(key: Tensor, find: Callable[[], Documents], *more: Any) -> Documents:
    if torch.compiler.is_compiling() or key.is_inference():  # tensors of inference mode do not count their versions
        return find()
    state = (key._version, *more)
    with _found_lock:
        known = _found.get(key)
    if known is None or known[0] != state:
        known = (state, find())
        with _found_lock:
            _found[key] = known
    return cast(Documents, known[1])


def some(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
