"""lm_head and loss with both gradients, against eager, torch.compile, Liger, Apple CCE, QuACK and torch's own loop.

    packops bench linear-cross-entropy                          # everything; about four minutes on an H200
    packops bench linear-cross-entropy --shape 8192 4096 128256 # tokens, hidden size, vocabulary
    packops bench linear-cross-entropy --chunks 1024 2048 4096  # ours with these chunks too
    packops bench linear-cross-entropy --device cpu --threads 2

`three products` is the bound: hidden @ weight.T, and the two products of its backward, as three calls on all tokens at once, in
the inputs' dtype, and no loss. QuACK has two rows: `scaled exp` is what it takes by itself on Hopper, and its older loop over
chunks is not tuned. Liger's SM90 function keeps all logits, and takes vocabularies that 256 divides. Peak memory is what a call
allocates at most at once, its gradients included. Errors are root mean square errors of a sample of the gradients' rows against
fp64, relative to their size.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import command
import measuring
import packops
import peers
import reporting
from measuring import Candidate, Case, Target
from packops.ops.lm_head import choose_chunk_tokens

NAME = "linear-cross-entropy"
STEM = "linear_ce_loss"
DATA = "hidden states from N(0, 1), the weight such that logits are from N(0, 4), labels uniform over the vocabulary"
PEERS = {
    "eager": peers.TORCH,
    "torch.compile": peers.TORCH,
    "torch linear_cross_entropy": peers.TORCH,
    "Liger": peers.LIGER,
    "Liger, SM90": peers.LIGER,
    "Apple CCE": peers.APPLE_CCE,
    "QuACK, scaled exp": peers.QUACK,
    "QuACK, chunk loop": peers.QUACK,
}
SHAPES = ((8192, 4096, 128256), (8192, 2304, 256000), (16384, 896, 151936), (4096, 4096, 128256))
CPU_SHAPES = ((1024, 512, 32000),)
PRODUCTS = "three products"
HALF = "packops, half ignored, num_valid"
IGNORED = -100
CHECK_ROWS = 64
WORST = 0.03  # relative error of a gradient that is still called right; bf16 rounds by 0.002
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, labels) -> scalar


@dataclass
class Problem:
    tokens: int
    hidden_size: int
    vocab: int
    dtype: str
    device: str
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by candidate

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}
        dtype = DTYPES[self.dtype]
        self.hidden = torch.randn(self.tokens, self.hidden_size, dtype=dtype, **options)
        self.weight = torch.randn(self.vocab, self.hidden_size, dtype=dtype, **options).mul_(2 / self.hidden_size**0.5)
        self.labels = torch.randint(0, self.vocab, (self.tokens,), **options)

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * DTYPES[self.dtype].itemsize

    @functools.cached_property
    def half(self) -> Tensor:
        """The labels, every second of them ignored."""
        return torch.where(torch.arange(self.tokens, device=self.device) % 2 == 0, self.labels, IGNORED)

    def candidate(self, name: str, loss_of: LossOf, labels: Tensor | None = None, gradient: bool = True) -> Candidate:
        """``loss_of(hidden, weight, labels)`` and both gradients; its errors are written down under its name."""
        labels = self.labels if labels is None else labels

        def call(i: int) -> tuple[Tensor, ...]:
            if not gradient:
                return (loss_of(self.hidden, self.weight, labels),)
            with torch.enable_grad():
                hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
                loss = loss_of(hidden, weight, labels)
                return loss, *torch.autograd.grad(loss, (hidden, weight))

        return Candidate(call, check=lambda result: self.wrong(name, result, labels))

    @functools.cached_property
    def samples(self) -> tuple[Tensor, Tensor]:
        """The rows of both gradients that are checked; the classes among them that are labels have larger ones."""
        rows = torch.arange(0, self.tokens, max(1, self.tokens // CHECK_ROWS), device=self.device)
        spread = torch.arange(0, self.vocab, max(1, self.vocab // CHECK_ROWS), device=self.device)
        return rows, torch.cat([spread, self.labels[rows]]).unique()

    @functools.cached_property
    def softmax(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row its lse and the sampled classes' probabilities, and the losses, in fp64."""
        weight = self.weight.double()
        lse, p, losses = [], [], []
        step = max(1, (1 << 27) // self.vocab)
        for begin in range(0, self.tokens, step):
            x = self.hidden[begin : begin + step].double() @ weight.t()
            lse.append(x.logsumexp(1))
            p.append((x[:, self.samples[1]] - lse[-1][:, None]).exp())
            losses.append(lse[-1] - x.gather(1, self.labels[begin : begin + step, None])[:, 0])
        return torch.cat(lse), torch.cat(p), torch.cat(losses)

    def reference(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss and the sampled rows of both gradients, fp64."""
        rows, classes = self.samples
        lse, p, losses = self.softmax
        scale = (labels != IGNORED).double() / (labels != IGNORED).sum()
        weight = self.weight.double()
        x = (self.hidden[rows].double() @ weight.t() - lse[rows, None]).exp()
        x[torch.arange(len(rows), device=x.device), self.labels[rows]] -= 1
        grad_hidden = (x * scale[rows, None]) @ weight
        grad_logits = (p - (self.labels[:, None] == classes).double()) * scale[:, None]
        return (losses * scale).sum(), grad_hidden, grad_logits.t() @ self.hidden.double()

    def wrong(self, name: str, result: tuple[Tensor, ...], labels: Tensor) -> str:
        expected, *gradients = self.reference(labels)
        loss = result[0].double()
        tolerance = 1e-2 if result[0].dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not bool((loss - expected).abs() <= tolerance * expected.abs()):
            return f"loss {loss.item():.6g} instead of {expected.item():.6g}"
        found = {"loss": ((loss - expected) / expected).abs().item()}
        for which, grad, exact, rows in zip(("hidden", "weight"), result[1:], gradients, self.samples, strict=False):
            found[which] = ((grad[rows].double() - exact).square().mean() / exact.square().mean()).sqrt().item()
        if len(result) > 1:
            self.errors[name] = found
        bad = [f"gradient of {key} off by {100 * e:.3g} %" for key, e in found.items() if not e <= WORST]
        return ", ".join(bad)


# ---- candidates ------------------------------------------------------------------------------------------------------------


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORED)


def torch_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ModuleNotFoundError("torch has no linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, labels)


def peer_candidates(problem: Problem, wanted: dict[str, peers.Peer]) -> dict[str, Callable[[], Candidate]]:
    def liger() -> LossOf:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

        return lambda hidden, weight, labels: loss(hidden, weight, labels)

    def apple() -> LossOf:
        from cut_cross_entropy import linear_cross_entropy as loss

        return lambda hidden, weight, labels: loss(hidden, weight, labels, impl="cce")

    def liger_sm90() -> LossOf:  # with all logits in memory
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import LigerFusedLinearCrossEntropySM90Function as Loss

        return lambda hidden, weight, labels: Loss.apply(hidden, weight, labels)

    def quack(scaled_exp: bool) -> LossOf:  # scaled exp is what it takes by itself on Hopper; to tune the loop takes minutes
        loss = peers.quack_linear_cross_entropy().chunked_linear_cross_entropy
        return lambda hidden, weight, labels: loss(hidden, weight, labels, use_scaled_exp=scaled_exp, tuned=False)

    makers: dict[str, Callable[[], LossOf]] = {
        "eager": lambda: eager,
        "torch.compile": lambda: measuring.compiled(eager),
        "torch linear_cross_entropy": lambda: torch_linear,
        "Liger": liger,
        "Apple CCE": apple,
        "Liger, SM90": liger_sm90,
        "QuACK, scaled exp": lambda: quack(True),
        "QuACK, chunk loop": lambda: quack(False),
    }
    return {
        name: functools.partial(lambda name, make: problem.candidate(name, make()), name, make)
        for name, make in makers.items()
        if name in wanted
    }


def ours(problem: Problem, chunks: list[int]) -> dict[str, Callable[[], Candidate]]:
    loss = packops.linear_cross_entropy
    valid = int((problem.half != IGNORED).sum())
    losses: dict[str, tuple[LossOf, Tensor | None]] = {
        "packops": (loss, None),
        HALF: (functools.partial(loss, num_valid=valid), problem.half),
        "packops, half ignored": (loss, problem.half),
    }
    if problem.dtype == "bf16":
        losses["packops, bf16 accumulation"] = (functools.partial(loss, accum_dtype=torch.bfloat16), None)
        losses["packops, fp32 logits"] = (functools.partial(loss, logits_dtype=torch.float32), None)
    for chunk in chunks:
        losses[f"packops, chunks of {chunk}"] = (functools.partial(loss, chunk_tokens=chunk), None)
    return {name: functools.partial(problem.candidate, name, *loss_and_labels) for name, loss_and_labels in losses.items()}


def products(problem: Problem, gradient: bool = True) -> Candidate:
    """What no implementation can do without. The logits of the forward stand in for their gradient."""

    def call(i: int) -> tuple[Tensor, ...]:
        logits = problem.hidden @ problem.weight.t()
        return (logits @ problem.weight, logits.t() @ problem.hidden) if gradient else (logits,)

    return Candidate(call)


# ---- cases -----------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[Case]:
    on_cpu = args.device == "cpu"
    shapes = args.shape or (CPU_SHAPES if on_cpu else SHAPES)
    for shape in shapes[: 1 if args.quick else None]:
        for dtype in ("fp32", "bf16") if on_cpu else ("bf16",):
            problem = Problem(*shape, dtype, args.device)
            title = f"{' x '.join(map(str, shape))} {dtype}"
            facts = {
                "tokens": shape[0],
                "hidden_size": shape[1],
                "vocab": shape[2],
                "dtype": dtype,
                "logits_bytes": problem.logits_bytes,
                "chunk_tokens": choose_chunk_tokens(*shape),
                "errors": problem.errors,
            }
            candidates = ours(problem, args.chunks) | {PRODUCTS: lambda problem=problem: products(problem)}
            limits = {"packops": [Target(PRODUCTS, 1.03)], HALF: [Target("packops", 0.60)]}
            candidates |= peer_candidates(problem, args.peers)
            facts["work"] = "gradients"
            yield Case(f"loss + gradients, {title}", candidates, targets={} if on_cpu else limits, facts=facts)
            print(error_table(problem.errors))
            forward: dict[str, Callable[[], Candidate]] = {
                "packops": lambda problem=problem: problem.candidate("packops", packops.linear_cross_entropy, gradient=False),
                "one product": lambda problem=problem: products(problem, gradient=False),
            }
            yield Case(f"loss alone, {title}", forward, facts={**facts, "errors": {}, "work": "forward"})
            del problem, candidates, forward


def error_table(errors: dict[str, dict[str, float]]) -> str:
    width = max(map(len, [*errors, "relative error against fp64"]))
    lines = [f"  {'relative error against fp64':{width}}" + "".join(f"{key:>10}" for key in ("loss", "hidden", "weight"))]
    for name, found in errors.items():
        lines.append(f"  {name:{width}}" + "".join(f"{found[key]:10.2e}" for key in ("loss", "hidden", "weight")))
    return "\n".join(lines)


# ---- picture ---------------------------------------------------------------------------------------------------------------


def draw(data: dict[str, Any], path: Path) -> None:
    """Two shapes beside each other: times above, below what is allocated at most at once where that was measured."""
    found = [case for case in data["cases"] if case["facts"]["work"] == "gradients" and case["rows"]]
    if not found:
        return
    plot = reporting.pyplot()
    with_memory = any("peak_bytes" in row for case in found for row in case["rows"])
    deepest = max(len(case["rows"]) for case in found)
    columns, each = min(2, len(found)), 2 if with_memory else 1
    lines = each * -(-len(found) // columns)
    size = (5 * columns, lines * (1.2 + 0.27 * deepest))
    figure, axes = plot.subplots(lines, columns, figsize=size, constrained_layout=True, squeeze=False)
    if len(found) % columns:
        for axis in axes[-each:, -1]:
            axis.remove()
    for place, case in enumerate(found):
        line, column = each * (place // columns), place % columns
        reporting.bars(axes[line][column], case["rows"], case["name"], *reporting.unit_of(found))
        if with_memory:
            memory(axes[line + 1][column], case)
    reporting.finish(figure, data, path)


def memory(axis: Any, case: dict[str, Any]) -> None:
    rows = sorted((row for row in case["rows"] if "peak_bytes" in row), key=lambda row: -row["peak_bytes"])
    sizes = [row["peak_bytes"] / 2**30 for row in rows]
    axis.barh(range(len(rows)), sizes, color=[reporting.colour(row) for row in rows])
    axis.set_yticks(range(len(rows)), [row["system"] for row in rows])
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0}
    for place, size in enumerate(sizes):
        axis.text(size, place, f" {size:.3g}", va="center", fontsize=8, bbox=white)
    logits = case["facts"]["logits_bytes"] / 2**30
    axis.axvline(logits, color="#667", linewidth=0.8, zorder=0)
    axis.set(xlim=(0, 1.2 * max([*sizes, logits])), xlabel="peak GiB; the line: the logits alone")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("T", "H", "V"), help="may be repeated")
    parser.add_argument("--chunks", type=int, nargs="+", default=[], metavar="C", help="ours with these chunk_tokens too")


def main(arguments: list[str] | None = None) -> int:
    rest: Any = {"draw": draw, "extend": extend, "distribution": DATA, "arguments": arguments}
    return command.main(NAME, STEM, __doc__ or "", cases, peers=PEERS, **rest)


if __name__ == "__main__":
    sys.exit(main())
