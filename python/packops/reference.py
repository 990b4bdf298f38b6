"""The specification in plain torch: what every packops op computes, in fp64, one readable formula at a time.

Tests, documentation and :func:`packops.verify` share these functions. They are slow and allocate freely.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def packed_metadata(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions that restart in every document, and document ids; padding is one trailing document with id -1."""
    bounds = cu_seqlens.tolist()
    spans = [(s, begin, end) for s, (begin, end) in enumerate(itertools.pairwise(bounds))]
    position_ids = torch.zeros(total_tokens, dtype=torch.int64)
    seq_idx = torch.full((total_tokens,), -1, dtype=torch.int32)
    for s, begin, end in [*spans, (-1, bounds[-1], total_tokens)]:
        position_ids[begin:end] = torch.arange(end - begin)
        seq_idx[begin:end] = s
    return position_ids.to(cu_seqlens.device), seq_idx.to(cu_seqlens.device)


def packed_labels(labels: Tensor, cu_seqlens: Tensor, *, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Labels in which no token is scored against another document, and the scored tokens of each document."""
    bounds = cu_seqlens.tolist()
    flat = labels.reshape(-1)
    target = torch.full_like(flat, ignore_index, memory_format=torch.contiguous_format)
    counts = []
    for begin, end in itertools.pairwise(bounds):
        if shift:
            target[begin : max(begin, end - 1)] = flat[begin + 1 : end]
        else:
            target[begin + 1 : end] = flat[begin + 1 : end]
        counts.append(int((flat[begin + 1 : end] != ignore_index).sum()))
    return target.view(labels.shape), torch.tensor(counts, dtype=torch.int64, device=labels.device)
