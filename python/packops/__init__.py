"""packops: packed LLM training that is exactly the training you meant. See the README."""

from __future__ import annotations

from . import _loader, _register

_C = _loader.load()
_register.register("packops")

from .functional import apply_qk_norm_rope, apply_rope  # noqa: E402
from .rotary import RotaryEmbedding, rope_table  # noqa: E402

__version__ = "0.1.0"

__all__ = ["RotaryEmbedding", "apply_qk_norm_rope", "apply_rope", "rope_table"]
