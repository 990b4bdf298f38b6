"""Cross entropy of a vocabulary that is split over processes: one process's shard, and its autograd.

The forward reads the shard once and leaves four numbers per row. Every process gathers those of all processes and combines them
in the order of the shards, so that all of them have the same loss to the last bit, whatever the collective does. The backward
reads the shard again: the gradient needs the sum over all shards, which the forward's one read cannot know yet.

The linear form does both for every chunk of rows of ``linear_ce_loss.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import linear_ce_loss as linear
from .ce_loss import MATHS, graph_is_kept
from .derivatives import no_forward_mode, once
from .lm_head import Product


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that the autograd formula is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(
        prepare=ops._cross_entropy_prepare.default,
        partial=ops._cross_entropy_partial.default,
        combine=ops._cross_entropy_combine.default,
        backward=ops._cross_entropy_backward.default,
        backward_=ops._cross_entropy_backward_.default,
        product=Product(namespace),
    )


class Shard(NamedTuple):
    """Which classes this process holds, and how to hear of the others."""

    first_class: int
    vocab_size: int
    gather: Callable[[Tensor], Tensor]  #: this process's partial state -> those of all processes, in the order of their classes
    add_up: Callable[[Tensor], None]  #: a tensor, in place, over all processes

    @property
    def classes(self) -> dict[str, int]:
        return {"first_class": self.first_class, "vocab_size": self.vocab_size}


class VocabParallelCrossEntropyFunction(torch.autograd.Function):
    """``loss, ints = apply(ops, shard, local_logits, labels, options, inplace)``; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, ops: SimpleNamespace, shard: Shard, local_logits: Tensor, labels: Tensor, options: dict[str, Any], inplace: bool
    ):
        ctx.ops, ctx.inplace = ops, inplace
        ctx.maths = {**{name: options[name] for name in MATHS if name != "class_weight"}, **shard.classes}
        class_weight = options["class_weight"]
        partial, floats, ints = ops.partial(local_logits, labels, **options, **shard.classes)
        maths = {"class_weight": class_weight, "reduction": options["reduction"], **ctx.maths}
        loss = ops.combine(shard.gather(partial), local_logits, floats, ints, **maths)
        ctx.save_for_backward(local_logits, floats, ints, class_weight)
        ctx.mark_non_differentiable(ints)
        ctx.set_materialize_grads(False)
        return loss, ints

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, unused: Any):
        grad_logits = None
        if grad_output is not None:

            def compute(grad_output, local_logits, floats, ints, class_weight):
                return ctx.ops.backward(grad_output, local_logits, floats, ints, class_weight=class_weight, **ctx.maths)

            local_logits, floats, ints, class_weight = ctx.saved_tensors
            if ctx.inplace and not graph_is_kept() and not torch.is_grad_enabled():
                maths = {"class_weight": class_weight, "holds_gradient": False, **ctx.maths}
                ctx.ops.backward_(local_logits, grad_output, None, floats, ints, **maths)
                increment_version(local_logits)
                grad_logits = local_logits
            else:
                grad_logits = once("vocab_parallel_cross_entropy", compute, grad_output, *ctx.saved_tensors)
        return None, None, grad_logits, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode("vocab_parallel_cross_entropy")


def linear_ops(ops: SimpleNamespace, op: str, shard: Shard) -> SimpleNamespace:
    """What :class:`LinearCrossEntropyFunction` is made of, where ``weight`` is this process's shard.

    Gradients of the hidden states leave with the parts of all shards added up.
    """

    def loss_of(logits: Tensor, target: Tensor, with_gradient: bool, options: dict[str, Any]) -> tuple[Tensor]:
        maths = {**{name: options[name] for name in MATHS}, **shard.classes}
        partial, floats, ints = ops.partial(logits, target, **options, **shard.classes)
        loss = ops.combine(shard.gather(partial), logits, floats, ints, reduction=options["reduction"], **maths)
        if with_gradient:
            ops.backward_(logits, loss.new_ones(()), None, floats, ints, holds_gradient=False, **maths)
        return (loss,)

    of_chunk = SimpleNamespace(
        prepare=ops.prepare,
        loss=lambda logits, target, **options: loss_of(logits, target, False, options),
        loss_and_gradient_=lambda logits, target, **options: loss_of(logits, target, True, options),
        product=ops.product,
        is_shard=True,
    )
    return linear.forward_and_backward(of_chunk, op, vocab_size=shard.vocab_size, add_up=shard.add_up)
