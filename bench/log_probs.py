"""Log-probabilities and entropies from hidden states and the lm_head, with gradients, against TRL, Liger and torch.

    packops bench log-probs                                # everything
    packops bench log-probs --shape 8192 4096 151936       # tokens, hidden size, vocabulary
    packops bench log-probs --device cpu --threads 2

`one product` is hidden @ weight.T on all tokens at once, the bound of the forward; `four products` adds that product once more
and the two of its backward. Peak memory is what a call allocates at most at once, its gradients included. Errors are root mean
squares over a sample of rows, against fp64: in nats, and of the gradients relative to their size.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import command
import measuring
import packops
import peers
from measuring import Candidate, Case, Target

NAME = "log-probs"
STEM = "log_probs"
DATA = "hidden states from N(0, 1), the weight such that logits are from N(0, 4), labels uniform over the vocabulary"
PEERS = {"eager": peers.TORCH, "torch.compile": peers.TORCH, "TRL": peers.TRL, "Liger": peers.LIGER}
SHAPES = ((8192, 4096, 151936), (8192, 2304, 256000), (16384, 896, 151936))
CPU_SHAPES = ((512, 256, 16000),)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECK_ROWS = 64
BONUS = 0.01  # of entropy, in what is differentiated
Made = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (hidden, weight, labels) -> log-probabilities, entropies


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    found = packops.linear_log_probs(hidden, weight, labels)
    assert found.entropy is not None
    return found.log_probs, found.entropy


def trl() -> Made:
    apply = peers.trl("kernels.chunked_logprob").ChunkedLogProbFunction.apply
    # As its trainers call it: columns of a tile, no softcap, no scale.
    return lambda hidden, weight, labels: apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("entropy",))[:2]


def liger() -> Made:
    # On Hopper a kernel in CUTLASS' DSL, which must be installed; elsewhere chunks in torch.
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Function

    def made(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, entropy = Function.apply(hidden, weight, labels, return_entropy=True)
        return -loss, entropy

    return made


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
    advantages: Tensor = field(init=False)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by candidate

    def __post_init__(self) -> None:
        options: Any = {"device": self.device, "generator": torch.Generator(self.device).manual_seed(0)}
        dtype = DTYPES[self.dtype]
        self.hidden = torch.randn(self.tokens, self.hidden_size, dtype=dtype, **options)
        self.weight = torch.randn(self.vocab, self.hidden_size, dtype=dtype, **options).mul_(2 / self.hidden_size**0.5)
        self.labels = torch.randint(0, self.vocab, (self.tokens,), **options)
        self.advantages = torch.randn(self.tokens, **options)

    def candidate(self, name: str, made: Made, gradient: bool) -> Candidate:
        def call(i: int) -> tuple[Tensor, ...]:
            if not gradient:
                return made(self.hidden, self.weight, self.labels)
            with torch.enable_grad():
                leaves = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
                log_probs, entropy = made(*leaves, self.labels)
                grads = torch.autograd.grad((log_probs * self.advantages + BONUS * entropy).sum(), leaves)
                return log_probs.detach(), entropy.detach(), *grads

        return Candidate(call, check=lambda result: self.wrong(name, result))

    @functools.cached_property
    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows: log-probabilities, entropies, and gradients of the hidden states, in fp64."""
        rows = slice(0, None, max(1, self.tokens // CHECK_ROWS))
        with torch.enable_grad():
            hidden = self.hidden[rows].double().requires_grad_()
            log_p = (hidden @ self.weight.double().t()).log_softmax(-1)
            log_probs, entropy = log_p.gather(1, self.labels[rows, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
            total = (log_probs * self.advantages[rows].double() + BONUS * entropy).sum()
            return log_probs.detach(), entropy.detach(), torch.autograd.grad(total, hidden)[0]

    def wrong(self, name: str, result: tuple[Tensor, ...]) -> str:
        rows = slice(0, None, max(1, self.tokens // CHECK_ROWS))
        rounding = 0.02 if self.dtype == "bf16" else 1e-5  # of logits that are rounded, which those of peers are
        bad, errors = [], {}
        for what, found, exact in zip(("log-probabilities", "entropies", "gradients"), result, self.reference, strict=False):
            size, error = (x.square().mean().sqrt().item() for x in (exact, found[rows].double() - exact))
            errors[what] = error / size if what == "gradients" else error
            if not error <= rounding * size:
                bad.append(f"{what} off by {100 * error / size:.3g} %")
        if len(errors) > len(self.errors.get(name, ())):  # with gradients, if there are
            self.errors[name] = errors
        return ", ".join(bad)


def products(problem: Problem, count: int) -> Candidate:
    """What no implementation can do without. Logits stand in for their gradient."""

    def call(i: int) -> tuple[Tensor, ...]:
        logits = problem.hidden @ problem.weight.t()
        if count == 1:
            return (logits,)
        logits = problem.hidden @ problem.weight.t()
        return logits @ problem.weight, logits.t() @ problem.hidden

    return Candidate(call)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    on_cpu = args.device == "cpu"
    shapes = args.shape or (CPU_SHAPES if on_cpu else SHAPES)
    for shape in shapes[: 1 if args.quick else None]:
        for dtype in ("fp32", "bf16") if on_cpu else ("bf16",):
            problem = Problem(*shape, dtype, args.device)
            facts = {"tokens": shape[0], "hidden_size": shape[1], "vocab": shape[2], "dtype": dtype}
            title = f"{' x '.join(map(str, shape))} {dtype}"
            for work, gradient, bound, count, limit in (
                ("forward", False, "one product", 1, 1.02),
                ("forward + backward", True, "four products", 4, 1.10),
            ):
                makers: dict[str, Callable[[], Made]] = {
                    "packops": lambda: ours,
                    "eager": lambda: eager,
                    "torch.compile": lambda: measuring.compiled(eager),
                    "TRL": trl,
                    "Liger": liger,
                }
                candidates: dict[str, Callable[[], Candidate]] = {
                    name: functools.partial(lambda n, make, g, p=problem: p.candidate(n, make(), g), name, make, gradient)
                    for name, make in makers.items()
                    if name == "packops" or name in args.peers
                }
                candidates[bound] = functools.partial(products, problem, count)
                targets = {} if on_cpu else {"packops": [Target(bound, limit)]}
                yield Case(
                    f"{work}, {title}", candidates, targets=targets, facts={**facts, "work": work, "errors": problem.errors}
                )
            print(error_table(problem.errors))
            del problem, candidates


def error_table(errors: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"  {name:14} off by " + ", ".join(f"{error:.2e} ({what})" for what, error in found.items())
        for name, found in errors.items()
    )


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("T", "H", "V"), help="may be repeated")


def main(arguments: list[str] | None = None) -> int:
    return command.main(NAME, STEM, __doc__ or "", cases, peers=PEERS, extend=extend, distribution=DATA, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
