"""Documents: their lengths, as a corpus has them (``document_lengths.json``), and how they are trained on without packing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PADDED_ROWS = 8  # documents in a padded micro-batch, at most
LENGTHS = Path(__file__).with_name("document_lengths.json")


def draw_lengths(corpus: dict[str, Any], tokens: int, rng: np.random.Generator) -> list[int]:
    """Of as many documents as fit into ``tokens``: n of them have those of the corpus's quantiles 0.5/n, 1.5/n, ..., at most
    ``tokens``, in random order."""
    heights = np.linspace(0, 1, len(corpus["quantiles"]))

    def lengths(count: int) -> np.ndarray:
        middles = (np.arange(count) + 0.5) / count
        return np.interp(middles, heights, corpus["quantiles"]).round().astype(int).clip(2, tokens)

    count = bisect_right(range(1, tokens // 2 + 1), tokens, key=lambda n: int(lengths(n).sum()))
    return rng.permutation(lengths(count)).tolist()


def padded_groups(documents: Iterable[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """The documents of each padded micro-batch, in their order: as many as fit ``tokens``, the padding among them."""
    groups: list[list[int]] = [[]]
    for document in documents:
        group = [*groups[-1], document]
        if len(group) > PADDED_ROWS or len(group) * max(lengths[i] for i in group) > tokens:
            groups.append([])
        groups[-1].append(document)
    return groups


def padded_inputs(documents: list[Tensor], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a model for a padded micro-batch."""
    ids = pad_sequence(documents, batch_first=True)
    mask = pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {**{name: value.to(device) for name, value in inputs.items()}, "use_cache": False}
