"""Hugging Face models with packops: ``packops.hf.apply(model)``, and its undo.

Importing this imports no transformers; the first call does. See docs/hugging_face.md.
"""

from __future__ import annotations

from .log_probs import log_probs
from .loss import CausalLMLoss, compute_loss_func
from .patch import apply, report, revert
from .record import Report
from .trainer import count_documents, count_weights

__all__ = [
    "CausalLMLoss",
    "Report",
    "apply",
    "compute_loss_func",
    "count_documents",
    "count_weights",
    "log_probs",
    "report",
    "revert",
]
