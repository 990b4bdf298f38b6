"""packops: packed LLM training that is exactly the training you meant. See the README."""

from __future__ import annotations

from . import _loader, _register

_C = _loader.load()
_register.register("packops")

# The ops must be registered before the modules that use them.
from ._checks import checks  # noqa: E402
from .documents import SlicedDataset  # noqa: E402
from .functional import (  # noqa: E402
    CrossEntropyStats,
    apply_qk_norm_rope,
    apply_rope,
    cross_entropy,
    packed_labels,
    packed_metadata,
)
from .packing import DocumentSlice, PackingPlan, pack  # noqa: E402
from .rotary import RotaryEmbedding, rope_table  # noqa: E402
from .stream import StreamPacker  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyStats",
    "DocumentSlice",
    "PackingPlan",
    "RotaryEmbedding",
    "SlicedDataset",
    "StreamPacker",
    "__version__",
    "apply_qk_norm_rope",
    "apply_rope",
    "checks",
    "cross_entropy",
    "pack",
    "packed_labels",
    "packed_metadata",
    "rope_table",
]
