"""Whole training steps on several ranks: what packing, and sharing out the work of packs, is worth there.

Every row trains the Llama-3.2-1B shape (``models.py``) on documents of a corpus's lengths, with a fused AdamW step and a pack
a rank. ``padded`` is the stock model on rows of at most 8 documents, dealt to the ranks in turn; ``packed`` is the model of
:func:`packops.hf.apply`, its packs dealt by :class:`packops.PackedBatchSampler` with each ``balance``. Useful tokens are
those of documents, not padding. A step lasts from barrier to barrier, so it is the slowest rank's. Efficiency is the useful
tokens a second and rank, over those of the smallest number of ranks in the run; one rank has nothing to balance, so all packed
rows are compared with its ``balance=none``. Utilisation is the mean over the ranks of the time that each one's own forward,
backward and optimizer take without communication, over the time of the steps.

Before its time is taken, each row trains ten steps of a tiny fp32 model with SGD, and so does one process that gets all documents
of a step in one pack: ``weights off by`` is the largest difference of a weight, over the largest change of one.
"""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import packops
from corpora import PADDED_ROWS, draw_lengths, padded_groups, padded_inputs
from measuring import Clock
from models import configuration
from process_group import time_left

WARM_UP = 2  # steps: DDP sorts its buckets anew after the first
CHECKED_STEPS, CHECKED_TOKENS = 10, 96
MOST_OFF = 1e-3  # of the largest change of a weight: fp32 rounding is below it, a mean of means far above


@dataclass(frozen=True)
class Row:
    """``balance`` None: padded."""

    parallel: str
    balance: str | None

    def __str__(self) -> str:
        packed = "padded" if self.balance is None else f"packed, balance={self.balance}"
        return f"{self.parallel}, {packed}"


# What says most comes first, in case time runs out.
ROWS = [Row(parallel, balance) for parallel in ("DDP", "FSDP2") for balance in ("attention", "none", None, "tokens")]


def corpus_lengths(corpus: dict[str, Any], tokens: int, packs: int) -> list[int]:
    """Of documents for about so many packs."""
    rng = np.random.default_rng(0)
    return [length for _ in range(packs) for length in draw_lengths(corpus, tokens, rng)]


def cost_of(config: Any) -> tuple[float, float]:
    """What a token costs, and a pair of tokens of one document: multiplications of the products and of the attention."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * hidden * (heads + config.num_key_value_heads * config.head_dim)
    layer = attention + 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * hidden, float(config.num_hidden_layers * heads)


def plan(row: Row, lengths: list[int], tokens: int, cost: tuple[float, float], rank: int, ranks: int) -> list[list[int]]:
    """The documents of each of a rank's steps."""
    if row.balance is not None:
        sampler = packops.PackedBatchSampler(lengths, tokens, balance=row.balance, cost=cost, rank=rank, world_size=ranks)
        return list(sampler)
    groups = padded_groups(np.random.default_rng(0).permutation(len(lengths)).tolist(), lengths, tokens)
    whole = len(groups) // ranks * ranks
    return groups[rank:whole:ranks]


def inputs_of(row: Row, documents: list[Tensor], tokens: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the model, all but the count that the loss is divided by."""
    if row.balance is not None:
        return packops.PackingCollator(pad_to_length=tokens)([d.numpy() for d in documents]).to(device).to_hf()
    return padded_inputs(documents, device)


def make_model(row: Row, config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=dtype)
    if row.balance is not None:
        from packops import hf

        hf.apply(model, attention="packops_varlen")
    return model.train()


def wrap(row: Row, model: nn.Module) -> nn.Module:
    if row.parallel == "DDP":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for layer in model.model.layers:  # type: ignore[attr-defined, union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Trainer:
    """A rank's model, optimizer and documents."""

    def __init__(self, row: Row, model: nn.Module, optimizer: torch.optim.Optimizer, documents: list[Tensor], tokens: int):
        self.row, self.model, self.optimizer = row, model, optimizer
        self.documents, self.tokens = documents, tokens
        self.device = next(model.parameters()).device

    def step(self, chosen: list[int], ranks_in_step: bool = True) -> None:
        """``ranks_in_step`` False: this rank's own work alone, without a word to the others."""
        documents = [self.documents[i] for i in chosen]
        scored = sum(len(document) - 1 for document in documents)
        count = packops.loss_normalizer(scored) if ranks_in_step else torch.tensor(float(scored))
        inputs = inputs_of(self.row, documents, self.tokens, self.device)
        self.model(**inputs, num_items_in_batch=count.to(self.device, torch.float32)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def weights_off_by(row: Row, device: torch.device) -> float:
    """How far ten steps on all ranks end from the same ten in one process, over the largest change that they make."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = configuration("llama", tiny=True)
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, CHECKED_TOKENS // 2, 6 * ranks * CHECKED_STEPS).tolist()
    documents = [torch.from_numpy(rng.integers(3, config.vocab_size, length)) for length in lengths]
    plans = [plan(row, lengths, CHECKED_TOKENS, cost_of(config), r, ranks)[:CHECKED_STEPS] for r in range(ranks)]

    def trainer(row: Row, tokens: int, alone: bool) -> tuple[nn.Module, Trainer]:
        model = make_model(row, config, torch.float32, device)
        wrapped = model if alone else wrap(row, model)
        # Not Adam: it would forgive gradients of a wrong scale.
        return model, Trainer(row, wrapped, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), documents, tokens)

    together, on_ranks = trainer(row, CHECKED_TOKENS, alone=False)
    for chosen in plans[rank]:
        on_ranks.step(chosen)
    packed = Row(row.parallel, "none")
    whole, alone = trainer(packed, CHECKED_TOKENS * PADDED_ROWS * ranks, alone=True)
    begin = [parameter.detach().clone() for parameter in whole.parameters()]
    for step in zip(*plans, strict=True):
        alone.step([document for chosen in step for document in chosen], ranks_in_step=False)
    off, change = [], []
    for mine, expected, before in zip(together.parameters(), whole.parameters(), begin, strict=True):
        value = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        off.append((value - expected).abs().max().item())
        change.append((expected - before).abs().max().item())
    return float(np.max(off) / np.max(change))  # NaN if one is


def measure(
    row: Row, lengths: list[int], documents: list[Tensor], options: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    rank, ranks, tokens = dist.get_rank(), dist.get_world_size(), options["max_length"]
    config = configuration("llama", options["tiny"])
    cost = cost_of(config)
    chosen = [plan(row, lengths, tokens, cost, r, ranks)[: WARM_UP + options["steps"]] for r in range(ranks)]
    clock = Clock(device)
    model = make_model(row, config, torch.float32 if options["tiny"] else torch.bfloat16, device)

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True)

    def seconds(trainer: Trainer, together: bool) -> list[float]:
        marks = []
        for step in chosen[rank]:
            if together:
                dist.barrier()
            begin = clock.now()
            trainer.step(step, ranks_in_step=together)
            if together:
                dist.barrier()
            marks.append((begin, clock.now()))
        return [clock.milliseconds(*pair) / 1e3 for pair in marks[WARM_UP:]]

    own = seconds(Trainer(row, model, optimizer(), documents, tokens), together=False)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = seconds(Trainer(row, wrap(row, model), optimizer(), documents, tokens), together=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    of_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_ranks, (own, steps, peak))
    slowest = np.max([of_rank[1] for of_rank in of_ranks], 0)
    useful = sum(lengths[i] for of_rank in chosen for step in of_rank[WARM_UP:] for i in step)
    return {
        "samples": slowest.tolist(),
        "own": [of_rank[0] for of_rank in of_ranks],
        "useful_tokens": useful,
        "tokens_per_second": useful / float(slowest.sum()),
        "utilisation": float(np.sum([of_rank[0] for of_rank in of_ranks]) / (ranks * slowest.sum())),
        "peak_gib": max(of_rank[2] for of_rank in of_ranks),
    }


def steps(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Run on every rank: the rows of one number of ranks, in random order, round by round."""
    ranks = dist.get_world_size()
    lengths = corpus_lengths(options["corpus"], options["max_length"], ranks * (WARM_UP + options["steps"]) * 2)
    vocabulary = configuration("llama", options["tiny"]).vocab_size
    rng = np.random.default_rng(0)
    documents = [torch.from_numpy(rng.integers(3, vocabulary, length)) for length in lengths]
    rows = [row for row in ROWS if any(word in str(row) for word in options["rows"] or [""])]
    if ranks == 1:
        rows = list(dict.fromkeys(row if row.balance is None else Row(row.parallel, "none") for row in rows))
    found: dict[str, dict[str, Any]] = {}
    order, longest = random.Random(0), 0.0  # the same on every rank
    for number in range(options["rounds"]):
        for row in order.sample(rows, len(rows)) if number else rows:
            if not time_left(options["until"], device, longest):
                continue
            begin = time.perf_counter()
            result = found.setdefault(str(row), {"seconds": 0.0, "rounds": []})
            if not result["rounds"]:
                result["weights_off_by"] = weights_off_by(row, device)
            result["rounds"].append(measure(row, lengths, documents, options, device))
            with contextlib.suppress(AttributeError):
                torch.get_device_module(device).empty_cache()
            seconds = time.perf_counter() - begin
            result["seconds"] += seconds
            if dist.get_rank() == 0:  # at once: a run that is cut short has said this much
                tokens = result["rounds"][-1]["tokens_per_second"]
                print(f"{seconds:7.1f} s  {row}, {ranks} ranks: {tokens:,.0f} tokens/s", file=sys.stderr, flush=True)
            longest = max(longest, seconds)
    for result in found.values():
        for name in ("tokens_per_second", "utilisation", "peak_gib"):
            result[name] = statistics.median(measured[name] for measured in result["rounds"])
    return {"ranks": ranks, "rows": found}


def table(data: dict[str, Any], device: str) -> str:
    lines = [
        f"{data['model']} on {device}, {data['corpus_name']} documents, packs of {data['max_length']:,} tokens, "
        f"{data['steps']} steps",
        f"{'':<34} {'ranks':>5} {'useful tokens/s':>16} {'efficiency':>11} {'utilisation':>12} {'GiB':>6} {'weights off by':>15}",
    ]
    first = data["cases"][0]
    for name in map(str, ROWS):
        fewest = first["rows"].get(f"{name.partition('=')[0]}=none" if "=" in name and first["ranks"] == 1 else name)
        for case in data["cases"]:
            if name not in case["rows"]:
                continue
            row = case["rows"][name]
            efficiency = ""
            if fewest:
                efficiency = f"{row['tokens_per_second'] / case['ranks'] / (fewest['tokens_per_second'] / first['ranks']):.3f}"
            off = f"{row['weights_off_by']:.1e}" + ("  WRONG" if not row["weights_off_by"] <= MOST_OFF else "")
            lines.append(
                f"{name:<34} {case['ranks']:>5} {row['tokens_per_second']:>16,.0f} {efficiency:>11} "
                f"{100 * row['utilisation']:>10.1f} % {row['peak_gib']:>6.1f} {off:>15}"
            )
    return "\n".join(lines)
