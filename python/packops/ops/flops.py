"""What torch.utils.flop_counter counts for packops' ops, into which it cannot look: their matrix products.

Without this, whoever computes from it how busy a GPU is would see layers without work. As torch counts its own ops: a product is
two operations a term, attention is counted without the causal mask, and its backward makes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import flop_registry, register_flop_formula


def register(namespace: str) -> None:
    """Formulas for ``torch.ops.<namespace>``. They get shapes in the place of tensors."""
    ops = getattr(torch.ops, namespace)
    flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])  # of hf.projections; torch leaves it out

    def counts(*names: str, get_raw: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
        return register_flop_formula([getattr(ops, name) for name in names], get_raw)

    @counts("gated_linear", "_gated_linear")
    def _(gate: Any, up: Any, weight: Any, *_: Any, **__: Any) -> int:
        return product(gate, weight)

    @counts("_gated_linear_backward")
    def _(grad: Any, gate: Any, up: Any, weight: Any, activation: str, needs: list[bool], **__: Any) -> int:
        need_gate, need_up, need_weight, _ = needs
        return ((need_gate or need_up) + need_weight) * product(gate, weight)

    @counts("gated_mlp", "_gated_mlp")
    def _(x: Any, gate_weight: Any, up_weight: Any, down_weight: Any, *_: Any, **__: Any) -> int:
        return 2 * product(x, gate_weight) + product(x, down_weight)

    @counts("_gated_mlp_backward")
    def _(grad: Any, x: Any, gate_weight: Any, up_weight: Any, down_weight: Any, *rest: Any, **__: Any) -> int:
        need_x, need_gate_weight, need_up_weight, need_down_weight, need_gate_bias, need_up_bias, _ = rest[-1]
        between = need_x or need_gate_weight or need_up_weight or need_gate_bias or need_up_bias
        first, last = 2 * need_x + need_gate_weight + need_up_weight, between + need_down_weight
        return first * product(x, gate_weight) + last * product(x, down_weight)

    @counts("linear_cross_entropy", "linear_cross_entropy_stats", "linear_log_probs", "_linear_log_probs_forward")
    def _(hidden: Any, weight: Any, *_: Any, num_valid: int | None = None, **__: Any) -> int:
        return product(hidden, weight, num_valid)

    @counts("_linear_cross_entropy_forward")
    def _(hidden: Any, weight: Any, labels: Any, *, num_valid: int | None = None, **given: Any) -> int:
        grad_weight = given.get("grad_weight", False) and not given.get("keep_logits", False)
        return (1 + given.get("grad_hidden", False) + grad_weight) * product(hidden, weight, num_valid)

    @counts("_linear_cross_entropy_backward")
    def _(grad: Any, hidden: Any, weight: Any, *_: Any, num_valid: int | None = None, **given: Any) -> int:
        return (1 + given.get("grad_hidden", False) + given.get("grad_weight", False)) * product(hidden, weight, num_valid)

    @counts("_linear_log_probs_backward")
    def _(a: Any, b: Any, c: Any, hidden: Any, weight: Any, *_: Any, num_valid: int | None = None, **given: Any) -> int:
        return (1 + given.get("grad_hidden", False) + given.get("grad_weight", False)) * product(hidden, weight, num_valid)

    @counts("_linear_cross_entropy_weight_gradient")
    def _(grad: Any, grad_logits: Any, hidden: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(grad_logits) * hidden[-1]

    @counts("_linear_cross_entropy_add_weight_gradient")
    def _(main_grad: Any, grad: Any, grad_logits: Any, hidden: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(grad_logits) * hidden[-1]

    @counts("_lm_head_statistics")
    def _(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
        return product(hidden, weight)

    @counts("_lm_head_logits_", "_lm_head_gradient_")
    def _(out: Any, hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
        return product(hidden, weight)

    @counts("_lm_head_weight_gradient_")
    def _(out: Any, grad_logits: Any, hidden: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(grad_logits) * hidden[-1]

    @counts("attention", "_attention", get_raw=True)
    def _(q: Any, k: Any, v: Any, cu_seqlens: Any, parents: Any = None, *_: Any, **__: Any) -> int:
        return 2 * product_of_scores(q, cu_seqlens, parents)

    @counts("_attention_backward", get_raw=True)
    def _(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, tiles: Any, forest: Any, cu_seqlens: Any, *_: Any, **__: Any
    ) -> int:
        parents = forest[: 4 * (len(cu_seqlens) - 1)].view(-1, 4)[:, 3] if len(forest) else None  # of csrc/packed_forest.h
        return 5 * product_of_scores(q, cu_seqlens, parents)


def product(rows: Any, weight: Any, num_valid: int | None = None) -> int:
    count = math.prod(rows[:-1])
    return 2 * (count if num_valid is None else min(num_valid, count)) * math.prod(weight)


def product_of_scores(q: Any, cu_seqlens: Any, parents: Any) -> int:
    """q k^T within documents, or, where nobody knows them, of the whole row."""
    tokens, heads, features = q.shape
    if is_fake(cu_seqlens) or cu_seqlens.is_meta:
        return 2 * heads * features * tokens * tokens
    lengths, pairs = cu_seqlens.diff().tolist(), 0
    seen: list[int] = []  # by each document, its parents included
    for length, parent in zip(lengths, [-1] * len(lengths) if parents is None else parents.tolist(), strict=True):
        seen.append(length + (seen[parent] if parent >= 0 else 0))
        pairs += length * seen[-1]
    return 2 * heads * features * pairs
