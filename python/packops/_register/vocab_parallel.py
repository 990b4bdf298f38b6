"""Cross entropy of a vocabulary that is split over processes: fake kernels, and the autograd of one process's shard.

The forward reads the shard once and leaves four numbers per row. Every process gathers those of all processes and combines them
in the order of the shards, so that all of them have the same loss to the last bit, whatever the collective does. The backward
reads the shard again: the gradient needs the sum over all shards, which the forward's one read cannot know yet.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .ce_loss import MATHS, _graph_is_kept, loss_like, stats_like

PARTIAL_STATES = 4  # numbers per row of a partial state; two more follow: csrc/ce_loss.h


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that the autograd formula is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(
        partial=ops._cross_entropy_partial.default,
        combine=ops._cross_entropy_combine.default,
        backward=ops._cross_entropy_backward.default,
        backward_=ops._cross_entropy_backward_.default,
    )


class VocabParallelCrossEntropyFunction(torch.autograd.Function):
    """``loss, ints = apply(ops, gather, local_logits, labels, options, shard, inplace)``; only the loss is differentiable.

    ``gather`` turns this process's partial state into that of all processes, ``shard`` says which classes are here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: SimpleNamespace,
        gather: Callable[[Tensor], Tensor],
        local_logits: Tensor,
        labels: Tensor,
        options: dict[str, Any],
        shard: dict[str, int],
        inplace: bool,
    ):
        ctx.ops, ctx.inplace = ops, inplace
        ctx.maths = {**{name: options[name] for name in MATHS if name != "class_weight"}, **shard}
        class_weight = options["class_weight"]
        partial, floats, ints = ops.partial(local_logits, labels, **options, **shard)
        maths = {"class_weight": class_weight, "reduction": options["reduction"], **ctx.maths}
        loss = ops.combine(gather(partial), local_logits, floats, ints, **maths)
        ctx.save_for_backward(local_logits, floats, ints, class_weight)
        ctx.mark_non_differentiable(ints)
        ctx.set_materialize_grads(False)
        return loss, ints

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, unused: Any):
        grad_logits = None
        if grad_output is not None:
            local_logits, floats, ints, class_weight = ctx.saved_tensors
            maths = {"class_weight": class_weight, **ctx.maths}
            if ctx.inplace and not _graph_is_kept():
                ctx.ops.backward_(local_logits, grad_output, None, floats, ints, holds_gradient=False, **maths)
                grad_logits = local_logits
            else:
                grad_logits = ctx.ops.backward(grad_output, local_logits, floats, ints, **maths)
        return None, None, grad_logits, None, None, None, None


def register(namespace: str) -> None:
    @torch.library.register_fake(f"{namespace}::_cross_entropy_partial")
    def _(logits, labels, *, cu_seqlens=None, **options):
        floats, ints, *_ = stats_like(logits, cu_seqlens, False)
        return floats.new_empty((PARTIAL_STATES * logits.shape[:-1].numel() + 2,)), floats, ints

    @torch.library.register_fake(f"{namespace}::_cross_entropy_combine")
    def _(partials, logits, floats, ints, *, reduction="mean", **options):
        return loss_like(logits, reduction)
