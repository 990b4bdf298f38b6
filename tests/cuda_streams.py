"""What a training loop needs of a CUDA op: that the host never waits for it, and that a graph can hold it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """An error wherever the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Any], **options: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what ``step`` does, and what it returned: tensors that every replay fills anew.

    ``step`` runs once before, on a side stream as torch asks for, so that nothing is allocated or compiled for the first time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = step()
    return graph, result
