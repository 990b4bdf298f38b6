"""Several GPUs: losses whose classes are spread over them, whole training steps, and how long ranks wait for each other.

    packops bench distributed balance                 # simulated: a CPU will do
    packops bench distributed vocab --ranks 8         # vocab-parallel loss and gradient: see distributed_losses.py
    packops bench distributed head --ranks 8          # the same of hidden states and the lm_head, and log-probabilities
    packops bench distributed steps --ranks 1 2 4 8   # whole training steps under DDP and FSDP2: see distributed_steps.py
    packops bench distributed vocab --quick --device cpu               # to see that it runs; so does head
    packops bench distributed steps --tiny --device cpu --ranks 1 2

    pip install liger-kernel==0.8.5                   # a peer of `vocab` and `head`, left out where it is not installed

Method of `balance`. A rank's time for a batch is ``a * tokens + b * sum of document length^2``; the slowest rank ends the step.
Utilisation is the share of all ranks' time that is not waiting. Lengths are synthetic, and so is the cost.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import command
import corpora
import distributed_losses
import distributed_steps
import measuring
import packops
import peers
import reporting
from measuring import device_state
from models import MODELS
from packing import COST, utilisation
from packops.cli.program import positive
from process_group import on_ranks

NAME = "distributed"
BALANCES = ("none", "tokens", "attention")
LOSSES = {"vocab": distributed_losses.vocab, "head": distributed_losses.head}
SIZES = {"rows": 8192, "hidden": 4096, "vocab": 128256, "rounds": 20}
QUICK = {"rows": 96, "hidden": 64, "vocab": 1006, "rounds": 2}  # an odd number of classes a rank


# ---- balance: simulated ------------------------------------------------------------------------------------------------------


def long_tailed(count: int, longest: int) -> np.ndarray:
    """Synthetic: most documents short, lognormal(6, 1), and one in fifty from a second, long lognormal(9.5, 0.7)."""
    random = np.random.default_rng(0)
    is_long = random.random(count) < 0.02
    lengths = np.where(is_long, random.lognormal(9.5, 0.7, count), random.lognormal(6.0, 1.0, count))
    return np.clip(lengths, 8, longest).astype(np.int64)


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


# ---- the command -------------------------------------------------------------------------------------------------------------


def steps_on(counts: list[int], options: dict[str, Any], keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The rows of ``steps`` for every number of ranks; ``keep`` gets the result after each."""
    name = options.pop("corpus")
    corpus = json.loads(corpora.LENGTHS.read_text())[name]
    if options["tiny"]:
        corpus = {**corpus, "quantiles": [max(2, length // 16) for length in corpus["quantiles"]]}
    facts = {key: options[key] for key in ("max_length", "steps", "rounds", "tiny")}
    model = f"{'tiny ' if options['tiny'] else ''}{MODELS['llama']}"
    result = {"model": model, "corpus_name": name, **facts, "cases": []}
    for number, count in enumerate(counts):  # each may take its share of what is left
        until = time.time() + (options["until"] - time.time()) / (len(counts) - number)
        result["cases"].append(on_ranks(distributed_steps.steps, count, {**options, "corpus": corpus, "until": until}))
        keep(result)
    return result


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
    device.add_argument(
        "--limit", type=command.seconds, default=math.inf, help="begin no round, or row, that ends later than so many seconds"
    )
    kind = kinds.add_parser("balance", parents=[output], help="simulated waiting")
    kind.add_argument("--documents", type=int, default=200_000, help="of the synthetic length distribution")
    kind.add_argument("--max-length", type=int, default=32768, help="tokens of a pack")
    for name, what in (
        ("vocab", "loss and gradient, classes over ranks"),
        ("head", "the same of the lm_head, and log-probabilities"),
    ):
        kind = kinds.add_parser(name, parents=[device, output], help=what)
        kind.add_argument("--ranks", type=int, help="processes; default: one per GPU, or 2 on a CPU")
        kind.add_argument("--quick", action="store_true", help="small sizes, two rounds, no peers: to see that it runs")
        for size, default in SIZES.items():
            if size != "hidden" or name == "head":
                kind.add_argument(f"--{size}", type=positive, help=f"default {default}; with --quick {QUICK[size]}")
    kind = kinds.add_parser("steps", parents=[device, output], help="whole training steps under DDP and FSDP2")
    kind.add_argument("--ranks", type=int, nargs="+", help="numbers of processes, as in: 1 2 4 8; default: 1 and one per GPU")
    kind.add_argument("--corpus", choices=["short", "long"], default="long", help="lengths of documents")
    kind.add_argument("--rows", nargs="+", metavar="WORD", help="only rows whose name has one of these, as in: DDP attention")
    kind.add_argument("--max-length", type=int, default=16384, help="tokens of a pack")
    kind.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    kind.add_argument("--rounds", type=positive, default=2)
    kind.add_argument("--tiny", action="store_true", help="a small fp32 model, for a CPU: to see that it runs")
    return vars(parser.parse_args())


def run_losses(what: str, options: dict[str, Any], gpus: int) -> dict[str, Any]:
    quick, ranks = options.pop("quick"), options.pop("ranks") or gpus
    options.update({name: options.get(name) or default for name, default in (QUICK if quick else SIZES).items()})
    if ranks < 2:
        raise SystemExit(f"packops bench distributed {what}: needs two ranks or more, got {ranks}")
    if options["vocab"] % ranks:
        raise SystemExit(f"packops bench distributed {what}: {options['vocab']} classes do not divide by {ranks} ranks")
    return on_ranks(LOSSES[what], ranks, {**options, "peers": not quick})


def main() -> None:
    begin, options = time.time(), parse()
    what, out = options.pop("what"), options.pop("out")
    options["until"] = begin + options.pop("limit", math.inf)
    kind = options.get("device", "cpu")
    environment = measuring.environment(kind, {"liger-kernel": peers.LIGER, "transformers": peers.TRANSFORMERS})
    facts = {
        "benchmark": f"distributed {what}",
        "environment": environment,
        "settings": {"arguments": command.without_output(sys.argv[1:])},
        "state": {"before": device_state(kind)},
    }
    gpus = torch.cuda.device_count() if kind == "cuda" else 2
    slug = measuring.slug(kind, environment["device"])

    def keep(result: dict[str, Any], stem: str) -> None:
        path = reporting.RESULTS / stem if out == Path() else out
        facts["state"]["after"] = device_state(kind)
        reporting.write(facts | result, path)
        if path:
            print(f"\nwritten: {path.with_suffix('.json')}")

    if what == "balance":
        keep(balance(options["documents"], options["max_length"]), "distributed_balance")
    elif what in LOSSES:
        result = run_losses(what, options, gpus)
        print(distributed_losses.table(result, environment["device"]))
        keep(result, f"distributed_{what}_{result['ranks']}x{slug}")
        if failed := distributed_losses.failures(result):
            raise SystemExit(f"packops bench distributed {what}: " + "; ".join(failed))
    else:
        counts = sorted(set(options.pop("ranks") or [1, gpus]))
        if kind == "cuda" and counts[-1] > gpus:
            raise SystemExit(f"packops bench distributed steps: --ranks {counts[-1]}, but there are {gpus} GPUs")
        if kind == "cpu" and not options["tiny"]:
            raise SystemExit("packops bench distributed steps: on a CPU with --tiny only")
        stem = f"distributed_steps_{options['corpus']}_{counts[-1]}x{slug}"
        result = steps_on(counts, options, lambda so_far: keep(so_far, stem))
        print(distributed_steps.table(result, environment["device"]))


if __name__ == "__main__":
    main()
