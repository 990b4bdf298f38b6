"""Loss and gradient from logits, against eager, torch.compile, Liger, QuACK, flash-attn and Unsloth.

    packops bench cross-entropy                      # everything; about three minutes on an H200
    packops bench cross-entropy --only 128256        # one vocabulary
    packops bench cross-entropy --device cpu --threads 2

Bytes: logits read once (forward), or read once and their gradient written once. Every result is checked against an fp64
reference: the loss over all rows, the gradient on a sample of them. Peers that write the gradient over the logits get the logits
back, untimed, before each call.
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
from measuring import DTYPES, Candidate, Case, Target
from packops import reference

NAME = "cross-entropy"
STEM = "ce_loss"
DATA = "logits from N(0, 1), labels uniform over the vocabulary: the loss of a model that knows nothing"
PEERS = {
    "eager": peers.TORCH,
    "torch.compile": peers.TORCH,
    "Liger": peers.LIGER,
    "QuACK": peers.QUACK,
    "QuACK, in place": peers.QUACK,
    "QuACK, one pass": peers.QUACK,
    "flash-attn": peers.FLASH_ATTENTION,
    "flash-attn, in place": peers.FLASH_ATTENTION,
    "Unsloth": peers.UNSLOTH,
}
ROWS = 8192
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
# Of the time that a copy of as many bytes takes.
FORWARD_LIMIT = {32000: 1 / 0.85, 128256: 1 / 0.95, 151936: 1 / 0.95, 262144: 1 / 0.95}
GRADIENT_LIMIT = {32000: 1.10, 50257: 1.25, 128256: 1.10, 151936: 1.10, 262144: 1.10}
CPU_LIMIT = 1 / 1.5  # of eager
IGNORED = -100
CHECK_ROWS = 128
LossOf = Callable[..., Tensor]  # (logits, labels) -> scalar


@dataclass
class Problem:
    """Logits, labels, and what the loss is meant to be: Σ weight · ℓ over rows, ℓ with the options ``maths``."""

    rows: int
    vocab: int
    dtype: str
    device: str
    gradient: bool
    logits: list[Tensor] = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        bytes_per_call = self.rows * self.vocab * DTYPES[self.dtype].itemsize
        generator = torch.Generator(self.device).manual_seed(0)
        options: Any = {"device": self.device, "generator": generator}
        count = measuring.buffers_for(bytes_per_call, self.device)
        self.logits = [torch.randn(self.rows, self.vocab, dtype=DTYPES[self.dtype], **options) for _ in range(count)]
        self.labels = torch.randint(0, self.vocab, (self.rows,), **options)

    @property
    def bytes(self) -> int:
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize * (2 if self.gradient else 1)

    @functools.cached_property
    def scratch(self) -> list[Tensor]:
        return [torch.empty_like(x) for x in self.logits]

    def ignoring(self, share: int, *, blocks: bool = False) -> Tensor:
        """Labels of which one in ``share`` stays: every such row, or as prompts and answers, in runs of 64 rows."""
        row = torch.arange(self.rows, device=self.device)
        keep = (row // 64 if blocks else row) % share == 0
        return torch.where(keep, self.labels, IGNORED)

    def candidate(
        self,
        loss_of: LossOf,
        labels: Tensor | None = None,
        *,
        overwrites: bool = False,
        computed: bool = False,
        weight: Tensor | None = None,
        **maths: Any,
    ) -> Candidate:
        """``loss_of(logits, labels)``, and the gradient if the problem wants one, on each buffer in turn.

        Args:
            overwrites: the call destroys the logits.
            computed: it wants logits that are no leaf.
            weight: (rows,) what each row's loss counts for; None: 1 / counted rows.
        """
        labels = self.labels if labels is None else labels
        if weight is None:
            counted = labels != IGNORED
            weight = counted.double() / counted.sum()
        buffers = self.scratch if overwrites else self.logits

        def forward(i: int) -> tuple[Tensor, ...]:
            return (loss_of(buffers[i % len(buffers)], labels),)

        def forward_and_gradient(i: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaf = buffers[i % len(buffers)].detach().requires_grad_()
                loss = loss_of(measuring.Overwritable.apply(leaf) if computed else leaf, labels)
                return loss, *torch.autograd.grad(loss, leaf)

        return Candidate(
            forward_and_gradient if self.gradient else forward,
            check=lambda result: self.wrong(result, labels, weight, maths),
            restore=(lambda i: buffers[i].copy_(self.logits[i])) if overwrites else None,
        )

    def reference(self, labels: Tensor, weight: Tensor, maths: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the first buffer, some of its rows, and their gradient; fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        step = max(1, (1 << 27) // self.vocab)
        for begin in range(0, self.rows, step):
            part = slice(begin, begin + step)
            losses = reference.cross_entropy(self.logits[0][part], labels[part], reduction="none", **maths)
            total += (losses * weight[part]).sum()
        spread = torch.arange(0, self.rows, max(1, self.rows // CHECK_ROWS), device=self.device)
        some = torch.cat([spread, torch.tensor([self.rows - 1], device=self.device)]).unique()
        with torch.enable_grad():
            leaf = self.logits[0][some].double().requires_grad_()
            losses = reference.cross_entropy(leaf, labels[some], reduction="none", **maths)
            (gradient,) = torch.autograd.grad((losses * weight[some]).sum(), leaf)
        return total, some, gradient

    def wrong(self, result: tuple[Tensor, ...], labels: Tensor, weight: Tensor, maths: dict[str, Any]) -> str:
        """What is wrong with a result beyond rounding, or ""."""
        expected, some, gradient = self.reference(labels, weight, maths)
        loss = result[0].double()
        tolerance = 1e-2 if result[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not bool((loss - expected).abs() <= tolerance * expected.abs()):
            return f"loss {loss.item():.6g} instead of {expected.item():.6g}"
        if not self.gradient:
            return ""
        found = result[1][some].double()
        # Rounding to the gradient's dtype, twice where a peer scales what it has rounded; fp16's smallest step.
        relative = {"bf16": 2**-6, "fp16": 2**-9, "fp32": 2**-14}[self.dtype]
        absolute = 1e-6 * weight.max() + (6e-8 if self.dtype == "fp16" else 0)
        off = (found - gradient).abs() > relative * gradient.abs() + absolute
        if bool((off | found.isnan()).any()):
            share = (off | found.isnan()).any(1).double().mean().item()
            return f"gradient wrong in {100 * share:.3g} % of rows, off by up to {(found - gradient).abs().max().item():.3g}"
        return ""


# ---- candidates ------------------------------------------------------------------------------------------------------------


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def eager_num_items(logits: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_items


def peer_candidates(
    problem: Problem, wanted: dict[str, peers.Peer], labels: Tensor | None = None, num_items: Tensor | None = None
) -> dict[str, Callable[[], Candidate]]:
    """Every peer on a problem: the mean over counted labels or, as trainers do it, the sum divided by ``num_items``."""
    candidate = functools.partial(problem.candidate, labels=labels)

    def scaled(mean: LossOf, total: LossOf) -> LossOf:
        return mean if num_items is None else lambda x, y: total(x, y) / num_items

    def torch_eager() -> Candidate:
        return candidate(eager if num_items is None else functools.partial(eager_num_items, num_items=num_items))

    def torch_compile() -> Candidate:
        function = measuring.compiled(eager if num_items is None else eager_num_items)
        return candidate(function if num_items is None else functools.partial(function, num_items=num_items))

    def liger() -> Candidate:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # The gradient is written over the logits in the forward pass.
        return candidate(
            scaled(liger_cross_entropy, functools.partial(liger_cross_entropy, reduction="sum")), overwrites=problem.gradient
        )

    def quack(inplace: bool) -> Candidate:
        from quack.cross_entropy import cross_entropy

        loss = functools.partial(cross_entropy, inplace_backward=inplace)
        return candidate(scaled(loss, functools.partial(loss, reduction="sum")), overwrites=inplace)

    def quack_one_pass() -> Candidate:
        """What its linear cross entropy is made of: the gradient of the sum, from the forward pass. Not differentiable itself."""
        from quack.cross_entropy import cross_entropy_fwd

        counted = (labels if labels is not None else problem.labels) != IGNORED
        one = candidate(eager, weight=counted.double())

        def call(i: int) -> tuple[Tensor, ...]:
            losses, gradient = cross_entropy_fwd(problem.logits[i], problem.labels if labels is None else labels, return_dx=True)
            return losses.sum(), gradient

        one.call = call
        return one

    def flash_attention(inplace: bool) -> Candidate:
        function = peers.flash_attention("ops.triton.cross_entropy").cross_entropy_loss

        def total(x: Tensor, y: Tensor) -> Tensor:
            return function(x, y, inplace_backward=inplace)[0].sum()

        return candidate(scaled(lambda x, y: total(x, y) / (y != IGNORED).sum(), total), overwrites=inplace)

    def unsloth() -> Candidate:
        function = peers.unsloth("cross_entropy_loss").fast_cross_entropy_loss
        return candidate(lambda x, y: function(x[None], y[None], n_items=num_items), overwrites=problem.gradient)

    makers: dict[str, Callable[[], Candidate]] = {"eager": torch_eager, "torch.compile": torch_compile}
    cuda: dict[str, Callable[[], Candidate]] = {
        "Liger": liger,
        "QuACK": lambda: quack(False),
        "flash-attn": lambda: flash_attention(False),
        "Unsloth": unsloth,
    }
    if problem.gradient:
        cuda |= {"QuACK, in place": lambda: quack(True), "flash-attn, in place": lambda: flash_attention(True)}
        if num_items is None:
            cuda["QuACK, one pass"] = quack_one_pass
    return {name: make for name, make in (makers | cuda).items() if name in wanted}


def ours(problem: Problem, labels: Tensor | None = None, num_items: Tensor | None = None) -> dict[str, Callable[[], Candidate]]:
    loss = functools.partial(packops.cross_entropy, num_items=num_items)
    found = {"packops": lambda: problem.candidate(loss, labels)}
    if problem.gradient:
        inplace = functools.partial(loss, inplace=True)
        found["packops, in place"] = lambda: problem.candidate(inplace, labels, overwrites=True, computed=True)
    return found


def variants(problem: Problem) -> dict[str, Callable[[], Candidate]]:
    """Options of our loss beside its plain mean."""
    rows, device = problem.rows, problem.device
    half, blocks, tenth = problem.ignoring(2), problem.ignoring(2, blocks=True), problem.ignoring(10, blocks=True)
    token_weight = torch.rand(rows, device=device)
    lengths = torch.tensor([1, 3] * 4, device=device) * (rows // 16)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, rows % 16))[:9].int()
    cu_seqlens[-1] = rows
    lengths = cu_seqlens.diff()
    even = torch.full((rows,), 1 / rows, dtype=torch.float64, device=device)
    per_document = torch.repeat_interleave(1 / (len(lengths) * lengths.double()), lengths)
    items = torch.tensor(3 * rows, device=device)

    def with_options(labels: Tensor | None = None, weight: Tensor | None = None, maths: Any = None, **options: Any) -> Any:
        loss = functools.partial(packops.cross_entropy, **options, **(maths or {}))
        return lambda: problem.candidate(loss, labels, weight=weight, **(maths or {}))

    return {
        "packops": with_options(),
        "packops, half ignored": with_options(half),
        "packops, half ignored in runs": with_options(blocks),
        "packops, 90 % ignored": with_options(tenth),
        "packops, num_items": with_options(num_items=items, weight=even / 3),
        "packops, token_weight": with_options(
            token_weight=token_weight, weight=token_weight.double() / token_weight.double().sum()
        ),
        "packops, mean of documents": with_options(cu_seqlens=cu_seqlens, reduction="seq-mean-token-mean", weight=per_document),
        "packops, label_smoothing": with_options(maths={"label_smoothing": 0.1}),
        "packops, z_loss": with_options(maths={"z_loss": 1e-4}),
        "packops, softcap": with_options(maths={"softcap": 30.0}),
    }


VARIANT_LIMITS = {
    "packops, half ignored": 0.80,
    "packops, half ignored in runs": 0.80,
    "packops, num_items": 1.03,
    "packops, token_weight": 1.03,
    "packops, mean of documents": 1.03,
    "packops, label_smoothing": 1.05,
    "packops, z_loss": 1.05,
    "packops, softcap": 1.05,
}


# ---- cases -----------------------------------------------------------------------------------------------------------------


def make_case(problem: Problem, title: str, candidates: Any, targets: Any = None) -> Case:
    shape = f"{problem.rows} x {problem.vocab} {problem.dtype}"
    facts = {"rows": problem.rows, "vocab": problem.vocab, "dtype": problem.dtype, "work": title}
    return Case(f"{title}, {shape}", candidates, problem.bytes, len(problem.logits), targets or {}, facts)


FORWARD, GRADIENT = "forward", "loss + gradient"
TRAINER = "loss + gradient, half ignored in runs, sum / num_items"
OPTIONS = "options of packops, loss + gradient"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    make = functools.partial(Problem, device=args.device)
    yield from (cpu_cases if args.device == "cpu" else cuda_cases)(args, make)
    yield host_case(args)


def plain(problem: Problem, args: argparse.Namespace, targets: list[Target]) -> Case:
    title = GRADIENT if problem.gradient else FORWARD
    return make_case(problem, title, ours(problem) | peer_candidates(problem, args.peers), {"packops": targets})


def trainer(problem: Problem, args: argparse.Namespace) -> Case:
    labels = problem.ignoring(2, blocks=True)
    items = (labels != IGNORED).sum()
    candidates = ours(problem, labels, items) | peer_candidates(problem, args.peers, labels, items)
    return make_case(problem, TRAINER, candidates)


def cuda_cases(args: argparse.Namespace, make: Callable[..., Problem]) -> Iterator[Case]:
    rows = args.rows or ROWS
    for vocab in args.vocabularies or (VOCABULARIES[2:3] if args.quick else VOCABULARIES):
        problem = make(rows, vocab, "bf16", gradient=False)
        yield plain(problem, args, [Target(measuring.COPY, FORWARD_LIMIT[vocab])] if vocab in FORWARD_LIMIT else [])
        problem.gradient = True
        yield plain(problem, args, [Target(measuring.COPY, GRADIENT_LIMIT[vocab])] if vocab in GRADIENT_LIMIT else [])
        limits = {name: [Target(measuring.OURS, limit)] for name, limit in VARIANT_LIMITS.items()}
        yield make_case(problem, OPTIONS, variants(problem), limits)
        if vocab == 128256:
            yield trainer(problem, args)
        del problem
    yield plain(make(512, 32000, "bf16", gradient=True), args, [Target("torch.compile", 1.0)])
    if not args.quick:
        yield plain(make(rows // 2, 128256, "fp32", gradient=True), args, [])
        yield plain(make(rows, 32000, "fp16", gradient=True), args, [])


def cpu_cases(args: argparse.Namespace, make: Callable[..., Problem]) -> Iterator[Case]:
    shapes = [(512, 32000), (256, 128256)]
    if args.rows or args.vocabularies:
        shapes = [(args.rows or 256, vocab) for vocab in args.vocabularies or VOCABULARIES[:1]]
    for rows, vocab in shapes[: 1 if args.quick else None]:
        for dtype in ("fp32", "bf16"):
            problem = make(rows, vocab, dtype, gradient=False)
            row = torch.arange(rows)
            problem.labels = torch.where(row % 4 == 3, IGNORED, problem.labels)  # a quarter is ignored
            yield plain(problem, args, [])
            problem.gradient = True
            yield plain(problem, args, [Target("eager", CPU_LIMIT)])
            del problem


def host_case(args: argparse.Namespace) -> Case:
    """What a call costs where the arithmetic costs nothing."""
    problem = Problem(8, 64, "bf16", args.device, gradient=True)
    forward = Problem(8, 64, "bf16", args.device, gradient=False)
    candidates = {
        "packops": lambda: problem.candidate(packops.cross_entropy),
        "packops, no gradient": lambda: forward.candidate(packops.cross_entropy),
        "torch.ops.packops": lambda: problem.candidate(torch.ops.packops.cross_entropy),
        "eager": lambda: problem.candidate(eager),
    }
    return Case("host time of a call, 8 x 64 bf16", candidates, host=True, facts={"work": "host"})


# ---- picture ---------------------------------------------------------------------------------------------------------------


def draw(data: dict[str, Any], path: Path) -> None:
    """Over the vocabularies where there are several; else one panel of bars for each case with a gradient."""
    sweep = [case for case in data["cases"] if case["facts"].get("dtype") == "bf16" and case["facts"].get("rows") == ROWS]
    if len({case["facts"]["vocab"] for case in sweep}) < 3:
        reporting.draw_bars(data, path, only=lambda case: case["facts"].get("work") in (FORWARD, GRADIENT), columns=2)
        return
    plot = reporting.pyplot()
    figure, axes = plot.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    libraries = dict.fromkeys(command.base(row["system"]) for case in sweep for row in case["rows"])  # in order
    for axis, work in zip(axes, (FORWARD, GRADIENT), strict=True):
        found = sorted((case for case in sweep if case["facts"]["work"] == work), key=lambda case: case["facts"]["vocab"])
        places = {case["facts"]["vocab"]: place for place, case in enumerate(found)}
        lines: dict[str, list[tuple[int, float]]] = {}
        for case in found:
            for row in case["rows"]:
                if measuring.COPY in row["of"] and not row.get("wrong"):
                    lines.setdefault(row["system"], []).append((places[case["facts"]["vocab"]], row["of"][measuring.COPY]))
        for system, points in lines.items():
            library = command.base(system)
            number = list(libraries).index(library)
            axis.plot(
                *zip(*points, strict=True),
                marker="osv^D<>p"[number % 8],
                color=reporting.COLOURS[measuring.OURS] if library == measuring.OURS else f"C{number}",
                linestyle={"in place": "--", "one pass": ":"}.get(system.partition(", ")[2], "-"),
                linewidth=2.6 if system == measuring.OURS else 1.2,
                markersize=4,
                label=system,
            )
        axis.axhline(1, color="#667", linewidth=0.8)
        axis.set_xticks(list(places.values()), [f"{vocab}" for vocab in places])
        axis.set(xlabel="vocabulary", yscale="log", title=f"{work}, {ROWS} rows, bf16")
        axis.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time / time to copy as many bytes")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    reporting.finish(figure, data, path)


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, help=f"rows of logits (default {ROWS})")
    parser.add_argument("--vocabularies", type=int, nargs="+", metavar="V", help="default: " + " ".join(map(str, VOCABULARIES)))


if __name__ == "__main__":
    sys.exit(command.main(NAME, STEM, __doc__, cases, peers=PEERS, draw=draw, extend=extend, distribution=DATA))
