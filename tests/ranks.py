"""Runs a test's function on every rank of a ``gloo`` group, a process each."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist


def run_ranks(world_size: int, tmp_path, function, *args) -> None:
    """``function(rank, *args)`` on ``world_size`` ranks; the first rank's exception is raised here, with its traceback."""
    store = f"file://{tmp_path}/store"
    torch.multiprocessing.spawn(_rank, (world_size, store, function, args), nprocs=world_size)


def _rank(rank, world_size, store, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    function(rank, *args)
    dist.barrier()
    # A gloo thread that lets go of its last work while the interpreter shuts down wants the GIL and aborts the process: skip
    # the shutdown. An exception above leaves through spawn's own path.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
