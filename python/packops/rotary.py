"""Tables of sines and cosines for RoPE."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    rotary_dim: int,
    max_position: int,
    *,
    base: float = 10000.0,
    scaling: dict | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin"""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.outer(torch.arange(max_position, dtype=torch.float64), base**-exponent)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
