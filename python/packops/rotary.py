"""Tables of sines and cosines for RoPE, and the module that owns one.

Frequencies follow Hugging Face's ``rope_parameters`` (transformers, ``modeling_rope_utils.py``), computed in fp64 and rounded
once: a table made in fp32 is off by ``position * 2⁻²⁵`` radians, which is 4e-3 at position 131072.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from .functional import apply_rope
from .ops.arguments import NUMBERS, checks_annotations

__all__ = ["RotaryEmbedding", "rope_inverse_frequencies", "rope_table"]

POSITIVE = (
    "factor",
    "long_factor",
    "short_factor",
    "attention_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
)
# Entries that scale something, in the ways of a rope_type.
SCALES = {*POSITIVE[:4], "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
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
    if not scaling.keys() & {"rope_type", "type"} and (given := sorted(scaling.keys() & SCALES)):
        raise ValueError(f"packops.rope_table: scaling needs 'rope_type' beside {', '.join(map(repr, given))}, got {scaling}")
    if kind == "mrope":  # how Qwen2-VL's config files call the default with sections
        kind = "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"packops.rope_table: scaling['rope_type'] must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    for key, value in scaling.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        positive = key in POSITIVE
        if not all(0 < x < math.inf if positive else math.isfinite(x) for x in numbers if isinstance(x, NUMBERS)):
            wanted = "positive and finite" if positive else "finite"
            raise ValueError(f"packops.rope_table: scaling[{key!r}] must be {wanted}, got {value!r}")
    base = float(scaling.get("rope_theta") or base)
    if not 0 < base < math.inf:
        raise ValueError(f"packops.rope_table: base must be positive and finite, got {base}")

    def need(*keys: str) -> Any:
        for key in keys:
            if scaling.get(key) is not None:
                return scaling[key]
        raise ValueError(
            f"packops.rope_table: scaling of type {kind!r} needs {' or '.join(map(repr, keys))}, got {sorted(scaling)}"
        )

    index = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu")  # whatever torch.device() surrounds the call
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
        if max_position is None or max_position <= trained:
            return plain, 1.0
        return _dynamic(base, factor, trained, max_position, index), 1.0
    trained = need("original_max_position_embeddings")
    if kind == "llama3":
        return _llama3(plain, trained, need("factor"), need("low_freq_factor"), need("high_freq_factor")), 1.0
    factor = scaling.get("factor")
    if factor is None:
        factor = need("factor", "max_position_embeddings") / trained
    if kind == "longrope":
        name = "long_factor" if max_position is not None and max_position > trained else "short_factor"
        stretch = torch.tensor(need(name), dtype=torch.float64, device="cpu")
        if stretch.shape != plain.shape:
            raise ValueError(
                f"packops.rope_table: scaling[{name!r}] must have rotary_dim / 2 = {len(plain)} numbers, got {len(stretch)}"
            )
        attention = scaling.get("attention_factor")
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        return plain / stretch, float(attention)
    return _yarn(plain, base, trained, factor, scaling)


def _dynamic(base: float, factor: float, trained: int, length: int | Tensor, index: Tensor) -> Tensor:
    """NTK-aware scaling: the base grows with the length beyond the trained one. ``length`` may be a tensor on any device."""
    dim = 2 * len(index)
    if dim == 2:
        raise ValueError("packops.rope_table: scaling of type 'dynamic' needs a rotary_dim of at least 4, got 2")
    return (base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))) ** -(index / dim)


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
    stretched = ((torch.arange(len(plain), dtype=torch.float64, device="cpu") - first) / (last - first)).clamp(0, 1)

    def temperature(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature()
    return plain * (stretched / factor + 1 - stretched), float(attention)


@checks_annotations
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
    if max_position < 0:
        raise ValueError(f"packops.rope_table: max_position must not be negative, got {max_position}")
    frequencies, factor = rope_inverse_frequencies(rotary_dim, base=base, scaling=scaling, max_position=max_position)
    return _table(frequencies, factor, max_position, dtype, device)


def _table(
    frequencies: Tensor, factor: float, rows: int, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.empty(rows, len(frequencies), dtype=dtype, device=device) for _ in range(2))
    # In pieces: a table of a million positions would need a gigabyte of fp64 temporaries.
    for begin in range(0, rows, 65536):
        piece = slice(begin, min(begin + 65536, rows))
        angles = torch.outer(torch.arange(piece.start, piece.stop, dtype=torch.float64, device="cpu"), frequencies)
        cos[piece] = (angles.cos() * factor).to(dtype)
        sin[piece] = (angles.sin() * factor).to(dtype)
    return cos, sin


class Settings(NamedTuple):
    """What the frequencies depend on besides a length, as a key of a dictionary."""

    rotary_dim: int
    base: float
    scaling: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, rotary_dim: int, base: float, scaling: Mapping[str, Any] | None) -> Settings:
        items = []
        for key, value in sorted((scaling or {}).items()):
            if isinstance(value, Mapping):
                raise ValueError(f"packops.RotaryEmbedding: scaling[{key!r}] is a dictionary; pass the one of this layer's type")
            value = value.tolist() if hasattr(value, "tolist") else value
            items.append((key, tuple(value) if isinstance(value, list) else value))
        return cls(rotary_dim, base, tuple(items))


class Tables:
    """The tables of one setting: one object for all modules that share it, so that the layers of a model share them too.

    They are no buffers of a module, so no broadcast, average, cast or load changes them. What a table holds depends on the
    settings and on its key, never on the calls before.

    Attributes:
        name: the settings in one string, by which a compiled graph finds the tables again.
        kind: the type of scaling.
        trained: up to this length "dynamic" and "longrope" scale nothing; None for scalings that look at no length.
    """

    _shared: ClassVar[WeakValueDictionary[str, Tables]] = WeakValueDictionary()

    def __init__(self, settings: Settings):
        self.settings = settings
        self.name = repr(settings)
        self.scaling = dict(settings.scaling)
        self.kind = self.scaling.get("rope_type", self.scaling.get("type", "default"))
        self._made: dict[tuple[torch.device, int, bool], tuple[Tensor, Tensor]] = {}
        self.trained: int | None = None
        if self.kind in ("dynamic", "longrope"):
            self.trained = self.scaling.get("original_max_position_embeddings") or self.scaling.get("max_position_embeddings")
        self._frequencies(is_long=True)  # bad settings are an error here, not in the training loop
        self._frequencies(is_long=False)

    @classmethod
    def of(cls, settings: Settings) -> Tables:
        tables = cls._shared.get(repr(settings))
        return tables if tables is not None else cls._shared.setdefault(repr(settings), cls(settings))

    def __reduce__(self):
        return Tables.of, (self.settings,)

    def _frequencies(self, is_long: bool) -> tuple[Tensor, float]:
        length = self.trained + 1 if is_long and self.trained is not None else None
        return rope_inverse_frequencies(
            self.settings.rotary_dim, base=self.settings.base, scaling=self.scaling, max_position=length
        )

    def get(self, device: torch.device, rows: int, is_long: bool = False) -> tuple[Tensor, Tensor]:
        """``(cos, sin)`` of ``rows`` positions; ``is_long``: for a document longer than ``trained`` (LongRoPE)."""
        key = (device, rows, is_long)
        known = self._made.get(key)
        if known is None:
            known = self.make(*key)
            # Under FakeTensorMode or a transform of torch.func the tensors mean nothing to later calls.
            if type(known[0]) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(known[0]):
                self._made[key] = known
        return known

    def make(self, device: torch.device, rows: int, is_long: bool) -> tuple[Tensor, Tensor]:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"packops.RotaryEmbedding: its table of {rows} positions on {device} must exist before a CUDA graph is captured: "
                "call the module once before, or make it with device= and max_position="
            )
        with torch.inference_mode(False):  # a table made under inference mode could serve no backward pass later
            return _table(*self._frequencies(is_long), rows, torch.float32, device)

    def grown(self, longest: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The table of "dynamic" for ``longest``, a tensor without dimensions: computed where it is, without waiting for it."""
        base, dim = float(self.scaling.get("rope_theta") or self.settings.base), self.settings.rotary_dim
        index = torch.arange(0, dim, 2, dtype=torch.float64, device=longest.device)
        length = longest.double().clamp(min=self.trained)
        frequencies = _dynamic(base, self.scaling["factor"], self.trained or 1, length, index)
        angles = torch.outer(torch.arange(rows, dtype=torch.float64, device=longest.device), frequencies)
        return angles.cos().float(), angles.sin().float()


def _constant_table(name: str, device: torch.device, rows: int, is_long: bool) -> tuple[Tensor, Tensor]:
    """:meth:`Tables.get` under torch.compile and torch.export, where its result is a constant of the graph.

    By name, since before torch 2.13 a float among the settings would be symbolic, and no constant's argument can be.
    """
    return Tables._shared[name].get(device, rows, is_long)


# What torch.compiler.assume_constant_result does, without importing torch's compiler with packops.
_constant_table._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _longest_document(position_ids: Tensor | None, cu_seqlens: Tensor | None, tokens: int) -> Tensor | int:
    """A tensor without dimensions where the lengths are, or 0."""
    if position_ids is not None:
        if cu_seqlens is not None and tokens and position_ids.numel() % tokens == 0:  # what lies past it is padding
            inside = torch.arange(tokens, device=cu_seqlens.device) < cu_seqlens[-1]
            position_ids = torch.where(inside, position_ids.reshape(-1, tokens), 0)
        return position_ids.max() + 1 if position_ids.numel() else 0
    lengths = cast(Tensor, cu_seqlens).diff()
    return lengths.max() if lengths.numel() else 0


class RotaryEmbedding(nn.Module):
    """Rotates query and key heads, and knows the table of sines and cosines.

    What it returns depends on its arguments alone. It has no parameters and no buffers: the table is fp32 whatever the model's
    dtype, is made on q's device when it is first needed, and is shared by all modules of the same settings. It has
    ``max_position`` rows, doubled until the tokens of a row fit, which needs no look at the device: positions of packed or padded
    rows stay below their length. Where ``position_ids`` go further (decoding, left padding), say so with ``max_position``.

    The scalings "dynamic" and "longrope" look at the length of the longest document of the call, as the model would that is
    called on this document alone: that is ``max_seqlen``; else the longest of ``cu_seqlens``, or the largest of ``position_ids``
    plus one; without either, the length of a row. Up to the trained length they scale nothing. If the lengths are on the GPU,
    nothing waits for them: the table is chosen (longrope) or computed (dynamic) there. ``max_seqlen`` saves that work.

    Args:
        rotary_dim, base, scaling: as in :func:`rope_table`.
        max_position: rows to begin with.
        interleaved, rotary_offset, mrope_section, mrope_interleaved: as in :func:`packops.apply_rope`.
        device: make the first table there now, and not in the first call.

    Raises:
        ValueError: as :func:`rope_table`.

    >>> rope = RotaryEmbedding(64)
    >>> q, k = rope(torch.randn(7, 4, 64), torch.randn(7, 1, 64), cu_seqlens=torch.tensor([0, 3, 7]))
    """

    @checks_annotations
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
        if max_position < 1:
            raise ValueError(f"packops.RotaryEmbedding: max_position must be positive, got {max_position}")
        self.settings = Settings.of(rotary_dim, base, scaling)
        self.max_position = max_position
        self.options: dict[str, Any] = {
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
            "rotary_offset": rotary_offset,
            "mrope_section": mrope_section,
            "mrope_interleaved": mrope_interleaved,
        }
        self._tables = Tables.of(self.settings)
        if device is not None:
            self._tables.get(torch.empty(0, device=device).device, max_position)

    @property
    def cos(self) -> Tensor:
        """A copy of the table, (max_position, rotary_dim / 2) fp32 on the CPU, for documents within the trained length."""
        return self._tables.get(torch.device("cpu"), self.max_position)[0].clone()

    @property
    def sin(self) -> Tensor:
        """As :attr:`cos`."""
        return self._tables.get(torch.device("cpu"), self.max_position)[1].clone()

    def extend(self, max_position: int) -> None:
        """Begin with at least so many rows from now on."""
        self.max_position = max(self.max_position, max_position)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: str | None = None,
        max_position: int | None = None,
        max_seqlen: int | Tensor | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :func:`packops.apply_rope`.

        Args:
            max_position: one more than the largest position, where that exceeds the tokens.
            max_seqlen: length of the longest document, for the scalings that look at it. A document that began in an earlier
                call (decoding) counts from its beginning.
        """
        if not isinstance(q, Tensor):
            raise TypeError(f"packops.RotaryEmbedding: q must be a tensor, got {type(q).__name__}")
        row = q.shape[0 if q.dim() == 3 else 2 if layout == "bhsd" else 1] if q.dim() in (3, 4) else 1
        tokens = row * q.shape[0] if q.dim() == 4 else row
        reach = max_position or (row if cu_seqlens is None else tokens)  # documents of cu_seqlens may cross rows
        rows = self.max_position
        while rows < reach:
            rows *= 2
        trained = self._tables.trained
        if trained is None:
            cos, sin = self._table(q, rows)
        else:
            if max_seqlen is None:
                no_lengths = position_ids is None and cu_seqlens is None
                max_seqlen = row if no_lengths else _longest_document(position_ids, cu_seqlens, tokens)
            cos, sin = self._table_for(q, rows, max_seqlen, trained, rows if position_ids is not None else reach)
        return apply_rope(
            q,
            k,
            cos,
            sin,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            layout=layout,
            inplace=inplace,
            **self.options,
        )

    def _table(self, q: Tensor, rows: int, is_long: bool = False) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            cos, sin = _constant_table(self._tables.name, q.device, rows, is_long)
            return cos.detach(), sin.detach()  # torch 2.11 does not know whether a constant needs a gradient
        if type(q) is not Tensor and is_fake(q):
            return self._tables.make(q.device, rows, is_long)
        return self._tables.get(q.device, rows, is_long)

    def _table_for(self, q: Tensor, rows: int, longest: int | Tensor, trained: int, reach: int) -> tuple[Tensor, Tensor]:
        """The table for a longest document. Only ``reach`` of its rows are read."""
        if isinstance(longest, Tensor) and longest.is_cpu and type(longest) is Tensor and not torch.compiler.is_compiling():
            longest = int(longest)
        if not isinstance(longest, Tensor):
            if longest <= trained:  # a branch, since under torch.compile a comparison alone would be symbolic
                return self._table(q, rows)
            if self._tables.kind == "longrope":
                return self._table(q, rows, is_long=True)
            longest = torch.full((), longest, dtype=torch.float64, device=q.device)
        if self._tables.kind == "dynamic":
            return self._tables.grown(longest, reach)
        short, long = self._table(q, rows), self._table(q, rows, is_long=True)
        exceeds = longest > trained
        return torch.where(exceeds, long[0], short[0]), torch.where(exceeds, long[1], short[1])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A checkpoint of a module that kept its table among its buffers loads: the table follows from the settings."""
        for name in ("cos", "sin"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        rotary_dim, base, _ = self.settings
        return f"rotary_dim={rotary_dim}, max_position={self.max_position}, base={base}, rope_type={self._tables.kind}"
