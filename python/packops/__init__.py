"""packops: packed LLM training that is exactly the training you meant. See the README."""

from __future__ import annotations

import importlib as _importlib
import sys as _sys
import types as _types
import typing as _typing

if _sys.argv[:1] == ["-m"]:  # `python -m packops --help` is answered before torch is imported
    from .cli import program as _program

    _program.early()

from . import _loader
from ._version import __version__

_C: _types.ModuleType = _loader.load()
has_cuda: bool = bool(_C.build_info()["cuda"])
"""Whether this build has the CUDA kernels. Whether there is a GPU is another question."""

# The native ops must be there before the modules that bind and use them.
from . import ops  # noqa: E402

ops.register("packops")

from ._checks import checks  # noqa: E402
from .data.batch import PackedBatch  # noqa: E402
from .data.collator import PackingCollator, max_docs_for_flash_attention  # noqa: E402
from .data.documents import SlicedDataset  # noqa: E402
from .data.forest import PackedForest  # noqa: E402
from .data.packing import DocumentSlice, PackingPlan, pack  # noqa: E402
from .data.prefixes import PrefixForest, prefix_forest, shared_prefixes  # noqa: E402
from .data.sampler import PackedBatchSampler  # noqa: E402
from .data.stream import StreamPacker  # noqa: E402
from .distributed import loss_normalizer  # noqa: E402
from .functional import (  # noqa: E402
    CrossEntropyStats,
    add_rms_norm,
    apply_qk_norm_rope,
    apply_rope,
    attention,
    attention_path,
    cross_entropy,
    gated_activation,
    gated_linear,
    gated_mlp,
    linear_cross_entropy,
    packed_labels,
    packed_metadata,
    rms_norm,
)
from .modules import CrossEntropyLoss, RotaryEmbedding  # noqa: E402
from .ops.document_sums import document_sums  # noqa: E402
from .ops.linear_log_probs import LinearLogProbs, linear_log_probs  # noqa: E402
from .rotary import rope_table  # noqa: E402
from .verify import VerifyReport, verify  # noqa: E402

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "DocumentSlice",
    "LinearLogProbs",
    "PackedBatch",
    "PackedBatchSampler",
    "PackedForest",
    "PackingCollator",
    "PackingPlan",
    "PrefixForest",
    "RotaryEmbedding",
    "SlicedDataset",
    "StreamPacker",
    "VerifyReport",
    "__version__",
    "add_rms_norm",
    "apply_qk_norm_rope",
    "apply_rope",
    "attention",
    "attention_path",
    "checks",
    "cross_entropy",
    "document_sums",
    "gated_activation",
    "gated_linear",
    "gated_mlp",
    "has_cuda",
    "linear_cross_entropy",
    "linear_log_probs",
    "loss_normalizer",
    "max_docs_for_flash_attention",
    "pack",
    "packed_labels",
    "packed_metadata",
    "prefix_forest",
    "rms_norm",
    "rope_table",
    "shared_prefixes",
    "verify",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_log_probs",
]

_MODULES = ("distributed", "hf", "jit", "reference", "testing")

if _typing.TYPE_CHECKING:
    from . import distributed as distributed
    from . import hf as hf
    from . import jit as jit
    from . import reference as reference
    from . import testing as testing
    from .ops.vocab_parallel import (
        vocab_parallel_cross_entropy,
        vocab_parallel_linear_cross_entropy,
        vocab_parallel_linear_log_probs,
    )
else:  # a type checker that saw this function would believe in any name

    def __getattr__(name):
        """``packops.jit`` and its like are imported when they are first used; so is what brings torch's compiler along."""
        if name.startswith("vocab_parallel_") and name in __all__:
            return getattr(_importlib.import_module(f"{__name__}.ops.vocab_parallel"), name)
        if name in _MODULES:
            return _importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
