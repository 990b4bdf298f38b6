"""RoPE of q and k in every layout, alone and after the norm of heads, against Hugging Face's formula and other kernels.

    packops bench rope                      # everything; about two minutes on an H200
    packops bench rope --only forward       # some cases
    packops bench rope --device cpu --threads 2

Bytes: every head read and written once (in place: its rotated features only), plus table rows and positions. Every result is
checked against an fp64 reference, positions restarting at each document.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import command
import measuring
import packops
import peers
import reporting
from measuring import COPY, DTYPES, OURS, Candidate, Case, Target
from packops import reference

NAME = "rope"
STEM = "rope"
DATA = "q and k from N(0, 1)"
PEERS = {
    "eager": peers.TORCH,
    "torch.compile": peers.TORCH,
    "Liger": peers.LIGER,
    "Unsloth": peers.UNSLOTH,
    "flash-attn": peers.FLASH_ATTENTION,
    "QuACK": peers.QUACK,
}
# (tokens, q heads, k heads, head_dim), and what the forward pass is to reach on an H200
SHAPES: dict[tuple[int, int, int, int], list[Target]] = {
    (4096, 32, 8, 128): [Target("us", 25)],
    (16384, 32, 8, 128): [Target(COPY, 1 / 0.95)],
    (16384, 64, 8, 128): [Target(COPY, 1 / 0.95)],
    (16384, 16, 16, 64): [Target("us", 36)],
    (65536, 32, 8, 128): [Target(COPY, 1 / 0.97)],
}
CPU_SHAPES = [(4096, 32, 8, 128), (4096, 16, 16, 64)]
DOCUMENT = 2048  # tokens
TABLE = 4096  # positions
Pair = tuple[Tensor, ...]


@dataclass
class Problem:
    """Heads of packed documents, their positions, and the rotation they are meant to get."""

    tokens: int
    q_heads: int
    k_heads: int
    dim: int
    dtype: str
    device: str
    rotary: int = 0  # 0: all of the head
    q: list[Tensor] = field(init=False)
    k: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.rotary = self.rotary or self.dim
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.count = measuring.buffers_for(self.bytes(), self.device)
        self.q, self.k = self.heads()
        self.cos, self.sin = packops.rope_table(self.rotary, TABLE, device=self.device)
        token = torch.arange(self.tokens, device=self.device)
        self.document = min(DOCUMENT, self.tokens)
        self.ids = token % self.document
        self.cu_seqlens = self.documents(self.document)

    def heads(self) -> tuple[list[Tensor], list[Tensor]]:
        options: Any = {"dtype": DTYPES[self.dtype], "device": self.device, "generator": self.generator}
        q, k = (
            [torch.randn(self.tokens, heads, self.dim, **options) for _ in range(self.count)]
            for heads in (self.q_heads, self.k_heads)
        )
        return q, k

    @functools.cached_property
    def scratch(self) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.empty_like(x) for x in self.q], [torch.empty_like(x) for x in self.k]

    @functools.cached_property
    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.heads()

    @functools.cached_property
    def gradient_scratch(self) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.empty_like(x) for x in self.q], [torch.empty_like(x) for x in self.k]

    @property
    def line(self) -> str:
        part = f", {self.rotary} rotary" if self.rotary < self.dim else ""
        return f"{self.tokens} x {self.q_heads}/{self.k_heads} x {self.dim}{part} {self.dtype}"

    def documents(self, length: int) -> Tensor:
        ends = torch.arange(0, self.tokens + 1, length, device=self.device, dtype=torch.int32)
        return ends if ends[-1] == self.tokens else torch.cat([ends, ends.new_tensor([self.tokens])])

    def bytes(self, *, inplace: bool = False, passes: float = 1) -> int:
        features = self.rotary if inplace else self.dim
        moved = 2 * self.tokens * (self.q_heads + self.k_heads) * features * DTYPES[self.dtype].itemsize
        return int(passes * moved) + self.tokens * (self.rotary * 4 + 8)

    def candidate(
        self,
        rotate: Callable[[Tensor, Tensor], Any],
        view: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        inplace: bool = False,
        negative: bool = False,
        **expected: Any,
    ) -> Candidate:
        """``rotate(q, k)`` on each buffer in turn, seen through ``view``; ``expected`` are the reference's arguments."""
        q, k = self.scratch if inplace else (self.q, self.k)
        q_views, k_views = [view(x) for x in q], [view(x) for x in k]

        def call(i: int) -> Pair:
            i %= self.count
            result = rotate(q_views[i], k_views[i])
            return (q_views[i], k_views[i]) if result is None else result

        def check(result: Pair) -> str:
            options = {"cos": self.cos, "sin": self.sin, **(expected or {"position_ids": self.ids})}
            sin = -options["sin"] if negative else options["sin"]
            wanted = reference.rope(view(self.q[0]), view(self.k[0]), **{**options, "sin": sin})
            return self.wrong(result, wanted)

        return Candidate(call, check, self.restore if inplace else None)

    def with_gradient(
        self,
        rotate: Callable[..., Any],
        *,
        inplace: bool = False,
        weights: Sequence[Tensor] = (),
        reference: Callable[..., Any] = reference.rope,
    ) -> Candidate:
        """``rotate(q, k, *weights)`` and the gradients of all of these; ``reference`` has the same arguments and a table."""
        q, k = self.scratch if inplace else (self.q, self.k)
        q_grad, k_grad = self.gradient_scratch if inplace else self.gradients  # Liger turns the incoming gradient in place, too

        @torch.enable_grad()
        def call(i: int) -> Pair:
            i %= self.count
            leaves = [x.detach().requires_grad_() for x in (q[i], k[i], *weights)]
            outputs = rotate(*(map(measuring.Overwritable.apply, leaves) if inplace else leaves))
            pairs = zip((q_grad[i], k_grad[i]), outputs, strict=True)
            return torch.autograd.grad(outputs, leaves, [g if g.shape == x.shape else heads_first(g) for g, x in pairs])

        @torch.enable_grad()
        def check(result: Pair) -> str:
            leaves = [x.detach().double().requires_grad_() for x in (self.q[0], self.k[0], *weights)]
            outputs = reference(*leaves, self.cos, self.sin, position_ids=self.ids)
            gradients = [g[0].double() for g in self.gradients]
            return self.wrong(result[:2], torch.autograd.grad(outputs, leaves[:2], gradients))

        return Candidate(call, check, self.restore_gradients if inplace else None)

    def restore(self, i: int) -> None:
        i %= self.count
        for target, source in zip(self.scratch, (self.q, self.k), strict=True):
            target[i].copy_(source[i])

    def restore_gradients(self, i: int) -> None:
        self.restore(i)
        for target, source in zip(self.gradient_scratch, self.gradients, strict=True):
            target[i % self.count].copy_(source[i % self.count])

    def wrong(self, result: Pair, wanted: Pair) -> str:
        """What is wrong with rotated heads beyond rounding, or "". Peers round the table, the products and the sum."""
        for name, found, right in zip("qk", result, wanted, strict=True):
            found = found if found.shape == right.shape else tokens_first(found)
            error = (found.double() - right).abs()
            tolerance = {"bf16": 2**-5, "fp16": 2**-8, "fp32": 2**-18}[self.dtype] * (1 + right.abs())
            bad = (error > tolerance) | found.isnan()
            if bool(bad.any()):
                rows = 100 * bad.flatten(1).any(1).double().mean().item()
                return f"{name} wrong in {rows:.3g} % of tokens, off by up to {error.max().item():.3g}"
        return ""


def heads_first(x: Tensor) -> Tensor:
    """(tokens, heads, dim) as (1, heads, tokens, dim), the view that Hugging Face's models pass on."""
    return x[None].transpose(1, 2)


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[0]


# ---- candidates ------------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """Hugging Face's formula, with its table gathered to (tokens, dim)."""
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Hugging Face's: the mean square in fp32, the weight in the model's dtype."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_eager(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Pair:
    return eager(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def full_tables(problem: Problem) -> Pair:
    """As Hugging Face makes them: both halves alike, in the model's dtype."""
    return tuple(torch.cat([t, t], -1).to(DTYPES[problem.dtype]) for t in (problem.cos, problem.sin))


def ours(problem: Problem, gradient: bool) -> dict[str, Callable[[], Candidate]]:
    rotate = functools.partial(rotated, problem=problem)
    inplace = functools.partial(rotated, problem=problem, inplace=True)
    make = problem.with_gradient if gradient else problem.candidate
    return {OURS: lambda: make(rotate), "packops, in place": lambda: make(inplace, inplace=True)}


def rotated(q: Tensor, k: Tensor, problem: Problem, **options: Any) -> Any:
    return packops.apply_rope(q, k, problem.cos, problem.sin, position_ids=problem.ids, **options)


def peer_candidates(problem: Problem, wanted: dict[str, peers.Peer], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    make = problem.with_gradient if gradient else problem.candidate
    cos, sin = full_tables(problem)
    token_cos, token_sin = cos[problem.ids], sin[problem.ids]
    half_cos, half_sin = (t.to(DTYPES[problem.dtype]) for t in (problem.cos, problem.sin))

    def liger() -> Candidate:
        from liger_kernel.ops.rope import LigerRopeFunction

        # Rotates in place the layout that it is given here.
        return make(
            lambda q, k: LigerRopeFunction.apply(heads_first(q), heads_first(k), token_cos[None], token_sin[None]), inplace=True
        )

    def unsloth() -> Candidate:
        function = peers.unsloth("rope_embedding").fast_rope_embedding
        index = problem.ids.int()
        return make(lambda q, k: function(heads_first(q), heads_first(k), cos, sin, index))

    def of_documents(function: Callable[..., Tensor]) -> Candidate:
        options = {"cu_seqlens": problem.cu_seqlens, "max_seqlen": problem.document}
        return make(lambda q, k: tuple(function(x, half_cos, half_sin, **options) for x in (q, k)))

    def quack() -> Candidate:
        from quack.rotary import apply_rotary_emb

        return of_documents(apply_rotary_emb)

    makers = {
        "eager": lambda: make(lambda q, k: eager(q, k, token_cos, token_sin)),
        "torch.compile": lambda: make(functools.partial(measuring.compiled(eager), cos=token_cos, sin=token_sin)),
        "Liger": liger,
        "Unsloth": unsloth,
        "flash-attn": lambda: of_documents(peers.flash_attention("layers.rotary").apply_rotary_emb),
        "QuACK": quack,
    }
    return {name: maker for name, maker in makers.items() if name in wanted}


def layouts(problem: Problem) -> dict[str, Callable[[], Candidate]]:
    """Where heads lie and positions come from; each is to cost what the plain call costs."""
    raw = torch.ops.packops._rope.default
    p, cos, sin, ids = problem, problem.cos, problem.sin, problem.ids
    batch = 4 if p.tokens % 4 == 0 else 1
    in_batch = ids.view(batch, -1)
    narrow_cos, narrow_sin = cos.to(torch.bfloat16), sin.to(torch.bfloat16)
    gathered = {
        "cos": torch.cat([narrow_cos] * 2, -1)[ids].contiguous(),
        "sin": torch.cat([narrow_sin] * 2, -1)[ids].contiguous(),
        "rotary_dim": p.rotary,
        "per_token_table": True,
    }
    axes = torch.stack([ids, ids // 2, ids // 3])
    half = p.rotary // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    few, many = p.cu_seqlens, p.documents(8)

    def batched(x: Tensor) -> Tensor:
        return x.view(batch, -1, *x.shape[1:])

    def fused_qkv() -> Candidate:
        heads = p.q_heads + 2 * p.k_heads
        qkv = [torch.empty(p.tokens, heads, p.dim, dtype=DTYPES[p.dtype], device=p.device) for _ in range(p.count)]
        slices = [(x[:, : p.q_heads], x[:, p.q_heads : p.q_heads + p.k_heads]) for x in qkv]
        for i, (q, k) in enumerate(slices):
            q.copy_(p.q[i])
            k.copy_(p.k[i])
        candidate = p.candidate(lambda q, k: (q, k))
        candidate.call = lambda i: raw(*slices[i % p.count], cos, sin, ids)
        return candidate

    return {
        "packops": lambda: p.candidate(lambda q, k: raw(q, k, cos, sin, ids)),
        "packops, transposed (backward)": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, ids, transposed=True), negative=True
        ),
        "packops, bf16 table": lambda: p.candidate(
            lambda q, k: raw(q, k, narrow_cos, narrow_sin, ids), cos=narrow_cos, sin=narrow_sin, position_ids=ids
        ),
        "packops, table per token": lambda: p.candidate(
            lambda q, k: raw(q, k, gathered["cos"], gathered["sin"], rotary_dim=p.rotary, per_token_table=True), **gathered
        ),
        f"packops, cu_seqlens, {len(few) - 1} documents": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, None, few), cu_seqlens=few
        ),
        f"packops, cu_seqlens, {len(many) - 1} documents": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, None, many), cu_seqlens=many
        ),
        "packops, M-RoPE": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, axes, mrope_section=sections), position_ids=axes, mrope_section=sections
        ),
        "packops, M-RoPE, axes in turn": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, axes, mrope_section=sections, mrope_interleaved=True),
            position_ids=axes,
            mrope_section=sections,
            mrope_interleaved=True,
        ),
        "packops, interleaved": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, ids, interleaved=True), interleaved=True, position_ids=ids
        ),
        "packops, bhsd view of bshd": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, in_batch, layout="bhsd"),
            lambda x: batched(x).transpose(1, 2),
            layout="bhsd",
            position_ids=in_batch,
        ),
        "packops, bhsd contiguous": lambda: p.candidate(
            lambda q, k: raw(q, k, cos, sin, in_batch, layout="bhsd"),
            lambda x: x.view(batch, x.shape[1], -1, x.shape[2]),
            layout="bhsd",
            position_ids=in_batch,
        ),
        "packops, slices of qkv": fused_qkv,
        "packops, in place": lambda: p.candidate(
            lambda q, k: torch.ops.packops._rope_.default(q, k, cos, sin, ids), inplace=True
        ),
    }


# ---- cases -----------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = [tuple(args.shape)] if args.shape else list(SHAPES) if args.device == "cuda" else CPU_SHAPES
    if args.quick:
        shapes = shapes[:2]
    dtypes = [args.dtype] if args.dtype else ["bf16"] if args.device == "cuda" else ["fp32", "bf16"]
    for dtype in dtypes:
        for shape in shapes:
            yield from shape_cases(args, Problem(*shape, dtype, args.device))
        tokens, q_heads, k_heads, dim = shapes[min(1, len(shapes) - 1)] if args.device == "cuda" else shapes[0]
        if not args.quick:
            problem = Problem(tokens, q_heads, k_heads, dim, dtype, args.device)
            limits = [Target(OURS, 1.05)] if args.device == "cuda" else []
            candidates = layouts(problem)
            targets = {name: limits for name in candidates if name != OURS}
            yield Case(f"layouts of packops, {problem.line}", candidates, problem.bytes(), problem.count, targets)
            del problem, candidates
            yield partial_case(args, tokens, max(2, q_heads // 2), max(1, k_heads // 2), 2 * dim, dim // 2, dtype)
        problem = Problem(tokens, q_heads, k_heads, dim, dtype, args.device)
        for gradient in (False, True):
            yield norm_case(args, problem, gradient)
        del problem
    yield host_case(args)


def shape_cases(args: argparse.Namespace, problem: Problem) -> Iterator[Case]:
    shape = (problem.tokens, problem.q_heads, problem.k_heads, problem.dim)
    on_h200 = args.device == "cuda" and "H200" in torch.cuda.get_device_name()
    forward = [Target("eager", 1 / 2)] if args.device == "cpu" else SHAPES.get(shape, [])
    forward = [target for target in forward if target.against != "us" or on_h200]
    for gradient in (False, True):
        work = "forward + backward" if gradient else "forward"
        candidates = ours(problem, gradient) | peer_candidates(problem, args.peers, gradient)
        targets = [Target("eager", 1 / 2)] if gradient and args.device == "cpu" else [] if gradient else forward
        facts = {"work": work, "shape": "{} x {}/{} x {}".format(*shape), "dtype": problem.dtype}
        moved = problem.bytes(passes=2 if gradient else 1)
        yield Case(f"{work}, {problem.line}", candidates, moved, problem.count, {OURS: targets}, facts)


def partial_case(args: argparse.Namespace, tokens: int, q_heads: int, k_heads: int, dim: int, rotary: int, dtype: str) -> Case:
    """A quarter of each head turns: in place the rest is not even read. A strided copy shows what memory gives for such bytes."""
    problem = Problem(tokens, q_heads, k_heads, dim, dtype, args.device, rotary)
    rotate = functools.partial(rotated, problem=problem)

    def strided_copy(i: int) -> None:
        i %= problem.count
        for sources, targets in zip((problem.q, problem.k), problem.scratch, strict=True):
            source, target = sources[i], targets[i]
            words = [x.view(torch.complex128) for x in (source, target)]  # 16 bytes
            width = words[0].shape[-1] * rotary // dim
            words[1][..., :width].copy_(words[0][..., :width])

    candidates = {
        OURS: lambda: problem.candidate(functools.partial(rotate, inplace=True), inplace=True),
        "packops, out of place": lambda: problem.candidate(rotate),
        "strided copy": lambda: Candidate(strided_copy),
    }
    return Case(f"in place, {problem.line}", candidates, problem.bytes(inplace=True), problem.count)


def norm_case(args: argparse.Namespace, problem: Problem, gradient: bool) -> Case:
    """RMS norm of each head, then RoPE, as in Qwen3 and Gemma 3; the gradient is that of the weights, too."""
    p, eps = problem, 1e-6
    weights = [torch.rand(p.dim, device=p.device, generator=p.generator).to(DTYPES[p.dtype]) for _ in range(2)]
    cos, sin = full_tables(p)
    token_cos, token_sin = cos[p.ids], sin[p.ids]
    expected = functools.partial(reference.qk_norm_rope, eps=eps)

    def make(rotate: Callable[..., Any]) -> Candidate:
        if gradient:
            return p.with_gradient(rotate, weights=weights, reference=expected)
        candidate = p.candidate(lambda q, k: rotate(q, k, *weights))
        candidate.check = lambda result: p.wrong(result, expected(p.q[0], p.k[0], *weights, p.cos, p.sin, position_ids=p.ids))
        return candidate

    def fused(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
        return packops.apply_qk_norm_rope(q, k, q_weight, k_weight, p.cos, p.sin, eps=eps, position_ids=p.ids)

    def unsloth() -> Candidate:
        function = peers.unsloth("qk_norm_rope").fast_qk_norm_rope
        index = p.ids.int()

        def rotate(q: Tensor, k: Tensor, *weights: Tensor) -> Any:
            norms = [SimpleNamespace(weight=weight, variance_epsilon=eps) for weight in weights]
            return function(*norms, q[None], k[None], cos, sin, index)

        return make(rotate)

    formula = functools.partial(norm_eager, cos=token_cos, sin=token_sin, eps=eps)
    makers = {
        "eager": lambda: make(formula),
        "torch.compile": lambda: make(functools.partial(measuring.compiled(norm_eager), cos=token_cos, sin=token_sin, eps=eps)),
        "Unsloth": unsloth,
    }
    candidates = {OURS: lambda: make(fused)} | {name: maker for name, maker in makers.items() if name in args.peers}
    targets = {OURS: [Target(COPY, 1 / 0.85)]} if args.device == "cuda" and not gradient else {}
    work = "norm + RoPE, forward + backward" if gradient else "norm + RoPE, forward"
    moved = p.bytes(passes=2.5 if gradient else 1)  # backward reads the gradients and the heads
    return Case(f"{work}, {p.line}", candidates, moved, p.count, targets, {"work": work, "dtype": p.dtype})


def host_case(args: argparse.Namespace) -> Case:
    """What a call costs where the arithmetic costs nothing: one token."""
    problem = Problem(1, 4, 1, 64, "bf16", args.device)
    tables = (problem.cos, problem.sin)
    rotate = functools.partial(rotated, problem=problem)
    inplace = functools.partial(rotate, inplace=True)
    cos, sin = (t[problem.ids] for t in full_tables(problem))
    candidates = {
        OURS: lambda: problem.candidate(rotate),
        "packops, in place": lambda: problem.candidate(inplace, inplace=True),
        "packops, forward + backward": lambda: problem.with_gradient(rotate),
        "torch.ops.packops": lambda: problem.candidate(lambda q, k: torch.ops.packops.rope(q, k, *tables, problem.ids)),
        "torch.ops.packops, raw": lambda: problem.candidate(
            lambda q, k: torch.ops.packops._rope.default(q, k, *tables, problem.ids)
        ),
        "eager": lambda: problem.candidate(lambda q, k: eager(q, k, cos, sin)),
    }
    targets = {OURS: [Target("us", 15)]} if args.device == "cuda" else {}
    return Case("host time of a call, 1 x 4/1 x 64 bf16", candidates, targets=targets, facts={"work": "host"}, host=True)


def draw(data: dict[str, Any], path: Path) -> None:
    """The forward pass of each shape and, where there are few, forward + backward; bars of time, the copy among them."""
    shapes = [case for case in data["cases"] if case["facts"].get("work") == "forward"]
    works = ("forward",) if len(shapes) > 4 else ("forward", "forward + backward")
    columns = 3 if len(works) == 1 else 2
    reporting.draw_bars(data, path, only=lambda case: case["facts"].get("work") in works, columns=columns)


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on the CPU fp32 and bf16")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("TOKENS", "Q_HEADS", "K_HEADS", "HEAD_DIM"), help="this one only")


if __name__ == "__main__":
    sys.exit(command.main(NAME, STEM, __doc__, cases, peers=PEERS, draw=draw, extend=extend, distribution=DATA))
