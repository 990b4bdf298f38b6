"""Runs a test's function on every rank of a ``gloo`` or ``nccl`` group, a process each."""

from __future__ import annotations

import datetime
import os
import sys

import pytest
import torch
import torch.distributed as dist

# Long enough for any machine, so that a test which does hang ends with a traceback.
TIMEOUT = datetime.timedelta(minutes=5)


def fabrics(*world_sizes: int, gpus: tuple[int, ...] = (2,)) -> pytest.MarkDecorator:
    """``(backend, world_size)`` arguments of a test: gloo on the CPU everywhere, NCCL where there are that many GPUs."""
    with_gpus = [pytest.param("nccl", n, marks=[pytest.mark.gpu, pytest.mark.multigpu(count=n)], id=f"nccl-{n}") for n in gpus]
    on_cpu = [pytest.param("gloo", n, id=f"gloo-{n}") for n in world_sizes]
    return pytest.mark.parametrize("backend, world_size", [*on_cpu, *with_gpus])


def run_ranks(world_size: int, tmp_path, function, *args, backend: str = "gloo") -> None:
    """``function(rank, *args)`` on ``world_size`` ranks; the first rank's exception is raised here, with its traceback."""
    store = f"file://{tmp_path}/store"
    torch.multiprocessing.spawn(_rank, (world_size, store, backend, function, args), nprocs=world_size)


def this_device() -> torch.device:
    """Where a rank's tensors belong."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _rank(rank, world_size, store, backend, function, args):
    torch.set_num_threads(1)
    device = None
    if backend == "nccl":
        # NVLink multicast concerns every GPU of a host, whoever uses the others: a test must not be the one to set it up.
        os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT, device_id=device)
    try:
        function(rank, *args)
    except pytest.fail.Exception as error:  # no Exception, so spawn would not pass it on
        raise AssertionError(str(error)) from error
    dist.barrier()
    # A gloo thread that lets go of its last work while the interpreter shuts down wants the GIL and aborts the process: skip
    # the shutdown. An exception above leaves through spawn's own path.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
