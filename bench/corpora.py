"""Lengths of documents, as a corpus has them (``document_lengths.json``)."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

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
