"""What a call takes from the memory of the current CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that were allocated at most while it ran, beyond those allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
