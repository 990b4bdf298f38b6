"""Losses whose classes are spread over ranks: of logits (``vocab``), and of hidden states and the lm_head's weight (``head``).

Candidates take turns, round by round; every round begins with a barrier and is timed by events around a few calls; the figure is
the median over the rounds of the slowest rank. Extra memory is the peak of a call beyond its inputs, gradients included, on the
rank that needs most.

Before any time is taken, each candidate's results are compared with those of eager fp32 code on the same bf16 inputs. ``off by``
is the largest error of a row over the size of that row, and of one number a row over the root mean square of all. What every
rank must hold alike, all but gradients of a rank's own shard, must be the same bits on all of them. A candidate that is wrong
fails, and is not timed.

``vocab`` is the mean loss and the gradient of a rank's logits. ``of copy`` is the least time over the time taken: ``copy`` is
``y.copy_(x)`` of a rank's logits, and a loss and its gradient must move three times the logits, read twice and written once,
because the gradient needs the sum over all shards.

``head`` is the mean loss, then log-probabilities and entropy, with the gradients of the hidden states, added up over the ranks,
and of a rank's weight. ``of products`` is the time of hidden @ weight.T and of the two products of its backward, over the time
taken. Liger's own kernels exchange through NVSHMEM and NVLink multicast, which benchmarks here do not set up: its loop over
chunks of 512 rows is measured.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import packops
from measuring import OURS, Clock, first_line
from process_group import complaint, largest, same_bits, time_left

EAGER, LIGER, LOSS_PARALLEL = "eager, as Megatron", "Liger", "torch loss_parallel"
OF_SHARDS = ("gradient of logits", "gradient of weight")  # each rank's own; all other results are every rank's
# By dimensions. A logit between 8 and 16 that is rounded to bf16 is off by up to 0.03, and so are that row's log-probability, its
# entropy and, relative to its size, a gradient's row that it decides (more, where two parts cancel); a mean of losses is not.
MOST_OFF = (1e-3, 1e-2, 1e-1)
Results = dict[str, Tensor]


@dataclass
class Candidate:
    """``make`` imports what it needs and returns the call that is timed. ``least``: the least time that a call can take, in those
    of the base that it is compared with."""

    make: Callable[[], Callable[[], Results]]
    least: float = 1.0


# ---- measuring ---------------------------------------------------------------------------------------------------------------


def off_by(found: Tensor, exact: Tensor) -> float:
    found, exact = found.float(), exact.float()
    if exact.dim() == 2:
        return ((found - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
    return ((found - exact).abs().max() / exact.square().mean().sqrt()).item()


def wrong(results: Results, exact: Results, facts: dict[str, Any], device: torch.device) -> str:
    """What is wrong with a candidate's results, the same on every rank; ``facts`` gets what was seen."""
    errors = largest([off_by(value, exact[name]) for name, value in results.items()], device)
    facts["off_by"] = dict(zip(results, errors, strict=True))
    unlike = [name for name, value in results.items() if name not in OF_SHARDS and not same_bits(value)]
    facts["same_bits"] = not unlike
    bad = [f"{name} differs between ranks" for name in unlike]
    bad += [f"{name} off by {error:.1e}" for name, error in facts["off_by"].items() if not error <= MOST_OFF[exact[name].dim()]]
    return ", ".join(bad)


def prepare(candidate: Candidate, exact: Results, facts: dict[str, Any], device: torch.device) -> Callable[[], Results] | None:
    """The candidate's call, or None if it cannot be used; the same on every rank. ``facts`` gets what a first call showed."""
    call, results, error = None, {}, ""
    try:
        call = candidate.make()
        results = call()
    except Exception as raised:
        error = first_line(raised)
    if (error := complaint(error)) or (error := wrong(results, exact, facts, device)):
        facts["failed"] = error
        return None
    if device.type == "cuda":
        del results
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        facts["extra_memory"] = int(largest([torch.cuda.max_memory_allocated() - before], device)[0])
    return call


def race(
    candidates: dict[str, Candidate],
    base: tuple[str, Callable[[], Any]],
    exact: Results,
    options: dict[str, Any],
    device: torch.device,
    calls: int = 1,
) -> dict[str, dict[str, Any]]:
    """Facts of every candidate, and of the base, a name and a call. A sample is the mean of so many ``calls``."""
    facts: dict[str, dict[str, Any]] = {base[0]: {}}
    timed = dict([base])
    for name, candidate in candidates.items():
        if not (name.startswith(OURS) or time_left(options["until"], device)):
            facts[name] = {"failed": "no time left"}
            continue
        begin = time.perf_counter()
        if call := prepare(candidate, exact, facts.setdefault(name, {}), device):
            timed[name] = call
        if dist.get_rank() == 0:
            seen = facts[name].get("failed", "ready")
            print(f"{time.perf_counter() - begin:7.1f} s  {name}: {seen}", file=sys.stderr, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    exact.clear()
    clock, order = Clock(device), random.Random(0)  # the same order on every rank
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(options["rounds"] + 1):
        if number > 1 and not time_left(options["until"], device):
            break
        for name in order.sample(list(timed), len(timed)):
            dist.barrier()
            begin = clock.now()
            for _ in range(calls):
                timed[name]()
            milliseconds = clock.milliseconds(begin, clock.now()) / calls
            if number:  # the first round warms up
                samples[name].append(milliseconds)
    for name, values in samples.items():
        facts[name]["samples"] = largest(values, device)
        facts[name]["milliseconds"] = statistics.median(facts[name]["samples"])
    for name in timed.keys() & candidates.keys():
        facts[name][f"of_{base[0]}"] = candidates[name].least * facts[base[0]]["milliseconds"] / facts[name]["milliseconds"]
    return facts


def with_gradients(
    function: Callable[..., Results], inputs: dict[str, Tensor], upstream: Sequence[Tensor] | None = None
) -> Callable[[], Results]:
    """A call of ``function`` of the inputs that has their gradients among its results; ``upstream``: those of its own results."""

    def call() -> Results:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        results = function(*leaves)
        gradients = torch.autograd.grad(list(results.values()), leaves, upstream)
        found = {name: value.detach() for name, value in results.items()}
        return found | {f"gradient of {name}": grad for name, grad in zip(inputs, gradients, strict=True)}

    return call


def without_gradients(function: Callable[..., Results], inputs: dict[str, Tensor]) -> Callable[[], Results]:
    def call() -> Results:
        with torch.no_grad():
            return function(*inputs.values())

    return call


# ---- other implementations ---------------------------------------------------------------------------------------------------


class EagerVocabParallel(torch.autograd.Function):
    """(log-probabilities, entropy or None) as Megatron's unfused code makes them: an fp32 copy of the logits that becomes the
    softmax, and all-reduced statistics. The entropy takes a second copy while it is made."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        x = logits.to(torch.float32, copy=True)
        top = x.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        x -= top[:, None]
        local = labels - dist.get_rank() * x.shape[1]
        elsewhere = (local < 0) | (local >= x.shape[1])
        local = local.masked_fill(elsewhere, 0)
        of_label = x.gather(1, local[:, None])[:, 0].masked_fill(elsewhere, 0)
        dist.all_reduce(of_label)
        softmax = torch.exp(x, out=None if entropy else x)
        total = softmax.sum(-1)
        dist.all_reduce(total)
        softmax /= total[:, None]
        entropies = None
        if entropy:
            mean = x.mul_(softmax).sum(-1)
            dist.all_reduce(mean)
            entropies = total.log() - mean
        ctx.save_for_backward(softmax, local, elsewhere, entropies)
        ctx.dtype = logits.dtype
        return of_label - total.log(), entropies

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor, of_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        softmax, local, elsewhere, entropies = ctx.saved_tensors
        slope = None
        if of_entropy is not None:  # -p (log p + entropy)
            slope = torch.special.entr(softmax).sub_(softmax * entropies[:, None]).mul_(of_entropy[:, None])
        softmax[torch.arange(len(local), device=local.device), local] -= (~elsewhere).float()
        grad = softmax * -of_log_probs[:, None]
        return (grad if slope is None else grad.add_(slope)).to(ctx.dtype), None, None


class ToAllRanks(torch.autograd.Function):
    """Hidden states on their way into a shard of a layer: the gradient is added up over the ranks, in its dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def eager_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return ToAllRanks.apply(hidden) @ weight.t()


def parallel_loss(logits_of: Callable[..., Any], inputs: dict[str, Tensor], labels: Tensor) -> Callable[[], Results]:
    """torch's own: cross entropy of a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = dist.init_device_mesh(labels.device.type, (dist.get_world_size(),))
    places = {"logits": Shard(1), "weight": Shard(0), "hidden": Replicate()}

    def loss(*leaves: Tensor) -> Results:
        on_mesh = [DTensor.from_local(x, mesh, [places[name]]) for name, x in zip(inputs, leaves, strict=True)]
        return {"loss": F.cross_entropy(logits_of(*on_mesh).float(), labels).full_tensor()}

    call = with_gradients(loss, inputs)

    def within() -> Results:
        with loss_parallel():
            return call()

    return within


# ---- what runs on every rank -------------------------------------------------------------------------------------------------


def vocab(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks, rows = dist.get_rank(), dist.get_world_size(), options["rows"]
    torch.manual_seed(0)
    labels = torch.randint(0, options["vocab"], (rows,), device=device)
    torch.manual_seed(1 + rank)
    logits = torch.randn(rows, options["vocab"] // ranks, device=device).bfloat16() * 2
    inputs, target = {"logits": logits}, torch.empty_like(logits)

    def ours(x: Tensor) -> Results:
        return {"loss": packops.vocab_parallel_cross_entropy(x, labels)}

    def eager(x: Tensor) -> Results:
        return {"loss": -EagerVocabParallel.apply(x, labels, False)[0].mean()}

    def liger() -> Callable[[], Results]:
        from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

        loss = LigerVocabParallelCrossEntropy()
        return with_gradients(lambda x: {"loss": loss(x[:, None], labels[:, None], tp_group=dist.group.WORLD).mean()}, inputs)

    candidates = {
        OURS: Candidate(lambda: with_gradients(ours, inputs), least=1.5),
        f"{OURS}, loss only": Candidate(lambda: without_gradients(ours, inputs), least=0.5),
        EAGER: Candidate(lambda: with_gradients(eager, inputs), least=1.5),
    }
    if options["peers"]:
        candidates[LIGER] = Candidate(liger, least=1.5)
        candidates[LOSS_PARALLEL] = Candidate(lambda: parallel_loss(lambda x: x, inputs, labels), least=1.5)
    exact = with_gradients(eager, {"logits": logits.float()})()
    calls = 5 if device.type == "cuda" else 1
    facts = race(candidates, ("copy", lambda: target.copy_(logits)), exact, options, device, calls)
    return {"ranks": ranks, "rows": rows, "vocab": options["vocab"], "parts": {"loss": facts}}


def head(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks, rows, columns = dist.get_rank(), dist.get_world_size(), options["rows"], options["hidden"]
    torch.manual_seed(0)
    labels = torch.randint(0, options["vocab"], (rows,), device=device)
    hidden = torch.randn(rows, columns, device=device).bfloat16()
    upstream = [torch.randn(rows, device=device) for _ in ("log_probs", "entropy")]
    torch.manual_seed(1 + rank)
    weight = torch.randn(options["vocab"] // ranks, columns, device=device).mul_(2 / columns**0.5).bfloat16()
    inputs = {"hidden": hidden, "weight": weight}

    def products() -> Any:
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden

    def loss(h: Tensor, w: Tensor) -> Results:
        return {"loss": packops.vocab_parallel_linear_cross_entropy(h, w, labels)}

    def eager_loss(h: Tensor, w: Tensor) -> Results:
        return {"loss": -EagerVocabParallel.apply(eager_logits(h, w), labels, False)[0].mean()}

    def log_probs(h: Tensor, w: Tensor) -> Results:
        found = packops.vocab_parallel_linear_log_probs(h, w, labels, entropy=True)
        return {"log_probs": found.log_probs, "entropy": found.entropy}

    def eager_log_probs(h: Tensor, w: Tensor) -> Results:
        return dict(zip(("log_probs", "entropy"), EagerVocabParallel.apply(eager_logits(h, w), labels, True), strict=True))

    def liger(entropy: bool) -> Callable[[], Results]:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyTPFunction as Liger

        def loss(h: Tensor, w: Tensor) -> Results:
            return {"loss": Liger.apply(h, w, labels, dist.group.WORLD).mean()}

        def log_probs(h: Tensor, w: Tensor) -> Results:
            losses, entropies = Liger.apply(h, w, labels, dist.group.WORLD, return_entropy=True)
            return {"log_probs": -losses, "entropy": entropies}

        return with_gradients(log_probs, inputs, upstream) if entropy else with_gradients(loss, inputs)

    losses = {
        OURS: Candidate(lambda: with_gradients(loss, inputs)),
        EAGER: Candidate(lambda: with_gradients(eager_loss, inputs)),
    }
    log_probabilities = {
        OURS: Candidate(lambda: with_gradients(log_probs, inputs, upstream)),
        f"{OURS}, no gradient": Candidate(lambda: without_gradients(log_probs, inputs), least=1 / 3),
        EAGER: Candidate(lambda: with_gradients(eager_log_probs, inputs, upstream)),
    }
    if options["peers"]:
        losses[LIGER] = Candidate(lambda: liger(entropy=False))
        losses[LOSS_PARALLEL] = Candidate(lambda: parallel_loss(lambda h, w: h @ w.t(), inputs, labels))
        log_probabilities[LIGER] = Candidate(lambda: liger(entropy=True))

    def part(candidates: dict[str, Candidate], eager: Callable[..., Results], of_results: Sequence[Tensor] | None) -> Any:
        exact = with_gradients(eager, {name: x.float() for name, x in inputs.items()}, of_results)()
        return race(candidates, ("products", products), exact, options, device)

    parts = {"loss": part(losses, eager_loss, None), "log_probs": part(log_probabilities, eager_log_probs, upstream)}
    return {"ranks": ranks, "rows": rows, "hidden": columns, "vocab": options["vocab"], "parts": parts}


# ---- tables ------------------------------------------------------------------------------------------------------------------


def failures(result: dict[str, Any]) -> list[str]:
    """Of our own candidates."""
    every = [item for facts in result["parts"].values() for item in facts.items()]
    return [f"{name}: {fact['failed']}" for name, fact in every if name.startswith(OURS) and "failed" in fact]


def table(result: dict[str, Any], device: str) -> str:
    features = f" of {result['hidden']} features" if "hidden" in result else ""
    lines = [f"{result['rows']} rows{features}, {result['vocab']} classes over {result['ranks']} x {device}, bf16"]
    for part, facts in result["parts"].items():
        base = next(iter(facts))
        lines.append(f"\n{part:24} {'ms':>9} {f'of {base}':>12} {'extra memory':>14} {'off by':>9}   same bits")
        for name, fact in facts.items():
            if "failed" in fact:
                lines.append(f"{name:24} {fact['failed'][:100]}")
                continue
            line = f"{name:24} {fact['milliseconds']:9.3f}"
            if name != base:
                memory = f"{fact['extra_memory'] / 2**20:,.0f} MiB" if "extra_memory" in fact else ""
                line += f" {fact[f'of_{base}']:12.2f} {memory:>14} {max(fact['off_by'].values()):9.1e}   on all ranks"
            lines.append(line)
    return "\n".join(lines)
