"""A group of processes for a benchmark, and what they have to agree on."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OnRank = Callable[[torch.device, dict[str, Any]], dict[str, Any]]


def on_ranks(function: OnRank, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 returns of ``function(device, options)``, run on every rank of a group. A process must be able to import it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (function, ranks, folder, options), nprocs=ranks)
        return json.loads((Path(folder) / "result.json").read_text())


def _rank(rank: int, function: OnRank, ranks: int, folder: str, options: dict[str, Any]) -> None:
    # NVLink multicast concerns every GPU of a host, whoever uses the others: a benchmark must not be the one to set it up.
    os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")
    on_gpu = options["device"] == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
        device_id=device if on_gpu else None,
    )
    result = function(device, options)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    # A gloo thread that lets go of its last work while the interpreter shuts down wants the GIL and aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def largest(values: list[float], device: torch.device) -> list[float]:
    """Each value's maximum over the ranks; infinite where a rank has NaN, which a maximum may lose."""
    of_ranks = torch.tensor(values, dtype=torch.float64, device=device).nan_to_num(nan=torch.inf)
    dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX)
    return of_ranks.tolist()


def same_bits(x: Tensor) -> bool:
    """Whether all ranks hold what rank 0 holds, bit for bit. The answer is the same on every rank."""
    mine = x.detach().contiguous().reshape(-1).view(torch.uint8)
    first = mine.clone()
    dist.broadcast(first, 0)
    differs = (mine != first).any().int()
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    return not differs.item()


def complaint(mine: str) -> str:
    """The first rank's that has one, else "": no rank may go on where another stops."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return next(filter(None, of_ranks), "")


def time_left(until: float, device: torch.device, seconds: float = 0.0) -> bool:
    """Whether so many seconds more end before ``time.time()`` says ``until``, by rank 0's clock."""
    left = torch.tensor(int(time.time() + seconds < until), device=device)
    dist.broadcast(left, 0)
    return bool(left.item())
