"""Fake kernels and autograd for every op of one namespace (``packops``, or a JIT experiment's)."""

from __future__ import annotations

from . import (
    attention,
    ce_loss,
    document_sums,
    gated_linear,
    linear_ce_loss,
    linear_log_probs,
    metadata,
    qk_norm_rope,
    rms_norm,
    rope,
    vocab_parallel,
)


def register(namespace: str) -> None:
    """Give ``torch.ops.<namespace>`` its fake kernels and gradients. Call once, after the library is loaded."""
    ce_loss.register(namespace)
    linear_ce_loss.register(namespace)
    linear_log_probs.register(namespace)
    vocab_parallel.register(namespace)
    metadata.register(namespace)
    document_sums.register(namespace)
    rope.register(namespace)
    qk_norm_rope.register(namespace)
    gated_linear.register(namespace)
    rms_norm.register(namespace)
    attention.register(namespace)
