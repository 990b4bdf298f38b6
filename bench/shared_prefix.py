"""Documents that share prefixes, packed flat and as a forest: attention alone, and whole training steps.

    packops bench shared-prefix                                # everything: many minutes
    packops bench shared-prefix --only "^step" --peers none    # training steps, packops alone
    packops bench shared-prefix --device cpu                   # tiny shapes; their times say little

A group is a prompt of P tokens and G answers of R tokens each. ``packops`` has the prompt in the row once, ``packops, flat`` once
per answer. FlexAttention, measured at P 4096, R 512, G 16 and with ``--group``, has the row of packops and a mask. All are the
same training: loss and gradients are compared. ``packops, one document`` is attention of one plain document with the tokens of
the shared row, which has more pairs of query and key. The target is packops' time per pair against that of the document.

A training step is forward, backward and one fused AdamW step of a model of the shape of Llama-3.2-1B with random weights in bf16.
Answers are scored, prompts are not. The shared row is one micro-batch. Flat documents are packed by :func:`packops.pack` into
micro-batches of at most ``--tokens`` tokens.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import command
import packops
import peers
import reporting
from measuring import OURS, Candidate, Case, Target, candidate_of
from models import MODELS, configuration
from packops.ops.attention_documents import FLEX_BLOCK

NAME = "shared-prefix"
STEM = "shared_prefix"
DATA = "q, k, v and gradients from N(0, 1); token ids at random"
FLAT = f"{OURS}, flat"
DOCUMENT = f"{OURS}, one document"
FLEX = "FlexAttention"
PEERS = {FLEX: peers.Peer("torch", cuda_only=True)}
# Heads, heads of keys and values, head_dim: those of Llama-3.2-1B and Qwen3-0.6B.
SHAPES = {"cuda": [(32, 8, 64), (16, 8, 128)], "cpu": [(4, 2, 16)]}
PROMPTS = {"cuda": (512, 4096, 16384), "cpu": (96,)}
ANSWERS = {"cuda": (128, 512), "cpu": (24,)}
GROUPS = {"cuda": (2, 8, 16, 64), "cpu": (4,)}
STEPS = {"cuda": ((512, 128, 16), (512, 512, 16), (4096, 128, 16), (4096, 512, 16)), "cpu": ((96, 24, 4),)}
MOST_FLAT = 300_000  # tokens: beyond, the flat row alone takes seconds
PER_PAIR, PER_STEP = 1.15, 1 / 3.5  # targets, at P = 4096, R = 512, G = 16
TARGET_AT = (4096, 512, 16)
# Of the flat loss and gradient: bf16 rounds, siblings that see each other do more.
TOLERANCE = {"loss": 5e-3, "norm of the gradient": 5e-2}


@dataclass(frozen=True)
class Group:
    """A prompt and its answers."""

    prompt: int
    answer: int
    count: int

    def __str__(self) -> str:
        return f"P {self.prompt}, R {self.answer}, G {self.count}"

    @property
    def boundaries(self) -> list[int]:
        """Of the segments: the prompt, and the branches, which begin with its last token."""
        return [0, *itertools.accumulate([self.prompt - 1, *[self.answer + 1] * self.count])]

    @property
    def parents(self) -> list[int]:
        return [-1] + [0] * self.count

    @property
    def tokens(self) -> int:
        return self.boundaries[-1]

    @property
    def flat_tokens(self) -> int:
        return self.count * (self.prompt + self.answer)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, in the shared row."""
        return triangle(self.prompt - 1) + self.count * ((self.answer + 1) * (self.prompt - 1) + triangle(self.answer + 1))

    @property
    def flat_pairs(self) -> int:
        return self.count * triangle(self.prompt + self.answer)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "answers": self.count,
            "tokens": self.tokens,
            "flat_tokens": self.flat_tokens,
            "pairs": self.pairs,
            "flat_pairs": self.flat_pairs,
        }

    def flat_rows(self, device: str) -> Tensor:
        """(flat_tokens,) the row of each token of the flat documents in the shared row."""
        prompt = torch.arange(self.prompt - 1)
        bounds = self.boundaries[1:]
        parts = [torch.cat([prompt, torch.arange(a, b)]) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts).to(device)


def triangle(n: int) -> int:
    return n * (n + 1) // 2


# ---- attention alone -------------------------------------------------------------------------------------------------------


class Attention:
    """Queries, keys and values of a shared row; the flat row's are copies of these."""

    def __init__(self, group: Group, shape: tuple[int, int, int], dtype: torch.dtype, device: str):
        self.group, self.device = group, device
        heads, kv_heads, dim = shape
        options: Any = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
        sizes = [(group.tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
        self.inputs = [torch.randn(size, **options).to(dtype) for size in sizes]
        self.bounds = torch.tensor(group.boundaries, dtype=torch.int32, device=device)
        self.parents = torch.tensor(group.parents, dtype=torch.int32, device=device)
        self.ends = packops.packed_metadata(self.bounds, group.tokens, self.parents)[2]
        self.grad = torch.randn(sizes[0], **options).to(dtype)
        # The gradient of a shared row is the sum of its documents'.
        rows = group.flat_rows(device)
        self.flat_rows = rows
        count = torch.bincount(rows, minlength=group.tokens)
        self.flat_grad_scale = (1 / count.double()).to(device)

    def candidate(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], gradient: bool, flat: bool = False) -> Candidate:
        inputs, grad = self.inputs, self.grad
        if flat:
            inputs = [x[self.flat_rows] for x in inputs]
            grad = (grad.double() * self.flat_grad_scale[:, None, None]).to(grad.dtype)[self.flat_rows]
        return candidate_of(attend, [inputs], [grad], gradient, None if flat else self.wrong)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Of the flat documents: the result in the rows of the shared row, and the sums of the gradients."""
        bounds = flat_bounds(self.group, self.device)
        flat = self.candidate(lambda q, k, v: packops.attention(q, k, v, bounds), True, flat=True)
        result, *gradients = flat.call(0)
        row = torch.zeros_like(self.grad)
        row[self.flat_rows] = result
        sums = [
            torch.zeros(x.shape, device=x.device).index_add_(0, self.flat_rows, g.float())
            for x, g in zip(self.inputs, gradients, strict=True)
        ]
        return row, *sums

    def wrong(self, found: tuple[Tensor, ...]) -> str:
        if self.group.flat_tokens > MOST_FLAT:
            return ""  # nothing to compare with
        for name, x, right in zip(("result", "q", "k", "v"), found, self.expected, strict=False):
            error = float((x.float() - right.float()).norm() / right.float().norm())
            if not error <= 2e-2:
                return f"{name} differs by {100 * error:.3g} % from that of flat documents"
        return ""

    def flex(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ends = self.ends

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        torch._dynamo.reset()
        length = self.group.tokens
        mask = create_block_mask(sees, 1, None, length, length, device=self.device, BLOCK_SIZE=FLEX_BLOCK)
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)  # type: ignore[no-any-return]

        return attend


def flat_bounds(group: Group, device: str) -> Tensor:
    return torch.arange(group.count + 1, dtype=torch.int32, device=device) * (group.prompt + group.answer)


def attention_candidates(problem: Attention, wanted: dict[str, Any], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    group, bounds, parents = problem.group, problem.bounds, problem.parents
    one = torch.tensor([0, group.tokens], dtype=torch.int32, device=problem.device)
    of_flat = flat_bounds(group, problem.device)

    def document() -> Candidate:
        candidate = problem.candidate(lambda q, k, v: packops.attention(q, k, v, one), gradient)
        return Candidate(candidate.call)  # another result

    makers: dict[str, Callable[[], Candidate]] = {
        OURS: lambda: problem.candidate(lambda q, k, v: packops.attention(q, k, v, bounds, parents), gradient),
        DOCUMENT: document,
    }
    if group.flat_tokens <= MOST_FLAT:
        makers[FLAT] = lambda: problem.candidate(lambda q, k, v: packops.attention(q, k, v, of_flat), gradient, flat=True)
    if FLEX in wanted:
        makers[FLEX] = lambda: problem.candidate(problem.flex(), gradient)
    return makers


def with_flex(group: Group, args: argparse.Namespace) -> dict[str, Any]:
    """Peers of a case. Every shape is compiled for itself, which takes longer than all else."""
    return args.peers if args.group or (group.prompt, group.answer, group.count) == TARGET_AT or args.device == "cpu" else {}


# ---- training steps --------------------------------------------------------------------------------------------------------


class Steps:
    """One model, and the same documents put together in two ways."""

    def __init__(self, group: Group, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int, device: str):
        self.group, self.model, self.optimizer, self.device = group, model, optimizer, device
        rng = np.random.default_rng(0)
        vocabulary = model.config.vocab_size  # type: ignore[union-attr]
        prompt = rng.integers(3, vocabulary, group.prompt)
        documents = []
        for number in range(group.count):  # each begins with another token
            ids = np.concatenate([prompt, [3 + number], rng.integers(3, vocabulary, group.answer - 1)])
            documents.append({"input_ids": ids, "labels": np.where(np.arange(len(ids)) < group.prompt, -100, ids)})
        self.count = torch.tensor(float(group.count * group.answer), device=device, dtype=torch.float64)
        shared = packops.PackingCollator(share_prefixes=True, min_shared=1)(documents).to(device)
        assert shared.num_tokens == group.tokens
        plan = packops.pack([len(d["input_ids"]) for d in documents], max(tokens, group.prompt + group.answer), seed=None)
        collate = packops.PackingCollator()
        flat = [collate([documents[i] for i in pack]).to(device) for pack in plan]
        self.batches = {OURS: [shared], FLAT: flat}

    def inputs(self, batch: packops.PackedBatch, **more: Any) -> dict[str, Any]:
        return {**batch.to_hf(), "num_items_in_batch": self.count, **more}

    def candidate(self, name: str, model: nn.Module, inputs: list[dict[str, Any]]) -> Candidate:
        @torch.enable_grad()
        def step(i: int) -> tuple[Tensor, Tensor]:
            total = torch.zeros((), device=self.device)
            for arguments in inputs:
                loss = model(**arguments).loss
                loss.backward()
                total += loss.detach()
            shared = list(self.model.parameters())
            if model is not self.model:
                for own, to in zip(model.parameters(), shared, strict=True):
                    to.grad, own.grad = own.grad, None
            norm = torch.stack(torch._foreach_norm([p.grad for p in shared if p.grad is not None])).float().norm()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return total, norm

        return Candidate(step, None if name == FLAT else self.wrong)

    @functools.cached_property
    def expected(self) -> tuple[float, float]:
        loss, norm = self.candidate(FLAT, self.model, [self.inputs(b) for b in self.batches[FLAT]]).call(0)
        return float(loss), float(norm)

    def wrong(self, found: tuple[Tensor, Tensor]) -> str:
        for (name, most), x, right in zip(TOLERANCE.items(), found, self.expected, strict=True):
            if not abs(float(x) - right) <= most * abs(right):
                return f"{name} {float(x):.6g}, of flat documents {right:.6g}"
        return ""

    def flex(self) -> Candidate:
        """The model of packops, but for its attention."""
        from transformers import AutoModelForCausalLM

        parameters = list(self.model.parameters())
        config = copy.deepcopy(self.model.config)  # type: ignore[union-attr]
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention", dtype=parameters[0].dtype)
        for own, shared in zip(model.parameters(), parameters, strict=True):
            own.data = shared.data
        model = packops.hf.apply(model, attention=None)
        batch = self.batches[OURS][0]
        inputs = self.inputs(batch, attention_mask=batch.block_mask())
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "parents"):
            del inputs[name]
        return self.candidate(FLEX, model, [inputs])

    def candidates(self, wanted: dict[str, Any]) -> dict[str, Callable[[], Candidate]]:
        def make(name: str) -> Candidate:
            return self.candidate(name, self.model, [self.inputs(batch) for batch in self.batches[name]])

        makers = {name: functools.partial(make, name) for name in (OURS, FLAT)}
        return makers | ({FLEX: self.flex} if FLEX in wanted else {})


def make_model(name: str, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tiny = device == "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(name, tiny), dtype=torch.float32 if tiny else torch.bfloat16)
    packops.hf.apply(model, attention="packops_varlen")
    # so small a rate that all rows see about the same weights throughout
    return model, torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True)


# ---- cases -----------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[Case]:
    device = args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    groups = [Group(*sizes) for sizes in itertools.product(PROMPTS[device], ANSWERS[device], GROUPS[device])]
    steps = [Group(*sizes) for sizes in STEPS[device]]
    if args.group:
        groups = steps = [Group(*args.group)]
    if args.quick:
        groups, steps = groups[-1:], steps[-1:]
    if "attention" in args.parts:
        for shape, group in itertools.product(SHAPES[device], groups):
            yield from attention_cases(group, shape, dtype, args)
    if "step" in args.parts and steps:
        model, optimizer = make_model(args.model, device)
        for group in steps:
            targets = {OURS: [Target(FLAT, PER_STEP)]} if (group.prompt, group.answer, group.count) == TARGET_AT else {}
            problem = Steps(group, model, optimizer, args.tokens, device)
            name = f"step, {group}, {MODELS[args.model]} shape"
            facts = {"work": "step", "model": args.model, **group.facts, "micro_batches": len(problem.batches[FLAT])}
            yield Case(name, problem.candidates(with_flex(group, args)), targets=targets, facts=facts)
            del problem


def attention_cases(group: Group, shape: tuple[int, int, int], dtype: torch.dtype, args: argparse.Namespace) -> Iterator[Case]:
    problem = Attention(group, shape, dtype, args.device)
    targets = {}
    if (group.prompt, group.answer, group.count) == TARGET_AT:
        targets = {OURS: [Target(DOCUMENT, PER_PAIR * group.pairs / triangle(group.tokens))]}
    for gradient in (False, True):
        work = "forward + backward" if gradient else "forward"
        heads = "{}/{} x {}".format(*shape)
        yield Case(
            f"{work}, {group}, {heads}",
            attention_candidates(problem, with_flex(group, args), gradient),
            targets=targets,
            facts={"work": work, "shape": heads, **group.facts},
        )


def draw(data: dict[str, Any], path: Path) -> None:
    """Attention: how many times faster than flat packing, by the number of answers. Steps: a bar for each way to train."""
    plot = reporting.pyplot()
    cases = [case for case in data["cases"] if {OURS, FLAT} <= {row["system"] for row in case["rows"]}]
    kinds = list(dict.fromkeys(kind_of(case) for case in cases))
    if not kinds:
        return
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = plot.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        of_kind = [case for case in cases if kind_of(case) == kind]
        if of_kind[0]["facts"]["work"] == "step":
            draw_steps(axis, of_kind)
        else:
            draw_attention(axis, of_kind)
        axis.set_title(kind, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
    reporting.finish(figure, data, path)


def kind_of(case: dict[str, Any]) -> str:
    facts = case["facts"]
    if facts["work"] == "step":
        return f"training steps, {MODELS[facts['model']]} shape"
    return f"attention, {facts['work']}, {facts['shape']}"


def draw_attention(axis: Any, cases: list[dict[str, Any]]) -> None:
    colours = {512: "#9ccbc7", 4096: "#0b7a75", 16384: "#06413e"}
    curves: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for case in cases:
        times, facts = times_of(case), case["facts"]
        curve = curves.setdefault((facts["prompt"], facts["answer"]), [])
        curve.append((facts["answers"], times[FLAT] / times[OURS]))
    answers = sorted({count for curve in curves.values() for count, _ in curve})
    axis.axhline(1, color=reporting.COLOURS["copy"], zorder=0)
    for (prompt, answer), curve in sorted(curves.items(), reverse=True):
        style = "-" if answer == min(size for _, size in curves) else "--"
        colour = colours.get(prompt, reporting.COLOURS[OURS])
        axis.plot(*zip(*sorted(curve), strict=True), style, marker="o", markersize=4, color=colour, label=f"{prompt} + {answer}")
    axis.set(xscale="log", yscale="log", xlabel="answers to one prompt", ylabel="time flat / time shared")
    axis.set_xticks(answers, [str(count) for count in answers])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, place: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    axis.legend(title="prompt + answer, tokens", fontsize=7, title_fontsize=7, frameon=False, loc="upper left", handlelength=3)


def draw_steps(axis: Any, cases: list[dict[str, Any]]) -> None:
    names, values, colours = [], [], []
    for case in cases:
        facts, times = case["facts"], times_of(case)
        for row in case["rows"]:
            where = f"{facts['prompt']} + {facts['answers']} x {facts['answer']}: " if row["system"] == OURS else ""
            names.append(where + row["system"])
            values.append(row["microseconds"] / 1e3)
            colours.append(reporting.colour(row) if row["system"] == OURS else reporting.COLOURS["peer"])
            label = f" {values[-1]:,.0f} ms" + (
                f", {times[FLAT] / times[OURS]:.1f} times as fast" if row["system"] == OURS else ""
            )
            axis.text(values[-1], len(names) - 1, label, va="center", fontsize=8)
    places = range(len(names))
    axis.barh(places, values, color=colours)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.35 * max(values)), xlabel="ms a step (prompt + answers x tokens)")


def times_of(case: dict[str, Any]) -> dict[str, float]:
    return {row["system"]: row["microseconds"] for row in case["rows"]}


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", nargs="+", choices=["attention", "step"], default=["attention", "step"], help="what to measure"
    )
    parser.add_argument(
        "--group", type=int, nargs=3, metavar=("P", "R", "G"), help="this one only: tokens of prompt and answer, answers"
    )
    parser.add_argument("--model", choices=MODELS, default="llama", help="of the training steps")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch of flat documents (default 16384)")


def main(arguments: list[str] | None = None) -> int:
    return command.main(
        NAME, STEM, __doc__ or "", cases, peers=PEERS, draw=draw, extend=extend, distribution=DATA, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
