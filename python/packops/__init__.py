"""packops: packed LLM training that is exactly the training you meant. See the README."""

from __future__ import annotations

from . import _loader, _register

_C = _loader.load()
_register.register("packops")

from ._checks import checks  # noqa: E402
from .functional import CrossEntropyStats, cross_entropy  # noqa: E402  (the ops must be registered first)

__version__ = "0.1.0"
__all__ = ["CrossEntropyStats", "__version__", "checks", "cross_entropy"]
