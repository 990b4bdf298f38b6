"""Fake kernels of the packed-axis metadata. Nothing here is differentiable: every input and output is an integer."""

from __future__ import annotations

import torch
from torch import Tensor


def register(namespace: str) -> None:
    @torch.library.register_fake(f"{namespace}::packed_metadata")
    def _(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
        position_ids = cu_seqlens.new_empty((total_tokens,), dtype=torch.int64)
        return position_ids, cu_seqlens.new_empty((total_tokens,), dtype=torch.int32)

    @torch.library.register_fake(f"{namespace}::packed_labels")
    def _(labels: Tensor, cu_seqlens: Tensor, *, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
        counts = cu_seqlens.new_empty((cu_seqlens.shape[0] - 1,), dtype=torch.int64)
        return labels.new_empty((labels.shape[0],)), counts
