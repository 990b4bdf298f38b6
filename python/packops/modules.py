"""The ops as :class:`torch.nn.Module`: options when it is made, tensors when it is called, no logic of its own."""

from __future__ import annotations

from .ops.ce_loss import CrossEntropyLoss
from .rotary import RotaryEmbedding

__all__ = ["CrossEntropyLoss", "RotaryEmbedding"]
