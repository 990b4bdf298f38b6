"""Rows times a factor, rounded once: how accumulated gradients become those of the parameters (csrc/scaled_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import register_fake

__all__: list[str] = []


def register(namespace: str) -> None:
    def scaled_rows(out: Tensor, x: Tensor, *given: Tensor | bool | None, **named: Tensor | bool | None) -> None:
        return None

    register_fake(namespace, "_scaled_rows_", scaled_rows)


def scaled_rows_(
    out: Tensor,
    x: Tensor,
    factor: Tensor | None = None,
    *,
    index: Tensor | None = None,
    target: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """out[r] = factor[r] * x[index[r]], or out[r] + that, or 0 where target[r] < 0, whose x is not read. Returns ``out``.

    Computed in fp32 (fp64 for fp64) and rounded once to the dtype of ``out``.

    out: (..., columns), contiguous: ``x`` itself, or apart from it. x: (..., columns). factor: one number, or one for each row,
    fp32 (fp64 for fp64). index: (rows,) int64, of rows of ``x``; target: (rows,) int32.
    """
    torch.ops.packops._scaled_rows_.default(out, x, factor, index, target, add)
    return out
