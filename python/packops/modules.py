"""The operations as :class:`torch.nn.Module`: options when it is made, tensors when it is called, no logic of its own."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import CrossEntropyStats, Reduction, cross_entropy
from .rotary import RotaryEmbedding

__all__ = ["CrossEntropyLoss", "RotaryEmbedding"]


class CrossEntropyLoss(nn.Module):
    """:func:`packops.cross_entropy` with its options fixed.

    Unlike :class:`torch.nn.CrossEntropyLoss` it takes the classes in the last dimension, and gives 0 where nothing counts.

    Args:
        class_weight: (V,) float per class: a buffer, so it moves with the module and is part of its state dict, as torch's is.
        shift, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, inplace, return_stats: as in
            :func:`packops.cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: when it is called, as :func:`packops.cross_entropy`.

    >>> loss = CrossEntropyLoss(shift=True, reduction="seq-mean-token-mean")
    >>> loss(torch.randn(9, 50), torch.arange(9), cu_seqlens=torch.tensor([0, 7, 9])).shape
    torch.Size([])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        shift: bool = False,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace: bool = False,
        return_stats: bool = False,
    ):
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.shift = shift
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.inplace = inplace
        self.return_stats = return_stats

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        num_items: Tensor | float | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """What changes from batch to batch: shapes and meaning as in :func:`packops.cross_entropy`."""
        return cross_entropy(
            logits,
            labels,
            cu_seqlens=cu_seqlens,
            shift=self.shift,
            reduction=self.reduction,
            num_items=num_items,
            ignore_index=self.ignore_index,
            token_weight=token_weight,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            inplace=self.inplace,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, shift={self.shift}, ignore_index={self.ignore_index}"
