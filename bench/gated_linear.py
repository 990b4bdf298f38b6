"""The gate of a gated MLP, alone and with the projection behind it, against eager code, torch.compile and Liger.

    packops bench gated-linear                        # everything
    packops bench gated-linear --only "^activation,"  # some cases
    packops bench gated-linear --device cpu --threads 2

Bytes of the activation: gate, up and the result; in the backward these two, the gradient, and two gradients. The linear layer is
shown in arithmetic: one product forward, three with the gradients. Every result is checked against an fp64 reference.
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
from measuring import DTYPES, OURS, Candidate, Case
from packops import reference

NAME = "gated-linear"
STEM = "gated_linear"
DATA = "gate, up and gradients from N(0, 1), the weight from N(0, 1 / columns)"
PEERS = {"eager": peers.TORCH, "torch.compile": peers.TORCH, "Liger": peers.LIGER}
# tokens, columns, features, activation: the MLPs of Llama-3.2-1B, Qwen3-0.6B, an 8B model, Gemma-2-2B
SHAPES = [(16384, 8192, 2048, "silu"), (16384, 3072, 1024, "silu"), (8192, 14336, 4096, "silu"), (4096, 9216, 2304, "gelu_tanh")]
CPU_SHAPES = [(512, 1024, 256, "silu")]
# Error that is still called right, of the largest of its kind. Eager code rounds the activation and the product.
WORST = {"bf16": 2**-6, "fp16": 2**-9, "fp32": 2**-16}
RESULTS = ("result", "gradient of gate", "gradient of up", "gradient of weight")
Activate = Callable[[Tensor, Tensor], Tensor]  # (gate, up) -> act(gate) * up


@dataclass
class Problem:
    """Gate and up of tokens, a weight or (``features`` 0) none, and the gradient of the result."""

    tokens: int
    columns: int
    features: int
    activation: str
    dtype: str
    device: str
    inputs: list[tuple[Tensor, ...]] = field(init=False)
    gradients: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}
        self.count = measuring.buffers_for(self.bytes(), self.device)

        def some(rows: int, columns: int, size: float = 1) -> Tensor:
            return (size * torch.randn(rows, columns, **options)).to(DTYPES[self.dtype])

        weights = (some(self.features, self.columns, self.columns**-0.5),) if self.features else ()
        wide = (self.tokens, self.columns)
        self.inputs = [(some(*wide), some(*wide), *weights) for _ in range(self.count)]
        self.gradients = [some(self.tokens, self.features or self.columns) for _ in range(self.count)]

    @property
    def line(self) -> str:
        to = f" to {self.features}" if self.features else ""
        return f"{self.tokens} x {self.columns}{to}, {self.activation}, {self.dtype}"

    def bytes(self, gradient: bool = False) -> int:
        """Of the activation: what reads gate and up and writes one of them, then what also writes both gradients."""
        return (8 if gradient else 3) * self.tokens * self.columns * DTYPES[self.dtype].itemsize

    def flops(self, gradient: bool = False) -> int:
        return (3 if gradient else 1) * 2 * self.tokens * self.columns * self.features

    def candidate(self, function: Callable[..., Tensor], gradient: bool = False) -> Candidate:
        """``function(gate, up[, weight])``."""
        return measuring.candidate_of(function, self.inputs, self.gradients, gradient, self.wrong)

    @functools.cached_property
    @torch.enable_grad()
    def reference(self) -> tuple[Tensor, ...]:
        """Of the first buffer, in fp64."""
        leaves = [x.detach().double().requires_grad_() for x in self.inputs[0]]
        function = reference.gated_linear if self.features else reference.gated_activation
        result = function(*leaves, activation=self.activation)  # type: ignore[operator]
        return result.detach(), *torch.autograd.grad(result, leaves, self.gradients[0].double())

    def wrong(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result or gradients beyond rounding, or ""."""
        return measuring.beyond_rounding(RESULTS, found, self.reference, WORST[self.dtype])


def candidates(problem: Problem, wanted: dict[str, peers.Peer], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    kind: Any = problem.activation

    def ours(gate: Tensor, up: Tensor, *weight: Tensor) -> Tensor:
        if weight:
            return packops.gated_linear(gate, up, weight[0], activation=kind)
        return packops.gated_activation(gate, up, activation=kind)

    def eager(gate: Tensor, up: Tensor, *weight: Tensor) -> Tensor:
        act = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
        return F.linear(act * up, weight[0]) if weight else act * up

    def liger() -> Candidate:
        if kind not in ("silu", "gelu_tanh"):
            raise NotImplementedError(f"Liger has no {kind}")
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        function: Activate = (LigerSiLUMulFunction if kind == "silu" else LigerGELUMulFunction).apply
        return problem.candidate(
            lambda gate, up, *weight: F.linear(function(gate, up), weight[0]) if weight else function(gate, up), gradient
        )

    makers = {
        "eager": lambda: problem.candidate(eager, gradient),
        "torch.compile": lambda: problem.candidate(measuring.compiled(eager), gradient),
        "Liger": liger,
    }
    chosen: dict[str, Callable[[], Candidate]] = {OURS: lambda: problem.candidate(ours, gradient)}
    return chosen | {name: maker for name, maker in makers.items() if name in wanted}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = SHAPES if args.device == "cuda" else CPU_SHAPES
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    for tokens, columns, features, activation in shapes[: 1 if args.quick else None]:
        for op, width in (("activation", 0), ("linear", features)):
            problem = Problem(tokens, columns, width, activation, dtype, args.device)
            for gradient in (False, True):
                work = "forward + backward" if gradient else "forward"
                facts = {"work": work, "op": op, "tokens": tokens, "columns": columns, "features": width}
                yield Case(
                    f"{op}, {work}, {problem.line}",
                    candidates(problem, args.peers, gradient),
                    problem.bytes(gradient),
                    buffers=problem.count,
                    facts=facts | {"activation": activation, "dtype": dtype},
                    flops=problem.flops(gradient),
                )
            del problem


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on the CPU fp32")


def main(arguments: list[str] | None = None) -> int:
    return command.main(NAME, STEM, __doc__ or "", cases, peers=PEERS, extend=extend, distribution=DATA, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
