"""Which documents each rank trains on at each step: :class:`PackedBatchSampler`."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from .. import _C
from .counts import as_count, as_integer
from .packing import DocumentSlice, IntArray, Overlong, PackingPlan, Strategy, as_lengths, pack

__all__ = ["PackedBatchSampler"]

Balance = Literal["none", "tokens", "attention"]

# Steps whose packs are exchanged to even out the ranks: large enough to find packs of equal cost, small enough that a step's
# cost says little about when in the epoch it comes.
BALANCE_WINDOW = 64
MOST_PACKS = 1 << 24  # of a step, over all ranks: sharing out takes memory for each


class Spans(NamedTuple):
    """Packs as ranges of a plan's pieces: cutting a pack in two, or adding an empty one, moves no piece."""

    begin: IntArray
    end: IntArray

    def take(self, which: IntArray) -> Spans:
        return Spans(self.begin[which], self.end[which])


class Segment(NamedTuple):
    """Steps of an epoch that were taken with one number of ranks and packs per batch."""

    world_size: int
    packs_per_batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The packs of an epoch and how they are shared out: what earlier segments leave goes to the next one.

    Attributes:
        plan: the packs as :func:`packops.pack` made them.
        shares: for each earlier segment and, last, for the present settings: the packs as ranges of the plan's pieces, and
            (steps, ranks, packs_per_batch) which of them are taken where, -1 for none.
    """

    plan: PackingPlan
    shares: list[tuple[Spans, IntArray]]

    @property
    def spans(self) -> Spans:
        return self.shares[-1][0]

    @property
    def steps(self) -> IntArray:
        return self.shares[-1][1]

    @cached_property
    def _digests(self) -> list[str]:
        digest = hashlib.blake2b(self.plan.hash().encode(), digest_size=16)
        found = []
        for spans, steps in self.shares:
            digest.update(repr(steps.shape).encode())
            for array in (*spans, steps):
                digest.update(np.ascontiguousarray(array).astype("<i8", copy=False).tobytes())
            found.append(digest.hexdigest())
        return found

    def hash(self, segments: int) -> str:
        """Of the plan and of which packs the first ``segments`` take at which step."""
        return self._digests[segments - 1]


class PackedBatchSampler(torch.utils.data.Sampler[list[Any]]):
    """Batches of whole packs for ``DataLoader(dataset, batch_sampler=...)``, split over data-parallel ranks.

    Every rank computes the same plan from the same arguments, without communication, and takes its part: in one epoch every
    document goes to exactly one rank at exactly one step, and all ranks have the same number of steps. Where the packs do not
    divide evenly, a few are cut in two; if there are fewer documents than that takes, the last step of some ranks is an empty
    batch, which :class:`packops.PackingCollator` turns into a row of padding.

        sampler = PackedBatchSampler(lengths, 8192)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=PackingCollator(), num_workers=4)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for step, batch in enumerate(loader): ...

    A batch is a list of document numbers, or of :class:`packops.DocumentSlice` where the plan cuts documents; then wrap the
    dataset in :class:`packops.SlicedDataset`.

    Args:
        lengths, max_length, strategy, seed, max_docs_per_pack, overlong, pad_doc_to_multiple_of: as :func:`packops.pack`. The
            packs' order is random too, unless ``seed`` is None or the strategy ``"sequential"``: then it is kept, and nothing is
            balanced.
        packs_per_batch: packs a rank takes at each step; they become one row of up to ``packs_per_batch * max_length`` tokens. A
            step has at most 2^24 packs over all ranks.
        rank, world_size: this process and how many there are; by default those of ``torch.distributed``, or one process.
        all_ranks: yield the batches of all ranks in turn, those of a step one after the other, and leave it to the loader to take
            this rank's. For loaders that share out batches themselves: ``accelerate.prepare``, ``transformers.Trainer``.
        balance: which packs the ranks take at the same step, where the slowest holds up the others. ``"tokens"`` evens out the
            tokens, ``"attention"`` the cost ``a * tokens + b * sum of document length^2``, ``"none"`` nothing.
        cost: (a, b). The default is of a 7B transformer (24 h^2 / 4 h with h = 4096).
        drop_last: leave out the packs of an incomplete last step instead of sharing them out: documents are lost.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        max_length: int,
        *,
        packs_per_batch: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        all_ranks: bool = False,
        strategy: Strategy = "best_fit",
        seed: int | None = 0,
        balance: Balance = "attention",
        cost: tuple[float, float] = (24576.0, 1.0),
        drop_last: bool = False,
        max_docs_per_pack: int | None = None,
        overlong: Overlong = "error",
        pad_doc_to_multiple_of: int = 1,
    ):
        distributed = _is_distributed()
        # Whoever shares out batches may begin with those of one process.
        self._is_taken_for_one_process = world_size is None and rank is None and not (distributed or all_ranks)
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        self.world_size, self.rank = as_count("world_size", world_size), as_integer("rank", rank)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size = {self.world_size}), got {self.rank}")
        self.packs_per_batch = as_count("packs_per_batch", packs_per_batch)
        if self.world_size * self.packs_per_batch > MOST_PACKS:
            got = f"{self.world_size} * {self.packs_per_batch}"
            raise ValueError(f"world_size * packs_per_batch must be at most 2^24 packs a step, got {got}")
        if balance not in ("none", "tokens", "attention"):
            raise ValueError(f"balance must be 'none', 'tokens' or 'attention', got {balance!r}")
        for name, flag in (("all_ranks", all_ranks), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        self.all_ranks = all_ranks
        self.balance = balance
        self.cost = _checked_cost(cost)
        self.drop_last = drop_last
        self.seed = None if strategy == "sequential" else seed
        self.epoch = 0
        self._lengths = as_lengths(lengths).copy()  # the caller may go on to change theirs
        self._max_length = max_length
        self._options: dict[str, Any] = {
            "strategy": strategy,
            "seed": seed,
            "max_docs_per_pack": max_docs_per_pack,
            "overlong": overlong,
            "pad_doc_to_multiple_of": pad_doc_to_multiple_of,
        }
        self._past: list[Segment] = []  # of this epoch, under other settings
        self._start = 0  # steps of these settings done before this process began
        self._step = 0  # ... and handed out by now
        self._pass: object = None  # the iterator that says what is handed out
        self._is_over = False  # it has handed out everything; a loader's workers may still be training on it
        self._cached: tuple[Any, Epoch] | None = None
        _ = self.plan  # a bad argument is an error here, not in the training loop

    # ---- an epoch ------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> PackingPlan:
        """This epoch's packs, before they are shared out."""
        return self._prepare().plan

    def set_epoch(self, epoch: int) -> None:
        """Pack and order anew. Setting the current epoch changes nothing, so that a resumed epoch goes on where it stopped."""
        epoch = as_count("epoch", epoch, least=0, bits=64)
        if epoch != self.epoch:
            self._prepare(epoch, [])  # raises for an epoch that there is not
            self._begin(epoch, [], 0)

    def _begin(self, epoch: int, past: list[Segment], start: int) -> None:
        self.epoch, self._past, self._start, self._step = epoch, past, start, start
        self._pass, self._is_over = None, False

    @property
    def sampler(self) -> PackedBatchSampler:
        """Itself: where the loaders of accelerate look for something that has ``set_epoch``."""
        return self

    @property
    def batch_size(self) -> int:
        """There is none. Loaders that share out batches ask for it, and are told here that this sampler has done so already."""
        if self.world_size > 1 and not self.all_ranks:
            raise ValueError(
                "this PackedBatchSampler yields the batches of its own rank, and the loader is about to share them out over the "
                "ranks once more, which loses documents: use PackedBatchSampler(..., all_ranks=True) with accelerate.prepare and "
                "transformers.Trainer, or leave the loader unprepared"
            )
        raise AttributeError("batches of whole packs have no fixed size")

    def __len__(self) -> int:
        """Batches in this epoch, the same for every rank; other epochs have a few more or fewer, as their packs differ."""
        steps = self._steps_before() + len(self._prepare().steps)
        return steps * (self.world_size if self.all_ranks else 1)

    def _steps_before(self) -> int:
        return sum(segment.steps for segment in self._past)

    def __iter__(self) -> Iterator[list[Any]]:
        if self._is_taken_for_one_process and _is_distributed() and (ranks := torch.distributed.get_world_size()) > 1:
            warnings.warn(
                "this PackedBatchSampler was made before torch.distributed was initialised, for one process, and now there are "
                f"{ranks}: each of them trains on all documents, unless the loader shares out the batches. Make it afterwards, "
                "or pass rank= and world_size=",
                stacklevel=2,
            )
        if self._is_over:  # the pass after a whole one, or after the rest of a resumed one, is a whole one
            self._begin(self.epoch, [], 0)
        this_pass = self._pass = object()
        self._step = self._start
        epoch = self._prepare()
        for step in range(self._start, len(epoch.steps)):
            for packs in epoch.steps[step] if self.all_ranks else epoch.steps[step, self.rank, None]:
                if self._pass is this_pass:
                    self._step = step + 1
                yield self._documents(epoch.plan, epoch.spans.take(packs[packs >= 0]))
        if self._pass is this_pass:
            self._is_over = True

    def costs(self) -> np.ndarray:
        """(steps, world_size): ``a * tokens + b * sum of document length^2`` of each rank's batch, whatever is balanced.

        The slowest rank of a step holds up the others: ``costs.mean(1).sum() / costs.max(1).sum()`` is the share of time worked.
        """
        epoch = self._prepare()
        per_pack = np.append(self._span_costs(epoch.plan, epoch.spans, *self.cost), 0.0)  # -1, no pack, costs nothing
        return per_pack[epoch.steps].sum(2)

    # ---- resuming ------------------------------------------------------------------------------------------------------

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where in the epoch this is, the same on every rank.

        Args:
            step: steps of this epoch already trained on, counted from its beginning, those before a resume included. By default
                those handed out, which is more where a ``DataLoader`` with workers fetches ahead: what it has fetched would then
                not be trained on.

        Raises:
            ValueError: ``step`` is before the steps that this process resumed after, or past the epoch's last one.
        """
        epoch, before = self._prepare(), self._steps_before()
        current = self._step if step is None else as_integer("step", step) - before
        if not self._start <= current <= len(epoch.steps):
            raise ValueError(
                f"step must be between {before + self._start} and {before + len(epoch.steps)}, got {step}: it counts from the "
                "beginning of the epoch"
            )
        segments = [*self._past, Segment(self.world_size, self.packs_per_batch, current)]
        return {"epoch": self.epoch, "segments": [tuple(s) for s in segments], "plan": epoch.hash(len(segments))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, exactly once still, even on another number of ranks or packs per batch.

        A state of the end of an epoch resumes after its last step: what is left of that epoch is nothing.

        Raises:
            ValueError: the state belongs to other lengths, packing arguments or order (``balance``, ``cost``, ``seed``,
                ``drop_last``), or is none. The sampler stays as it was.
        """
        number, segments, plan = _parse_state(state)
        past, start = segments[:-1], segments[-1].steps
        if segments[-1][:2] != (self.world_size, self.packs_per_batch):
            past, start = segments, 0
        epoch = self._prepare(number, past)
        if epoch.hash(len(segments)) != plan:
            raise ValueError(
                "the state belongs to other lengths, packing arguments or order (balance, cost, seed, drop_last): "
                "its plan is not this sampler's"
            )
        for segment, (_, steps) in zip(segments, epoch.shares, strict=False):
            if segment.steps > len(steps):
                raise ValueError(f"the state is of step {segment.steps} where there are {len(steps)} steps")
        self._begin(number, past, start)

    # ---- sharing out ---------------------------------------------------------------------------------------------------

    def _prepare(self, number: int | None = None, past: Sequence[Segment] | None = None) -> Epoch:
        """An epoch after some segments; by default the present ones."""
        number, past = self.epoch if number is None else number, self._past if past is None else past
        key = (number, tuple(past), self.world_size, self.packs_per_batch)
        if self._cached is None or self._cached[0] != key:
            plan = pack(self._lengths, self._max_length, epoch=number, **self._options)
            spans = Spans(plan.offsets[:-1].copy(), plan.offsets[1:].copy())
            shares = []
            for segment in (*past, Segment(self.world_size, self.packs_per_batch, 0)):
                spans, steps = self._share_out(plan, number, spans, segment.world_size, segment.packs_per_batch)
                shares.append((spans, steps))
                left = steps[segment.steps :].ravel()
                spans = spans.take(left[left >= 0])
                spans = spans.take(np.flatnonzero(spans.end > spans.begin))
            self._cached = (key, Epoch(plan, shares))
        return self._cached[1]

    def _share_out(
        self, plan: PackingPlan, epoch: int, spans: Spans, world_size: int, packs_per_batch: int
    ) -> tuple[Spans, IntArray]:
        per_step = world_size * packs_per_batch
        if not self.drop_last:
            spans = _make_divisible(spans, np.concatenate([[0], np.cumsum(plan.padded_lengths)]), world_size)
        count = len(spans.begin)
        order = np.arange(count) if self.seed is None else _C.permutation(count, self.seed, epoch)
        full, rest = count // per_step, count % per_step
        if self.balance != "none" and self.seed is not None:
            cost = self._span_costs(plan, spans, *(self.cost if self.balance == "attention" else (1.0, 0.0)))
            order[: full * per_step] = self._even_out(order[: full * per_step], cost, per_step)
            tail = order[full * per_step :]
            order[full * per_step :] = tail[np.argsort(-cost[tail], kind="stable")]
        steps = _deal(order[: full * per_step].reshape(full, packs_per_batch, world_size))
        if rest and not self.drop_last:
            last = np.full((1, world_size, packs_per_batch), -1)
            last[:, :, : rest // world_size] = _deal(order[full * per_step :].reshape(1, rest // world_size, world_size))
            steps = np.concatenate([steps, last])
        return spans, steps

    def _even_out(self, order: IntArray, cost: np.ndarray, per_step: int) -> IntArray:
        """Within windows of steps, put packs of like cost into one step, the most costly first, and shuffle the steps."""
        result = order.copy()
        window = BALANCE_WINDOW * per_step
        for number, begin in enumerate(range(0, len(order), window)):
            packs = order[begin : begin + window]
            steps = packs[np.argsort(-cost[packs], kind="stable")].reshape(-1, per_step)
            steps = steps[_C.permutation(len(steps), self.seed, number)]
            result[begin : begin + window] = steps.ravel()
        return result

    @staticmethod
    def _span_costs(plan: PackingPlan, spans: Spans, a: float, b: float) -> np.ndarray:
        size = plan.padded_lengths.astype(np.float64)
        running = np.concatenate([[0.0], np.cumsum(a * size + b * size * size)])
        return running[spans.end] - running[spans.begin]

    @staticmethod
    def _documents(plan: PackingPlan, spans: Spans) -> list[Any]:
        pieces = np.concatenate([np.arange(b, e) for b, e in zip(*spans, strict=True)]) if len(spans.begin) else np.zeros(0, int)
        documents = plan.indices[pieces].tolist()
        if not plan.is_cut:
            return documents
        parts = zip(documents, plan.starts[pieces].tolist(), plan.lengths[pieces].tolist(), strict=True)
        return [DocumentSlice(*part) for part in parts]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _checked_cost(cost: Any) -> tuple[float, float]:
    try:
        a, b = (float(x) for x in cost if not isinstance(x, (str, bool)))
    except (TypeError, ValueError):
        raise TypeError(f"cost must be two numbers (per token, per document length^2), got {cost!r}") from None
    if not (0 <= a < math.inf and 0 <= b < math.inf):
        raise ValueError(f"cost must be two finite numbers of at least 0, got {cost!r}")
    return a, b


def _parse_state(state: Any) -> tuple[int, list[Segment], str]:
    """(epoch, segments, plan), or ValueError for what no sampler has made."""
    try:
        number, plan = as_integer("epoch", state["epoch"]), str(state["plan"])
        segments = [Segment(*(as_integer("segments", x) for x in segment)) for segment in state["segments"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the state of a PackedBatchSampler: {state!r}") from error
    for world_size, packs_per_batch, steps in segments or [Segment(0, 0, 0)]:
        if min(world_size, packs_per_batch) < 1 or world_size * packs_per_batch > MOST_PACKS or steps < 0:
            raise ValueError(f"not the state of a PackedBatchSampler: {state!r}")
    return number, segments, plan


def _deal(packs: IntArray) -> IntArray:
    """(steps, places, ranks), most costly first -> (steps, ranks, places): every other round is dealt in reverse."""
    dealt = packs.copy()
    dealt[:, 1::2] = packs[:, 1::2, ::-1]
    return dealt.transpose(0, 2, 1)


def _make_divisible(spans: Spans, tokens: IntArray, divisor: int) -> Spans:
    """As many packs as a multiple of ``divisor``: cut those with most pieces where their tokens halve, then add empty ones."""
    begin, end = spans.begin.tolist(), spans.end.tolist()
    missing = -len(begin) % divisor
    if not missing:
        return spans
    pieces = np.array(end) - np.array(begin)
    # Enough candidates to cut `missing` times even if each cut takes the largest that is left, of which the first in this order.
    candidates = np.argsort(-pieces, kind="stable")[:missing].tolist()
    heap = [(begin[pack] - end[pack], place, pack) for place, pack in enumerate(candidates)]
    while missing and heap and heap[0][0] < -1:
        _, place, largest = heap[0]
        middle = (tokens[begin[largest]] + tokens[end[largest]]) / 2
        inner = tokens[begin[largest] + 1 : end[largest]]
        cut = begin[largest] + 1 + int(np.abs(inner - middle).argmin())
        begin.append(cut)
        end.append(end[largest])
        end[largest] = cut
        heapq.heapreplace(heap, (begin[largest] - cut, place, largest))
        heapq.heappush(heap, (cut - end[-1], len(heap), len(begin) - 1))
        missing -= 1
    empty = [0] * missing
    return Spans(np.array(begin + empty, np.int64), np.array(end + empty, np.int64))
