"""The ops as functions, under the name that :mod:`torch.nn.functional` has for its own."""

from __future__ import annotations

from .ops.attention import attention, attention_path
from .ops.ce_loss import CrossEntropyStats, Reduction, cross_entropy
from .ops.gated_linear import Activation, gated_activation, gated_linear
from .ops.gated_mlp import gated_mlp
from .ops.linear_ce_loss import linear_cross_entropy
from .ops.metadata import packed_labels, packed_metadata
from .ops.qk_norm_rope import apply_qk_norm_rope
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rope import apply_rope

__all__ = [
    "Activation",
    "CrossEntropyStats",
    "Reduction",
    "add_rms_norm",
    "apply_qk_norm_rope",
    "apply_rope",
    "attention",
    "attention_path",
    "cross_entropy",
    "gated_activation",
    "gated_linear",
    "gated_mlp",
    "linear_cross_entropy",
    "packed_labels",
    "packed_metadata",
    "rms_norm",
]
