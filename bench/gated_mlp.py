"""A gated MLP, from hidden states to hidden states, against eager code, torch.compile, Liger and QuACK.

    packops bench gated-mlp                        # everything
    packops bench gated-mlp --only "gelu_tanh"     # some cases
    packops bench gated-mlp --device cpu --threads 2

`products` is the bound: the three matrix products of the forward as torch computes them, or the nine with all gradients. Every
result is checked against an fp64 reference.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
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

NAME = "gated-mlp"
STEM = "gated_mlp"
DATA = "x and gradients from N(0, 1), weights from N(0, 1 / their columns)"
PEERS = {"eager": peers.TORCH, "torch.compile": peers.TORCH, "Liger": peers.LIGER, "QuACK": peers.QUACK}
PRODUCTS = "products"
# tokens, features, columns, activation: Llama-3.2-1B, Qwen3-0.6B, an 8B model, Gemma-2-2B
SHAPES = [(16384, 2048, 8192, "silu"), (16384, 1024, 3072, "silu"), (8192, 4096, 14336, "silu"), (16384, 2304, 9216, "gelu_tanh")]
CPU_SHAPES = [(512, 256, 1024, "silu")]
# Error that is still called right, of the largest of its kind. Eager code rounds the activation and the product.
WORST = {"bf16": 2**-6, "fp16": 2**-9, "fp32": 2**-16}
RESULTS = ("result", "gradient of x", "gradient of the gate's weight", "gradient of up's weight", "gradient of the last weight")


@dataclass
class Problem:
    """x of tokens, three weights, and the gradient of the result."""

    tokens: int
    features: int
    columns: int
    activation: str
    dtype: str
    device: str
    inputs: tuple[Tensor, ...] = field(init=False)
    gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}

        def some(rows: int, columns: int, size: float = 1) -> Tensor:
            return (size * torch.randn(rows, columns, **options)).to(DTYPES[self.dtype])

        wide = (some(self.columns, self.features, self.features**-0.5) for _ in range(2))
        self.inputs = (some(self.tokens, self.features), *wide, some(self.features, self.columns, self.columns**-0.5))
        self.gradient = some(self.tokens, self.features)

    @property
    def line(self) -> str:
        return f"{self.tokens} x {self.features} to {self.columns}, {self.activation}, {self.dtype}"

    def flops(self, gradient: bool) -> int:
        return (9 if gradient else 3) * 2 * self.tokens * self.columns * self.features

    def candidate(self, function: Callable[..., Tensor], gradient: bool, inputs: Sequence[Tensor] | None = None) -> Candidate:
        """``function(x, gate_weight, up_weight, down_weight)``, or of other ``inputs``."""
        return measuring.candidate_of(function, [inputs or self.inputs], [self.gradient], gradient, self.wrong)

    @functools.cached_property
    @torch.enable_grad()
    def reference(self) -> tuple[Tensor, ...]:
        """In fp64."""
        leaves = [x.detach().double().requires_grad_() for x in self.inputs]
        result = reference.gated_mlp(*leaves, activation=self.activation)
        return result.detach(), *torch.autograd.grad(result, leaves, self.gradient.double())

    def wrong(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result or gradients beyond rounding, or ""."""
        if len(found) == 4:  # of gate and up in one
            found = (*found[:2], *found[2].chunk(2), found[3])
        return measuring.beyond_rounding(RESULTS, found, self.reference, WORST[self.dtype])


def candidates(problem: Problem, wanted: dict[str, peers.Peer], gradient: bool) -> dict[str, Callable[[], Candidate]]:
    kind: Any = problem.activation

    def ours(*tensors: Tensor) -> Tensor:
        return packops.gated_mlp(*tensors, activation=kind)

    def eager(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g = F.linear(x, gate)
        act = F.silu(g) if kind == "silu" else F.gelu(g, approximate="tanh")
        return F.linear(act * F.linear(x, up), down)

    def liger() -> Candidate:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        function = (LigerSiLUMulFunction if kind == "silu" else LigerGELUMulFunction).apply
        return problem.candidate(lambda x, gate, up, down: F.linear(function(F.linear(x, gate), F.linear(x, up)), down), gradient)

    def quack() -> Candidate:
        function = peers.quack("mlp").mlp_func
        name = "swiglu" if kind == "silu" else "geglu"
        x, gate, up, down = problem.inputs
        return problem.candidate(
            lambda x, both, down: function(x, both, down, name, concat_layout=True, tuned=False),
            gradient,
            (x, torch.cat([gate, up]), down),
        )

    makers = {
        "eager": lambda: problem.candidate(eager, gradient),
        "torch.compile": lambda: problem.candidate(measuring.compiled(eager), gradient),
        "Liger": liger,
        "QuACK": quack,
    }
    chosen: dict[str, Callable[[], Candidate]] = {OURS: lambda: problem.candidate(ours, gradient)}
    chosen |= {name: maker for name, maker in makers.items() if name in wanted}
    return chosen | {PRODUCTS: lambda: Candidate(functools.partial(products, problem, gradient))}


def products(problem: Problem, gradient: bool, _: int) -> tuple[Tensor, ...]:
    """What no implementation can do without. gate stands in for what is made of it."""
    x, gate_weight, up_weight, down_weight = problem.inputs
    gate, up = x @ gate_weight.t(), x @ up_weight.t()
    result = gate @ down_weight.t()
    if not gradient:
        return up, result
    grad = problem.gradient
    inner, last = grad @ down_weight, grad.t() @ gate
    return gate @ gate_weight, up @ up_weight, gate.t() @ x, up.t() @ x, inner, last


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = SHAPES if args.device == "cuda" else CPU_SHAPES
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    for tokens, features, columns, activation in shapes[: 1 if args.quick else None]:
        problem = Problem(tokens, features, columns, activation, dtype, args.device)
        for gradient in (False, True):
            work = "forward + backward" if gradient else "forward"
            facts = {"work": work, "tokens": tokens, "features": features, "columns": columns, "activation": activation}
            yield Case(
                f"{work}, {problem.line}",
                candidates(problem, args.peers, gradient),
                facts=facts | {"dtype": dtype},
                flops=problem.flops(gradient),
            )
        del problem


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on the CPU fp32")


def main(arguments: list[str] | None = None) -> int:
    return command.main(NAME, STEM, __doc__ or "", cases, peers=PEERS, extend=extend, distribution=DATA, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
