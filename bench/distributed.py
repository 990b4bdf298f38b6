"""Several GPUs: a loss whose vocabulary is split over them, whole training steps, and how long ranks wait for each other.

    packops bench distributed balance                 # simulated: a CPU will do
    packops bench distributed vocab --ranks 8         # vocab-parallel loss and gradient against other implementations
    packops bench distributed steps --ranks 1 2 4 8   # whole training steps under DDP and FSDP2: see distributed_steps.py
    packops bench distributed steps --tiny --device cpu --ranks 1 2    # to see that it runs

    pip install liger-kernel==0.8.5                   # a peer of `vocab`, left out where it is not installed

Method of `vocab`. A process a GPU, started here. Candidates take turns, round by round; every round begins with a barrier and is
timed by events around a few calls; the figure is the median over the rounds of the slowest rank. `copy` is `y.copy_(x)` of a
rank's logits, the bandwidth that `of copy` refers to: the least a loss and its gradient must move is three times the logits, read
twice and written once, because the gradient needs the sum over all shards. `extra memory` is the peak beyond logits and labels.

Method of `balance`. A rank's time for a batch is ``a * tokens + b * sum of document length^2``; the slowest rank ends the step.
Utilisation is the share of all ranks' time that is not waiting. Lengths are synthetic, and so is the cost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import command
import corpora
import distributed_steps
import measuring
import packops
import peers
import reporting
from distributed_steps import steps  # noqa: F401  run by name on every rank
from measuring import Clock, device_state
from models import MODELS

NAME = "distributed"
COST = (24576.0, 1.0)  # of a 7B transformer
BALANCES = ("none", "tokens", "attention")


# ---- balance: simulated ------------------------------------------------------------------------------------------------------


def long_tailed(count: int, longest: int) -> np.ndarray:
    """Synthetic: most documents short, lognormal(6, 1), and one in fifty from a second, long lognormal(9.5, 0.7)."""
    random = np.random.default_rng(0)
    is_long = random.random(count) < 0.02
    lengths = np.where(is_long, random.lognormal(9.5, 0.7, count), random.lognormal(6.0, 1.0, count))
    return np.clip(lengths, 8, longest).astype(np.int64)


def utilisation(costs: np.ndarray) -> float:
    """(steps, ranks) -> work over the time the slowest rank of each step takes, times the ranks."""
    return float(costs.sum() / (costs.shape[1] * costs.max(1).sum()))


def balance(documents: int, max_length: int) -> dict[str, Any]:
    lengths = long_tailed(documents, max_length)
    rows = []
    print(f"{documents:,} documents of mean {lengths.mean():.0f}, packs of {max_length:,} tokens, cost {COST[0]:g} L + sum L^2")
    print(f"{'ranks':>6} {'packs a rank':>13}   " + "  ".join(f"balance={name:<9}" for name in BALANCES) + "   time saved")
    for ranks in (8, 64):
        for packs in (1, 4):
            row: dict[str, Any] = {"ranks": ranks, "packs_per_batch": packs, "utilisation": {}, "time": {}}
            for name in BALANCES:
                sampler = packops.PackedBatchSampler(
                    lengths, max_length, rank=0, world_size=ranks, packs_per_batch=packs, balance=name, cost=COST
                )
                costs = sampler.costs()
                row["utilisation"][name] = utilisation(costs)
                row["time"][name] = float(costs.max(1).sum())
            row["steps"] = len(sampler)
            row["time_saved"] = 1 - row["time"]["attention"] / row["time"]["none"]
            rows.append(row)
            shares = "  ".join(f"{100 * row['utilisation'][name]:15.1f} %" for name in BALANCES)
            print(f"{ranks:>6} {packs:>13}   {shares}   {100 * row['time_saved']:8.1f} %")
    return {
        "distribution": long_tailed.__doc__,
        "documents": documents,
        "mean_length": float(lengths.mean()),
        "max_length": max_length,
        "cost": COST,
        "rows": rows,
    }


# ---- ranks -------------------------------------------------------------------------------------------------------------------


def on_ranks(name: str, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 returns of this file's function ``name``, run on every rank of a group."""
    # A child process must be able to import the function, whatever name this file runs under.
    sys.path.insert(0, str(Path(__file__).parent))
    worker = importlib.import_module(Path(__file__).stem).run_rank
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (name, ranks, folder, options), nprocs=ranks)
        return json.loads((Path(folder) / "result.json").read_text())


def run_rank(rank: int, name: str, ranks: int, folder: str, options: dict[str, Any]) -> None:
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
    result = globals()[name](device, options)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    # A gloo thread that lets go of its last work while the interpreter shuts down wants the GIL and aborts the process.
    sys.stdout.flush()
    os._exit(0)


def slowest(values: list[float], device: torch.device) -> list[float]:
    of_ranks = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX)
    return of_ranks.tolist()


# ---- vocab: loss and gradient ------------------------------------------------------------------------------------------------


class EagerVocabParallel(torch.autograd.Function):
    """The usual eager code, as Megatron's unfused loss does it: an fp32 copy that becomes the softmax, three all-reduces."""

    @staticmethod
    def forward(ctx, logits, labels, first_class):
        x = logits.float()
        top = x.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        x -= top[:, None]
        local = labels - first_class
        elsewhere = (local < 0) | (local >= x.shape[1])
        local = local.masked_fill(elsewhere, 0)
        of_label = x.gather(1, local[:, None])[:, 0].masked_fill(elsewhere, 0)
        dist.all_reduce(of_label)
        total = torch.exp(x, out=x).sum(-1)
        dist.all_reduce(total)
        x /= total[:, None]
        ctx.save_for_backward(x, local, elsewhere)
        ctx.dtype = logits.dtype
        return total.log() - of_label

    @staticmethod
    def backward(ctx, grad_output):
        softmax, local, elsewhere = ctx.saved_tensors
        softmax[torch.arange(len(local), device=local.device), local] -= (~elsewhere).float()
        return (softmax * grad_output[:, None]).to(ctx.dtype), None, None


def vocab_candidates(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Each makes the mean loss and the gradient of this rank's logits."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first_class = rank * logits.shape[1]

    def with_gradient(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        def call():
            leaf = logits.detach().requires_grad_()
            loss = loss_of(leaf)
            loss.backward()
            return loss.detach(), leaf.grad

        return call

    def loss_only() -> Any:
        with torch.no_grad():
            return packops.vocab_parallel_cross_entropy(logits, labels), None

    candidates = {
        "packops": with_gradient(lambda x: packops.vocab_parallel_cross_entropy(x, labels)),
        "packops, loss only": loss_only,
        "eager, as Megatron": with_gradient(lambda x: EagerVocabParallel.apply(x, labels, first_class).mean()),
    }
    try:
        from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

        liger = LigerVocabParallelCrossEntropy()
        candidates["Liger"] = with_gradient(lambda x: liger(x[:, None], labels[:, None], tp_group=dist.group.WORLD).mean())
    except ImportError as error:
        if rank == 0:
            print(f"left out: Liger ({error})")
    try:
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor.parallel import loss_parallel

        mesh = dist.init_device_mesh(logits.device.type, (ranks,))

        def torch_loss_parallel():
            leaf = logits.detach().requires_grad_()
            with loss_parallel():
                loss = F.cross_entropy(DTensor.from_local(leaf, mesh, [Shard(1)]).float(), labels)
                loss.backward()
            return loss.detach().full_tensor(), leaf.grad

        candidates["torch loss_parallel"] = torch_loss_parallel
    except ImportError as error:
        if rank == 0:
            print(f"left out: torch loss_parallel ({error})")
    return candidates


def vocab(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks, rows = dist.get_rank(), dist.get_world_size(), options["rows"]
    torch.manual_seed(0)
    labels = torch.randint(0, options["vocab"], (rows,), device=device)
    torch.manual_seed(1 + rank)
    logits = torch.randn(rows, options["vocab"] // ranks, device=device).bfloat16() * 2
    candidates = vocab_candidates(logits, labels)
    clock, target = Clock(device), torch.empty_like(logits)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(logits), **candidates}
    facts: dict[str, dict[str, Any]] = {name: {} for name in calls}

    expected_loss, expected_grad = candidates["eager, as Megatron"]()
    scale = expected_grad.abs().max().item()
    for name, call in candidates.items():
        try:
            loss, grad = call()
            error = abs(loss.item() / expected_loss.item() - 1)
            assert error < 1e-3, f"a loss off by {error:.1e}"
            if grad is not None:
                error = (grad.float() - expected_grad.float()).abs().max().item() / scale
                assert error < 2e-2, f"a gradient off by {error:.1e}"
            del loss, grad
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                facts[name]["extra_memory"] = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            facts[name]["failed"] = f"{type(error).__name__}: {error}"
            del calls[name]
    del expected_grad

    samples: dict[str, list[float]] = {name: [] for name in calls}
    group = 1 if device.type == "cpu" else 5
    order = random.Random(0)  # the same on every rank
    for number in range(options["rounds"] + 1):
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            dist.barrier()
            begin = clock.now()
            for _ in range(group):
                call()
            milliseconds = clock.milliseconds(begin, clock.now()) / group
            if number:  # the first round warms up
                samples[name].append(milliseconds)
    for name in calls:
        facts[name]["samples"] = slowest(samples[name], device)
        facts[name]["milliseconds"] = statistics.median(facts[name]["samples"])
    copy = facts.pop("copy")["milliseconds"] / 2  # of reading or writing the logits once
    passes = {"packops, loss only": 1}
    for name, fact in facts.items():
        if "milliseconds" in fact:
            fact["of_copy"] = passes.get(name, 3) * copy / fact["milliseconds"]
    return {"ranks": ranks, "rows": rows, "vocab": options["vocab"], "candidates": facts}


def print_vocab(result: dict[str, Any], device: str) -> None:
    print(f"{result['rows']} x {result['vocab']} bf16 over {result['ranks']} x {device}: loss and gradient")
    print(f"{'':22} {'ms':>9} {'of copy':>9} {'extra memory':>14}")
    for name, fact in result["candidates"].items():
        if "failed" in fact:
            print(f"{name:22} {fact['failed'][:100]}")
            continue
        memory = f"{fact['extra_memory'] / 2**20:10.0f} MiB" if "extra_memory" in fact else ""
        print(f"{name:22} {fact['milliseconds']:9.3f} {fact['of_copy']:9.2f} {memory:>14}")


# ---- the command -------------------------------------------------------------------------------------------------------------


def steps_on(counts: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """The rows of ``steps`` for every number of ranks, and a table of them."""
    name = options.pop("corpus")
    corpus = json.loads(corpora.LENGTHS.read_text())[name]
    if options["tiny"]:
        corpus = {**corpus, "quantiles": [max(2, length // 16) for length in corpus["quantiles"]]}
    cases = [on_ranks("steps", count, {**options, "corpus": corpus}) for count in counts]
    facts = {key: options[key] for key in ("max_length", "steps", "rounds", "tiny")}
    model = f"{'tiny ' if options['tiny'] else ''}{MODELS['llama']}"
    return {"model": model, "corpus_name": name, **facts, "cases": cases}


def parse() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="packops bench distributed", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="what", required=True)
    output, device = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="STEM",
        help="write STEM.json; without STEM bench/results/distributed_*",
    )
    device.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    kind = kinds.add_parser("balance", parents=[output], help="simulated waiting")
    kind.add_argument("--documents", type=int, default=200_000, help="of the synthetic length distribution")
    kind.add_argument("--max-length", type=int, default=32768, help="tokens of a pack")
    kind = kinds.add_parser("vocab", parents=[device, output], help="loss and gradient, vocabulary over ranks")
    kind.add_argument("--ranks", type=int, help="processes; default: one per GPU, or 2 on a CPU")
    kind.add_argument("--rows", type=int, default=8192)
    kind.add_argument("--vocab", type=int, default=128256)
    kind.add_argument("--rounds", type=int, default=20)
    kind = kinds.add_parser("steps", parents=[device, output], help="whole training steps under DDP and FSDP2")
    kind.add_argument("--ranks", type=int, nargs="+", help="numbers of processes, as in: 1 2 4 8; default: 1 and one per GPU")
    kind.add_argument("--corpus", choices=["short", "long"], default="long", help="lengths of documents")
    kind.add_argument("--rows", nargs="+", metavar="WORD", help="only rows whose name has one of these, as in: DDP attention")
    kind.add_argument("--max-length", type=int, default=16384, help="tokens of a pack")
    kind.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    kind.add_argument("--rounds", type=int, default=2)
    kind.add_argument("--tiny", action="store_true", help="a small fp32 model, for a CPU: to see that it runs")
    return vars(parser.parse_args())


def main() -> None:
    options = parse()
    what, out = options.pop("what"), options.pop("out")
    kind = options.get("device", "cpu")
    environment = measuring.environment(kind, {"liger-kernel": peers.LIGER, "transformers": peers.TRANSFORMERS})
    settings = {"arguments": command.without_output(sys.argv[1:])}
    state = {"before": device_state(kind)}
    gpus = torch.cuda.device_count() if kind == "cuda" else 2
    if what == "balance":
        result = balance(options["documents"], options["max_length"])
        stem = "distributed_balance"
    elif what == "vocab":
        ranks = options.pop("ranks") or gpus
        if ranks < 2:
            raise SystemExit(f"packops bench distributed vocab: needs two ranks or more, got {ranks}")
        if options["vocab"] % ranks:
            raise SystemExit(f"packops bench distributed vocab: {options['vocab']} classes do not divide by {ranks} ranks")
        result = on_ranks("vocab", ranks, options)
        print_vocab(result, environment["device"])
        stem = f"distributed_vocab_{ranks}x{measuring.slug(kind, environment['device'])}"
    else:
        counts = sorted(set(options.pop("ranks") or [1, gpus]))
        if kind == "cuda" and counts[-1] > gpus:
            raise SystemExit(f"packops bench distributed steps: --ranks {counts[-1]}, but there are {gpus} GPUs")
        if kind == "cpu" and not options["tiny"]:
            raise SystemExit("packops bench distributed steps: on a CPU with --tiny only")
        result = steps_on(counts, options)
        print(distributed_steps.table(result, environment["device"]))
        stem = f"distributed_steps_{result['corpus_name']}_{counts[-1]}x{measuring.slug(kind, environment['device'])}"
    if out is not None:
        path = (reporting.RESULTS / stem if out == Path() else out).with_suffix(".json")
        state["after"] = device_state(kind)
        facts = {"benchmark": f"distributed {what}", "environment": environment, "settings": settings, "state": state}
        reporting.write(facts | result, path)
        print(f"\n{path}")


if __name__ == "__main__":
    main()
