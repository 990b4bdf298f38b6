"""Attention within packed documents, against FlashAttention-4, the FlashAttention-2 of torch, FlexAttention and SDPA.

    packops bench attention                     # everything
    packops bench attention --only "^forward,"  # some cases
    packops bench attention --shape 16 8 128    # heads, heads of keys and values, head_dim
    packops bench attention --tokens 8192 32768 131072 --corpora mixed
    packops bench attention --device cpu --threads 2

Documents have the lengths of a corpus (``document_lengths.json``; ``short`` and ``long``), at evenly spaced quantiles; a last one
fills the rest. In ``mixed``, half of the tokens are of each. Attention is causal. FLOPs: of the two products of every query with
the keys it sees, and of the five products of the backward; what a kernel computes and masks does not count. Bytes: q, k, v, the
result and the gradients, each read or written once a pass. Every result is checked against an fp64 reference, document by
document and head by head.

SDPA, a call for one document after the other, runs on the CPU only, the others on CUDA only. FlashAttention-4 adds gradients of
queries in whatever order they come; its deterministic form, where there is a backward, is measured beside it. cuDNN's kernels for
documents are left out: their gradients were wrong (docs/design.md).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import command
import measuring
import packops
import peers
import reporting
from corpora import LENGTHS, draw_lengths
from measuring import DTYPES, OURS, Candidate, Case
from packops import reference
from packops.ops.attention_documents import Documents
from packops.ops.attention_paths import Rule, attend_flex, attend_sdpa, attend_varlen

NAME = "attention"
STEM = "attention"
DATA = "k, v and gradients from N(0, 1), q from N(0, 16): scores of standard deviation 4; lengths of a corpus"
VARLEN = "torch varlen_attn"
FLEX = "FlexAttention"
SDPA = "SDPA"
FA4 = "FlashAttention-4"
FA4_DETERMINISTIC = "FlashAttention-4, deterministic"
TORCH_CUDA = peers.Peer("torch")  # what torch can do on CUDA only
PEERS = {
    FA4: peers.FLASH_ATTENTION_4,
    FA4_DETERMINISTIC: peers.FLASH_ATTENTION_4,
    VARLEN: TORCH_CUDA,
    FLEX: TORCH_CUDA,
    SDPA: peers.TORCH,
}
# (heads, heads of keys and values, head_dim), softcap: those of Llama-3.2-1B, Qwen3-0.6B and Gemma-2-2B
SHAPES: list[tuple[tuple[int, int, int], float | None]] = [
    ((32, 8, 64), None),
    ((16, 8, 128), None),
    ((8, 4, 256), None),
    ((8, 4, 256), 50.0),
]
CPU_SHAPES: list[tuple[tuple[int, int, int], float | None]] = [((4, 2, 64), None)]
TOKENS = {"cuda": 16384, "cpu": 512}
# Scores get this standard deviation: weights lie on few keys, as in a trained model, and a softcap of 50 shows in the result.
SCORE_SIZE = 4
CHECK_TOKENS = 2048  # of documents checked together; the reference has scores of all of them and all of them
BLOCK = 64  # tokens, or a few more
# Error of a block of one head that is still called right, relative to its size. Rounding makes up to a third of that, or a
# half where a peer rounds scores, too.
WORST = {"bf16": 2**-5, "fp16": 2**-8, "fp32": 2**-15}
RESULTS = ("result", "gradient of q", "gradient of k", "gradient of v")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> result


def document_lengths(corpus: str, tokens: int) -> list[int]:
    """As end_to_end.py draws them, and a document of the tokens that are left."""
    if corpus == "mixed":
        return document_lengths("long", tokens // 2) + document_lengths("short", tokens - tokens // 2)
    lengths = draw_lengths(json.loads(LENGTHS.read_text())[corpus], tokens, np.random.default_rng(0))
    rest = tokens - sum(lengths)
    return [*lengths, rest] if rest else lengths


def pairs(lengths: list[int]) -> int:
    """Of a query and a key that it sees."""
    return sum(n * (n + 1) // 2 for n in lengths)


@dataclass
class Problem:
    """Queries, keys and values of packed documents, and the gradient of the result."""

    lengths: list[int]
    heads: int
    kv_heads: int
    dim: int
    softcap: float | None
    dtype: str
    device: str
    q: list[Tensor] = field(init=False)
    k: list[Tensor] = field(init=False)
    v: list[Tensor] = field(init=False)
    gradients: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}
        # On the CPU arithmetic takes far longer than memory: more buffers would only make a sample longer.
        self.count = measuring.buffers_for(self.bytes(), self.device) if self.device == "cuda" else 1

        def some(heads: int, size: float = 1) -> list[Tensor]:
            shape = (self.tokens, heads, self.dim)
            return [(size * torch.randn(shape, **options)).to(DTYPES[self.dtype]) for _ in range(self.count)]

        self.q, self.k, self.v = some(self.heads, SCORE_SIZE), some(self.kv_heads), some(self.kv_heads)
        self.gradients = some(self.heads)
        bounds = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)
        self.documents = Documents(bounds, max(self.lengths), self.tokens)
        self.rule = Rule(softcap=self.softcap)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def line(self) -> str:
        cap = "" if self.softcap is None else f", softcap {self.softcap:g}"
        return f"{self.tokens} x {self.heads}/{self.kv_heads} x {self.dim} {self.dtype}{cap}"

    def flops(self, gradient: bool = False) -> int:
        """Two products of 2 * head_dim for every pair of query and key, with the gradients five more."""
        return (7 if gradient else 2) * 2 * self.heads * self.dim * pairs(self.lengths)

    def bytes(self, gradient: bool = False) -> int:
        """q, k, v and the result; in the backward these and its gradient are read, and three gradients written."""
        rows = 2 * (self.heads + self.kv_heads)
        return (3 if gradient else 1) * rows * self.tokens * self.dim * DTYPES[self.dtype].itemsize

    def candidate(self, attend: Attend, gradient: bool = False) -> Candidate:
        inputs = list(zip(self.q, self.k, self.v, strict=True))
        return measuring.candidate_of(attend, inputs, self.gradients, gradient, self.wrong)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """All tokens, whole documents at a time, and where these begin: up to ``CHECK_TOKENS``, or one that is longer."""
        begin, at, bounds = 0, 0, [0]
        for length in self.lengths:
            if bounds[-1] and bounds[-1] + length > CHECK_TOKENS:
                yield slice(begin, at), torch.tensor(bounds, device=self.device)
                begin, bounds = at, [0]
            at += length
            bounds.append(at - begin)
        yield slice(begin, at), torch.tensor(bounds, device=self.device)

    @functools.cached_property
    @torch.enable_grad()
    def reference(self) -> tuple[Tensor, ...]:
        """Of the first buffer, in fp64: the result and the gradients of q, k and v."""
        q, k, v, grad = (x[0] for x in (self.q, self.k, self.v, self.gradients))
        wanted = tuple(torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v))
        for tokens, bounds in self.pieces():
            for head in range(self.heads):  # one at a time: scores are tokens x tokens
                own, shared = slice(head, head + 1), slice(kv := head * self.kv_heads // self.heads, kv + 1)
                places = [(tokens, own), (tokens, shared), (tokens, shared)]
                leaves = [x[at].double().requires_grad_() for x, at in zip((q, k, v), places, strict=True)]
                result = reference.attention(leaves[0], leaves[1], leaves[2], bounds, softcap=self.softcap)
                found = torch.autograd.grad(result, leaves, grad[tokens, own].double())
                for total, at, part in zip(wanted, [places[0], *places], [result.detach(), *found], strict=True):
                    total[at] += part  # query heads share a head of keys and values
        return wanted

    def wrong(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result or gradients beyond rounding, or "".

        Sizes differ by orders of magnitude from a document's first tokens to its last, so errors are taken block by block.
        """
        for name, x, right in zip(RESULTS, found, self.reference, strict=False):
            if x.shape != right.shape:
                return f"{name} of shape {tuple(x.shape)} instead of {tuple(right.shape)}"
            error = norms(x.double() - right) / norms(right)
            bad = ~(error <= WORST[self.dtype])  # NaN is bad
            if bool(bad.any()):
                share, most = bad.double().mean().item(), error.max().item()
                return f"{name} wrong in {100 * share:.3g} % of blocks, off by up to {100 * most:.3g} %"
        return ""


def norms(x: Tensor) -> Tensor:
    """Of every block of tokens and every head. None is short: of a document's only token the gradients of q and k are 0."""
    return torch.stack([part.norm(dim=(0, 2)) for part in x.tensor_split(max(1, len(x) // BLOCK))])


# ---- candidates ------------------------------------------------------------------------------------------------------------


def ours(problem: Problem, gradient: bool) -> dict[str, Callable[[], Candidate]]:
    bounds, softcap = problem.documents.cu_seqlens, problem.softcap
    return {OURS: lambda: problem.candidate(lambda q, k, v: packops.attention(q, k, v, bounds, softcap=softcap), gradient)}


def peer_candidates(problem: Problem, wanted: dict[str, peers.Peer], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    def make(attend: Callable[..., Tensor]) -> Candidate:
        return problem.candidate(lambda q, k, v: attend(q, k, v, problem.documents, problem.rule), gradient)

    def varlen() -> Candidate:
        if problem.softcap is not None:
            raise NotImplementedError("varlen_attn has no softcap")
        return make(attend_varlen)

    def flash_attention_4(deterministic: bool) -> Candidate:
        attend = peers.flash_attention_4().flash_attn_varlen_func
        bounds, longest = problem.documents.cu_seqlens, max(problem.lengths)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = attend(
                q,
                k,
                v,
                cu_seqlens_q=bounds,
                cu_seqlens_k=bounds,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                causal=True,
                softcap=problem.softcap or 0.0,
                deterministic=deterministic,
            )
            return result[0] if isinstance(result, tuple) else result

        return problem.candidate(call, gradient)

    def flex() -> Candidate:
        torch._dynamo.reset()  # else it would be compiled anew for shapes of any size, at the second one
        return make(attend_flex)

    makers = {
        FA4: lambda: flash_attention_4(False),
        FA4_DETERMINISTIC: lambda: flash_attention_4(True),
        VARLEN: varlen,
        FLEX: flex,
        SDPA: lambda: make(attend_sdpa),
    }
    if problem.device == "cuda":
        del makers[SDPA]
    if not gradient:
        del makers[FA4_DETERMINISTIC]
    return {name: maker for name, maker in makers.items() if name in wanted}


# ---- cases -----------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.softcap is not None and not args.shape:
        raise SystemExit("--softcap: only with --shape")
    shapes = SHAPES if args.device == "cuda" else CPU_SHAPES
    if args.shape:
        shapes = [(tuple(args.shape), args.softcap)]
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    for shape, softcap in shapes[: 1 if args.quick else None]:
        for corpus, tokens in itertools.product(args.corpora, args.tokens or [TOKENS[args.device]]):
            lengths = document_lengths(corpus, tokens)
            problem = Problem(lengths, *shape, softcap, dtype, args.device)
            for gradient in (False, True):
                work = "forward + backward" if gradient else "forward"
                count = f"{len(lengths)} {corpus} document{'s' if len(lengths) > 1 else ''}"
                facts = {
                    "work": work,
                    "corpus": corpus,
                    "documents": len(lengths),
                    "longest": max(lengths),
                    "shape": "{} x {}/{} x {}".format(problem.tokens, *shape),
                    "softcap": softcap,
                    "dtype": dtype,
                }
                yield Case(
                    f"{work}, {count}, {problem.line}",
                    ours(problem, gradient) | peer_candidates(problem, args.peers, gradient),
                    problem.bytes(gradient),
                    buffers=problem.count,
                    facts=facts,
                    flops=problem.flops(gradient),
                )
            del problem


def draw(data: dict[str, Any], path: Path) -> None:
    """A panel for the forward and one with the backward: the time of each peer over packops', a line for each case."""
    works = list(dict.fromkeys(case["facts"]["work"] for case in data["cases"] if case["rows"]))
    if not works:
        return
    plot = reporting.pyplot()
    lines = list(dict.fromkeys(label_of(case) for case in data["cases"] if case["rows"]))
    systems = list(dict.fromkeys(row["system"] for _, row in reporting.rows_of(data)))
    peers_drawn = [name for name in systems if name != reporting.COPY and not name.startswith(reporting.OURS)]
    figure, axes = plot.subplots(
        1, len(works), figsize=(5.5 * len(works), 1.6 + 0.3 * len(lines)), sharey=True, constrained_layout=True, squeeze=False
    )
    for axis, work in zip(axes.flat, works, strict=True):
        for number, name in enumerate(peers_drawn):
            points = [
                (row["microseconds"] / reporting.ours_of(case), -lines.index(label_of(case)))
                for case, row in reporting.rows_of(data)
                if case["facts"]["work"] == work and row["system"] == name
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "osD^v"[number % 5], color=f"C{number}", label=name)
        axis.axvline(1, color=reporting.COLOURS[reporting.OURS], linewidth=3, label="packops")
        axis.set(title=work, xlabel="time / time of packops")
        axis.set_yticks([-i for i in range(len(lines))], lines)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(fontsize=8)
    reporting.finish(figure, data, path)


def label_of(case: dict[str, Any]) -> str:
    facts = case["facts"]
    softcap = f", softcap {facts['softcap']:g}" if facts.get("softcap") else ""
    return f"{facts['documents']} {facts['corpus']} documents, {facts['shape']}{softcap}"


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", help="of all documents (default 16384, on the CPU 512)")
    corpora = ["short", "mixed", "long"]
    parser.add_argument("--corpora", nargs="+", choices=corpora, default=corpora, help="lengths of documents")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on the CPU fp32")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("HEADS", "KV_HEADS", "HEAD_DIM"), help="this one only")
    parser.add_argument("--softcap", type=float, help="of the scores, with --shape")


def main(arguments: list[str] | None = None) -> int:
    return command.main(
        NAME, STEM, __doc__ or "", cases, peers=PEERS, draw=draw, extend=extend, distribution=DATA, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
