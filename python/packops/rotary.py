"""Tables of sines and cosines for RoPE, and the module that owns one.

Frequencies follow Hugging Face's ``rope_parameters`` (transformers, ``modeling_rope_utils.py``), computed in fp64 and rounded
once: a table made in fp32 is off by ``position * 2⁻²⁵`` radians, which is 4e-3 at position 131072.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RotaryEmbedding", "rope_inverse_frequencies", "rope_table"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


def rope_inverse_frequencies(
    rotary_dim: int, *, base: float = 10000.0, scaling: Mapping[str, Any] | None = None, max_position: int | None = None
) -> tuple[Tensor, float]:
    """Radians per position, ``(rotary_dim / 2,)`` in fp64 on the CPU, and the factor on cos and sin (1 except YaRN and LongRoPE).

    Arguments as in :func:`rope_table`; ``max_position`` is what "dynamic" and "longrope" adapt to (None: the trained length).
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"packops.rope_table: rotary_dim must be even and positive, got {rotary_dim}")
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "mrope":  # how Qwen2-VL's config files call the default with sections
        kind = "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"packops.rope_table: scaling['rope_type'] must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    base = float(scaling.get("rope_theta") or base)
    if not base > 0:
        raise ValueError(f"packops.rope_table: base must be positive, got {base}")

    def need(*keys: str) -> Any:
        for key in keys:
            if scaling.get(key) is not None:
                return scaling[key]
        raise ValueError(
            f"packops.rope_table: scaling of type {kind!r} needs {' or '.join(map(repr, keys))}, got {sorted(scaling)}"
        )

    index = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    plain = base ** -(index / rotary_dim)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / need("factor"), 1.0
    if kind == "proportional":
        turning = int(scaling.get("partial_rotary_factor", 1.0) * rotary_dim // 2)
        return torch.where(index < 2 * turning, plain, 0.0) / scaling.get("factor", 1.0), 1.0
    if kind == "dynamic":
        factor, trained = need("factor"), need("original_max_position_embeddings", "max_position_embeddings")
        length = max(max_position or trained, trained)
        grown = base * (factor * length / trained - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
        return grown ** -(index / rotary_dim), 1.0
    trained = need("original_max_position_embeddings")
    if kind == "llama3":
        return _llama3(plain, trained, need("factor"), need("low_freq_factor"), need("high_freq_factor")), 1.0
    factor = scaling.get("factor")
    if factor is None:
        factor = need("factor", "max_position_embeddings") / trained
    if kind == "longrope":
        name = "long_factor" if max_position is not None and max_position > trained else "short_factor"
        stretch = torch.tensor(need(name), dtype=torch.float64)
        if stretch.shape != plain.shape:
            raise ValueError(
                f"packops.rope_table: scaling[{name!r}] must have rotary_dim / 2 = {len(plain)} numbers, got {len(stretch)}"
            )
        attention = scaling.get("attention_factor")
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        return plain / stretch, float(attention)
    return _yarn(plain, base, trained, factor, scaling)


def _llama3(plain: Tensor, trained: float, factor: float, low: float, high: float) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    turns = trained * plain / (2 * math.pi)  # in the trained length
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (keep + (1 - keep) / factor)


def _yarn(plain: Tensor, base: float, trained: float, factor: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071): a ramp over dimensions, and a temperature on the attention."""
    dim = 2 * len(plain)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(len(plain), dtype=torch.float64) - first) / (last - first)).clamp(0, 1)

    def temperature(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature()
    return plain * (stretched / factor + 1 - stretched), float(attention)


def rope_table(
    rotary_dim: int,
    max_position: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The table :func:`packops.apply_rope` reads: cos and sin of ``position * frequency``, computed in fp64 and rounded once.

    Args:
        rotary_dim: number of features of a head that turn.
        max_position: number of rows; positions are ``0 .. max_position - 1``.
        base: of the geometric series of frequencies (Hugging Face's ``rope_theta``, which in ``scaling`` takes precedence).
        scaling: Hugging Face's ``rope_scaling`` or ``rope_parameters`` dictionary: ``rope_type`` "default", "linear", "dynamic",
            "yarn", "llama3", "longrope" or "proportional". "dynamic" and "longrope" adapt to ``max_position``. Lengths that
            Hugging Face reads from the model's config (``original_max_position_embeddings``, ``max_position_embeddings``) are
            read from the dictionary.

    Returns:
        ``(cos, sin)``, each ``(max_position, rotary_dim / 2)``; YaRN's and LongRoPE's attention factor multiplies both.

    Raises:
        ValueError: an odd ``rotary_dim``, an unknown ``rope_type``, or a missing entry of ``scaling``.
    """
    frequencies, factor = rope_inverse_frequencies(rotary_dim, base=base, scaling=scaling, max_position=max_position)
    cos, sin = (torch.empty(max_position, rotary_dim // 2, dtype=dtype, device=device) for _ in range(2))
    # In pieces: a table of a million positions would need a gigabyte of fp64 temporaries.
    for begin in range(0, max_position, 65536):
        rows = slice(begin, min(begin + 65536, max_position))
        angles = torch.outer(torch.arange(rows.start, rows.stop, dtype=torch.float64), frequencies)
        cos[rows] = (angles.cos() * factor).to(dtype)
        sin[rows] = (angles.sin() * factor).to(dtype)
    return cos, sin


class RotaryEmbedding(nn.Module):
    """Rotates query and key heads, and owns the table of sines and cosines.

    The table grows when a call has more tokens in a row than it has rows, which needs no look at the device: positions of packed
    or padded rows stay below their length. Where ``position_ids`` go further (decoding, left padding), say so with
    ``max_position``. The table is fp32 whatever the model's dtype, moves with the model, and is not part of its state dict.

    Args:
        rotary_dim, base, scaling: as in :func:`rope_table`.
        max_position: rows to begin with.

    >>> rope = RotaryEmbedding(64)
    >>> q, k = rope(torch.randn(7, 4, 64), torch.randn(7, 1, 64), cu_seqlens=torch.tensor([0, 3, 7]))
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_position: int = 4096,
        *,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        rotary_offset: int = 0,
        mrope_section: Sequence[int] | None = None,
        mrope_interleaved: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.rotary_dim, self.base, self.scaling = rotary_dim, base, scaling
        self.options: dict[str, Any] = {
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
            "rotary_offset": rotary_offset,
            "mrope_section": mrope_section,
            "mrope_interleaved": mrope_interleaved,
        }
        self._make_table(max_position, device)

    def _make_table(self, rows: int, device: torch.device | str | None) -> None:
        cos, sin = rope_table(self.rotary_dim, rows, base=self.base, scaling=self.scaling, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn, recurse=True):
        """``.to(bfloat16)`` must not round the table, and ``.to_empty()`` must not leave it empty."""
        before = self.cos
        super()._apply(fn, recurse)
        if self.cos.dtype != before.dtype or self.cos.device != before.device:
            self._make_table(before.shape[0], self.cos.device)
        return self

    def extend(self, max_position: int) -> None:
        """Make the table at least this long; a longer one than needed now, so that growing stays rare."""
        if max_position > self.cos.shape[0]:
            self._make_table(max(max_position, 2 * self.cos.shape[0]), self.cos.device)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: str | None = None,
        max_position: int | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :func:`packops.apply_rope`. ``max_position``: one more than the largest position, where that exceeds the tokens."""
        from .functional import apply_rope

        self.extend(max_position or q.shape[0 if q.dim() == 3 else 2 if layout == "bhsd" else 1])
        return apply_rope(
            q,
            k,
            self.cos,
            self.sin,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            layout=layout,
            inplace=inplace,
            **self.options,
        )

    def extra_repr(self) -> str:
        kind = (self.scaling or {}).get("rope_type", "default")
        return f"rotary_dim={self.rotary_dim}, rows={self.cos.shape[0]}, base={self.base}, rope_type={kind}"
