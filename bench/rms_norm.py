"""RMS norm of rows, forward and with both gradients, against torch's, transformers' formula, torch.compile, Liger, QuACK.

    packops bench rms-norm                      # everything
    packops bench rms-norm --only "^forward,"   # some cases
    packops bench rms-norm --device cpu --threads 2

Bytes: x and the result, in the backward x, the gradient and the gradient of x, each read or written once. Every result is checked
against an fp64 reference.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import command
import measuring
import packops
import peers
import reporting
from measuring import DTYPES, OURS, Candidate, Case
from packops import reference

NAME = "rms-norm"
STEM = "rms_norm"
DATA = "rows, weights and gradients from N(0, 1)"
PEERS = {
    "eager": peers.TORCH,
    "torch": peers.TORCH,
    "torch.compile": peers.Peer("torch"),  # on the CPU compiling takes longer than all the rest
    "Liger": peers.LIGER,
    "QuACK": peers.QUACK,
}
EPS = 1e-6
# rows, columns, whether the factor is 1 + weight: hidden states of Llama-3.2-1B, of Qwen3-0.6B, of 8B models, of
# Gemma-2-2B (twice), of 14B models. 2304 and 5120 are no powers of two.
SHAPES = [(16384, 2048, False), (16384, 1024, False), (16384, 4096, False), (4096, 2304, True), (16384, 2304, True)]
SHAPES += [(8192, 5120, False)]
CPU_SHAPES = [(2048, 1024, False)]
# Error that is still called right, of the largest in its row (of the weight's gradient: of all). Eager code rounds twice.
WORST = {"bf16": 2**-6, "fp16": 2**-9, "fp32": 2**-18}
RESULTS = ("result", "gradient of x", "gradient of weight")
Norm = Callable[[Tensor, Tensor], Tensor]  # (x, weight) -> result


@dataclass
class Problem:
    """Rows, a weight, and the gradient of the result."""

    rows: int
    columns: int
    zero_centered: bool
    dtype: str
    device: str
    x: list[Tensor] = field(init=False)
    gradients: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}
        self.count = measuring.buffers_for(self.bytes(), self.device)

        def some() -> list[Tensor]:
            return [torch.randn(self.rows, self.columns, **options).to(DTYPES[self.dtype]) for _ in range(self.count)]

        self.x, self.gradients = some(), some()
        self.weight = torch.randn(self.columns, **options).to(DTYPES[self.dtype])

    @property
    def line(self) -> str:
        return f"{self.rows} x {self.columns} {self.dtype}" + (", 1 + weight" if self.zero_centered else "")

    def bytes(self, gradient: bool = False) -> int:
        return (5 if gradient else 2) * self.rows * self.columns * DTYPES[self.dtype].itemsize

    def candidate(self, norm: Norm, gradient: bool = False) -> Candidate:
        return measuring.candidate_of(norm, [(x, self.weight) for x in self.x], self.gradients, gradient, self.wrong)

    @functools.cached_property
    @torch.enable_grad()
    def reference(self) -> tuple[Tensor, ...]:
        """Of the first buffer, in fp64."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x[0], self.weight)]
        result = reference.rms_norm(leaves[0], leaves[1], eps=EPS, zero_centered=self.zero_centered)
        return result.detach(), *torch.autograd.grad(result, leaves, self.gradients[0].double())

    def wrong(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result or gradients beyond rounding, or ""."""
        for name, x, right in zip(RESULTS, found, self.reference, strict=False):
            if x.shape != right.shape:
                return f"{name} of shape {tuple(x.shape)} instead of {tuple(right.shape)}"
            error = ((x.double() - right).abs() / right.abs().amax(-1, keepdim=True)).max().item()
            if not error <= WORST[self.dtype]:  # NaN is wrong
                return f"{name} off by up to {100 * error:.3g} % of the largest"
        return ""


def candidates(problem: Problem, wanted: dict[str, peers.Peer], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    one = float(problem.zero_centered)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return packops.rms_norm(x, weight, eps=EPS, zero_centered=problem.zero_centered)

    def eager(x: Tensor, weight: Tensor) -> Tensor:  # as transformers has it, Llama's and Gemma's
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (normed * (1 + weight.float())).to(x.dtype) if problem.zero_centered else weight * normed.to(x.dtype)

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        if problem.zero_centered:  # 1 + weight has more digits than 16 bits hold
            return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), EPS).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, EPS)

    def liger() -> Candidate:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        mode = "gemma" if problem.zero_centered else "llama"
        return problem.candidate(lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, one, mode, False), gradient)

    def quack() -> Candidate:
        from quack.rmsnorm import rmsnorm

        return problem.candidate(lambda x, weight: rmsnorm(x, weight, eps=EPS, weight_offset=one), gradient)

    makers = {
        "eager": lambda: problem.candidate(eager, gradient),
        "torch": lambda: problem.candidate(fused, gradient),
        "torch.compile": lambda: problem.candidate(measuring.compiled(eager), gradient),
        "Liger": liger,
        "QuACK": quack,
    }
    chosen: dict[str, Callable[[], Candidate]] = {OURS: lambda: problem.candidate(ours, gradient)}
    return chosen | {name: maker for name, maker in makers.items() if name in wanted}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = SHAPES if args.device == "cuda" else CPU_SHAPES
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    for rows, columns, zero_centered in shapes[: 1 if args.quick else None]:
        problem = Problem(rows, columns, zero_centered, dtype, args.device)
        for gradient in (False, True):
            work = "forward + backward" if gradient else "forward"
            facts = {"work": work, "rows": rows, "columns": columns, "zero_centered": zero_centered, "dtype": dtype}
            yield Case(
                f"{work}, {problem.line}",
                candidates(problem, args.peers, gradient),
                problem.bytes(gradient),
                buffers=problem.count,
                facts=facts,
            )
        del problem


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on the CPU fp32")


def main(arguments: list[str] | None = None) -> int:
    draw = functools.partial(reporting.draw_bars, columns=2)
    return command.main(
        NAME, STEM, __doc__ or "", cases, peers=PEERS, draw=draw, extend=extend, distribution=DATA, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
