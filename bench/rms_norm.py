"""RMS norm of rows and of sums, forward and with all gradients, against torch, torch.compile, Liger and QuACK.

    packops bench rms-norm                      # everything
    packops bench rms-norm --only "^forward,"   # some cases
    packops bench rms-norm --device cpu --threads 2

Bytes: x and the result, in the backward x, the gradient and the gradient of x, each read or written once. Of a sum, whose terms
are x and a residual, also the residual and the sum, and in the backward the sum's gradient. Every result is checked against an
fp64 reference.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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
RESULTS_OF_SUMS = ("result", "sum", "gradient of x", "gradient of the residual", "gradient of weight")
Norm = Callable[..., Any]  # (x, weight) -> result, or (x, residual, weight) -> result and sum


@dataclass
class Problem:
    """Rows, a weight, and the gradient of the result; of a sum, a residual and the gradient of the sum, too."""

    rows: int
    columns: int
    zero_centered: bool
    dtype: str
    device: str
    adds: bool
    inputs: list[tuple[Tensor, ...]] = field(init=False)
    gradients: list[tuple[Tensor, ...]] = field(init=False)

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}
        self.count = measuring.buffers_for(self.bytes(), self.device)

        def some() -> list[tuple[Tensor, ...]]:
            shape = (1 + self.adds, self.rows, self.columns)
            return [torch.randn(*shape, **options).to(DTYPES[self.dtype]).unbind() for _ in range(self.count)]

        weight = torch.randn(self.columns, **options).to(DTYPES[self.dtype])
        self.inputs, self.gradients = [(*terms, weight) for terms in some()], some()

    @property
    def line(self) -> str:
        of_sum = " of a sum" if self.adds else ""
        return f"{self.rows} x {self.columns} {self.dtype}{of_sum}" + (", 1 + weight" if self.zero_centered else "")

    def bytes(self, gradient: bool = False) -> int:
        forward, both = (4, 8) if self.adds else (2, 5)
        return (both if gradient else forward) * self.rows * self.columns * DTYPES[self.dtype].itemsize

    def candidate(self, norm: Norm, gradient: bool = False) -> Candidate:
        return measuring.candidate_of(norm, self.inputs, self.gradients, gradient, self.wrong)

    def of_sum(self, norm: Norm) -> Norm:
        """``norm``, or what makes a sum first and returns both."""

        def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total = residual + x
            return norm(total, weight), total

        return both if self.adds else norm

    @functools.cached_property
    @torch.enable_grad()
    def reference(self) -> tuple[Tensor, ...]:
        """Of the first buffer, in fp64."""
        leaves = [t.detach().double().requires_grad_() for t in self.inputs[0]]
        exact = functools.partial(reference.rms_norm, eps=EPS, zero_centered=self.zero_centered)
        made = self.of_sum(exact)(*leaves)
        results = made if self.adds else (made,)
        gradients = torch.autograd.grad(results, leaves, [g.double() for g in self.gradients[0]])
        return *(result.detach() for result in results), *gradients

    def wrong(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result or gradients beyond rounding, or ""."""
        for name, x, right in zip(RESULTS_OF_SUMS if self.adds else RESULTS, found, self.reference, strict=False):
            if x.shape != right.shape:
                return f"{name} of shape {tuple(x.shape)} instead of {tuple(right.shape)}"
            error = ((x.double() - right).abs() / right.abs().amax(-1, keepdim=True)).max().item()
            if not error <= WORST[self.dtype]:  # NaN is wrong
                return f"{name} off by up to {100 * error:.3g} % of the largest"
        return ""


def candidates(problem: Problem, wanted: dict[str, peers.Peer], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    one = float(problem.zero_centered)

    def ours(*tensors: Tensor) -> Any:
        op = packops.add_rms_norm if problem.adds else packops.rms_norm
        return op(*tensors, eps=EPS, zero_centered=problem.zero_centered)

    def eager(x: Tensor, weight: Tensor) -> Tensor:  # as transformers has it, Llama's and Gemma's
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (normed * (1 + weight.float())).to(x.dtype) if problem.zero_centered else weight * normed.to(x.dtype)

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        if problem.zero_centered:  # 1 + weight has more digits than 16 bits hold
            return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), EPS).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, EPS)

    def liger() -> Candidate:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        function = LigerFusedAddRMSNormFunction if problem.adds else LigerRMSNormFunction
        mode = "gemma" if problem.zero_centered else "llama"
        return problem.candidate(lambda *tensors: function.apply(*tensors, EPS, one, mode, False), gradient)

    def quack() -> Candidate:
        from quack.rmsnorm import rmsnorm

        def of_sum(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
            return rmsnorm(x, weight, residual=residual, eps=EPS, weight_offset=one, prenorm=True)

        def alone(x: Tensor, weight: Tensor) -> Any:
            return rmsnorm(x, weight, eps=EPS, weight_offset=one)

        return problem.candidate(of_sum if problem.adds else alone, gradient)

    makers = {
        "eager": lambda: problem.candidate(problem.of_sum(eager), gradient),
        "torch": lambda: problem.candidate(problem.of_sum(fused), gradient),
        "torch.compile": lambda: problem.candidate(measuring.compiled(problem.of_sum(eager)), gradient),
        "Liger": liger,
        "QuACK": quack,
    }
    chosen: dict[str, Callable[[], Candidate]] = {OURS: lambda: problem.candidate(ours, gradient)}
    return chosen | {name: maker for name, maker in makers.items() if name in wanted}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = SHAPES if args.device == "cuda" else CPU_SHAPES
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    for adds, (rows, columns, zero_centered) in itertools.product((False, True), shapes[: 1 if args.quick else None]):
        problem = Problem(rows, columns, zero_centered, dtype, args.device, adds)
        for gradient in (False, True):
            work = "forward + backward" if gradient else "forward"
            facts = {"work": work, "rows": rows, "columns": columns, "zero_centered": zero_centered, "dtype": dtype}
            facts["sum"] = adds
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
