"""The ops, a module each: the public function, the fake kernels, the autograd. :mod:`.op` binds what is common to them."""

from __future__ import annotations

import torch

from .. import _loader
from . import (
    attention,
    ce_loss,
    document_sums,
    flops,
    gated_linear,
    gated_mlp,
    linear_ce_loss,
    linear_log_probs,
    metadata,
    qk_norm_rope,
    rms_norm,
    rope,
    scaled_rows,
)

MODULES = (
    ce_loss,
    linear_ce_loss,
    linear_log_probs,
    metadata,
    document_sums,
    rope,
    qk_norm_rope,
    gated_linear,
    gated_mlp,
    rms_norm,
    attention,
    scaled_rows,
)


def register(namespace: str) -> None:
    """Give ``torch.ops.<namespace>`` its fake kernels and gradients. Call once, after the library is loaded."""
    if torch._C._dispatch_has_kernel(f"{namespace}::linear_cross_entropy"):  # which is made here
        raise _loader.second_time(namespace)
    for module in MODULES:
        module.register(namespace)
    flops.register(namespace)
