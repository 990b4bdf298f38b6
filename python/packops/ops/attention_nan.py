"""What is not finite reaches only those who see it, where attention computes the scores of tokens that do not see each other.

A weight of 0 times NaN is NaN, and so is a score of NaN plus a mask of -inf. So one bad token would spoil the whole row: in the
forward through keys and values, in the backward through gradients of the output. Here bad tokens enter as zeros, and afterwards
NaN is written to everyone who sees them::

    q, k, v, bad_queries, bad_keys = Shield.apply(q, k, v)
    out = Unshield.apply(attention(q, k, v, sees), bad_queries, bad_keys, sees)

``bad_queries`` and ``bad_keys`` (T,) hold 1 for a bad token. They are floats, because their gradients carry the marks back: which
queries and keys have a gradient that is NaN. An infinite token counts as NaN. Each tensor is read once more, and ``sees`` is
there anyway: little beside the scores of all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _is_bad(x: Tensor) -> Tensor:
    """(1, heads, T, features) -> (T,): which tokens hold something that is not finite."""
    return ~x.isfinite().all(-1).all(1)[0]


def _mark(x: Tensor, bad: Tensor, value: float) -> Tensor:
    return x.masked_fill(bad[:, None], value)


class Shield(torch.autograd.Function):
    """``q, k, v, of_queries, of_keys = apply(q, k, v)``: (1, heads, T, features) each with bad tokens set to 0, and which these
    are, (T,) 0 or 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        query, key = _is_bad(q), _is_bad(k) | _is_bad(v)
        return _mark(q, query, 0), _mark(k, key, 0), _mark(v, key, 0), query.to(q.dtype), key.to(q.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_q, grad_k, grad_v, of_queries, of_keys = grads
        query, key = of_queries != 0, of_keys != 0
        return _mark(grad_q, query, torch.nan), _mark(grad_k, key, torch.nan), _mark(grad_v, key, torch.nan)


class Unshield(torch.autograd.Function):
    """``apply(out, of_queries, of_keys, sees)``: out (1, heads, Q, features), NaN in the rows that see a bad token. sees: (Q, K),
    whether a query sees a key."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, of_queries: Tensor, of_keys: Tensor, sees: Tensor) -> Tensor:
        return _mark(out, _spoilt(of_queries, of_keys, sees), torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        of_queries, of_keys, sees = ctx.saved_tensors
        bad = _spoilt(of_queries, of_keys, sees) | _is_bad(grad)
        seen = (sees & bad[:, None]).any(0)
        return _mark(grad, bad, 0), bad.to(of_queries.dtype), seen.to(of_keys.dtype), None


def _spoilt(of_queries: Tensor, of_keys: Tensor, sees: Tensor) -> Tensor:
    return (of_queries != 0) | (sees & (of_keys != 0)).any(1)
