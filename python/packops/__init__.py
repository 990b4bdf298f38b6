"""packops: packed LLM training that is exactly the training you meant. See the README."""

from __future__ import annotations

from . import _loader, _register

_C = _loader.load()
_register.register("packops")

from .functional import packed_labels, packed_metadata  # noqa: E402 - the ops exist only now

__version__ = "0.1.0"

__all__ = ["packed_labels", "packed_metadata"]
