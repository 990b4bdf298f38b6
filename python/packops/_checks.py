"""Checks of device data that cost a wait for the device, and are therefore off unless asked for."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _C

BAD_LABEL: int = _C.constants()["bad_label"]

_enabled: bool | None = None


def checks(on: bool = True) -> None:
    """Make CUDA calls report bad labels, positions and ``cu_seqlens`` as the CPU does, at the price of a synchronisation each.

    ``PACKOPS_CHECKS=1`` in the environment does the same. Without checks such rows give NaN and a zero gradient.
    """
    global _enabled
    _enabled = on


def enabled() -> bool:
    global _enabled
    if _enabled is None:
        value = os.environ.get("PACKOPS_CHECKS", "")
        if value not in ("", "0", "1"):
            raise ValueError(f"PACKOPS_CHECKS must be 0, 1 or unset, got {value!r}")
        _enabled = value == "1"
    return _enabled


def raise_bad_cu_seqlens(op: str, cu_seqlens: Tensor, rows: int) -> None:
    """ValueError unless ``cu_seqlens`` starts at 0, does not decrease and ends at or before ``rows``."""
    values = cu_seqlens.long()
    least = torch.cat([values.new_zeros(1), values[:-1]])
    bad = (values < least) | (values > rows)
    bad[0] = values[0] != 0
    if bad.any():
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"packops.{op}: cu_seqlens must start at 0, not decrease, and end at or before the number of rows ({rows}), "
            f"got cu_seqlens[{place}] = {int(values[place])}"
        )


def raise_bad_rows(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    target: Tensor,
    *,
    shift: bool,
    ignore_index: int,
    vocab: int,
    op: str = "cross_entropy",
) -> None:
    """IndexError for a label that the cross-entropy kernel found outside [0, vocab)."""
    if cu_seqlens is not None:
        raise_bad_cu_seqlens(op, cu_seqlens, labels.numel())
    bad = (target == BAD_LABEL).nonzero()
    if bad.numel():
        place = int(bad[0]) + int(shift)
        raise IndexError(
            f"packops.{op}: label {int(labels.reshape(-1)[place])} at position {place} is outside [0, {vocab}) "
            f"and is not ignore_index ({ignore_index})"
        )


def raise_bad_positions(
    op: str,
    q: Tensor,
    cos: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str | None,
    per_token_table: bool,
) -> None:
    """IndexError for a position outside the table of RoPE, ValueError for malformed ``cu_seqlens``."""
    rows = q.shape[0 if q.dim() == 3 else 2 if layout == "bhsd" else 1]
    tokens = rows if q.dim() == 3 else q.shape[0] * rows
    table = cos.shape[0]
    if cu_seqlens is not None:
        raise_bad_cu_seqlens(op, cu_seqlens, tokens)
    if per_token_table or tokens == 0:
        return
    end = tokens if cu_seqlens is None else int(cu_seqlens[-1])
    if position_ids is None:
        if cu_seqlens is None:
            longest = rows
        else:
            longest = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        if longest > table:
            raise IndexError(
                f"packops.{op}: a row or document of {longest} tokens has positions outside the table of {table} positions"
            )
        return
    bad = (position_ids < 0) | (position_ids >= table)
    if position_ids.numel() % tokens == 0:  # else one row of ids serves every batch row
        bad = bad & (torch.arange(position_ids.numel(), device=bad.device) % tokens < end).view(bad.shape)
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        where = ", ".join(map(str, place))
        value = int(position_ids[place])
        raise IndexError(f"packops.{op}: position_ids[{where}] = {value} is outside the table of {table} positions")


def raise_full_width_table(op: str, q: Tensor, sin: Tensor, rotary_dim: int | None, interleaved: bool) -> None:
    """ValueError for a table that has every number twice and is read as half a table, or the other way round."""
    width = sin.shape[-1]
    if width % 2:
        return
    halves, neighbours = sin.unflatten(-1, (2, width // 2)), sin.unflatten(-1, (width // 2, 2))
    in_halves, in_neighbours = (halves[..., 0, :] == halves[..., 1, :]).all(), (neighbours[..., 0] == neighbours[..., 1]).all()
    if rotary_dim is None and 2 * width <= q.shape[-1]:
        if (in_halves | in_neighbours) and sin.any():
            raise ValueError(
                f"packops.{op}: cos and sin hold every number twice, as Hugging Face makes them for {width} rotary features: "
                f"pass rotary_dim={width}, or else they are half a table of {2 * width} features"
            )
    elif rotary_dim in (None, width) and not (in_neighbours if interleaved else in_halves):
        pair, other = ("2i and 2i + 1", False) if interleaved else ("i and i + rotary_dim / 2", True)
        raise ValueError(
            f"packops.{op}: cos and sin of {width} columns must hold every number twice, at the two features of a pair ({pair}), "
            f"but sin does not: for a table in the other order pass interleaved={other}, for half a table rotary_dim={2 * width}"
        )
