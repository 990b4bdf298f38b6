"""Cross entropy: fake kernels, and the autograd that reads the logits once.

Where the logits need a gradient, the forward kernel also writes d loss / d logits for ``grad_output = 1`` into a buffer. The
backward hands that buffer out; a kernel first rewrites the rows whose ``grad_output`` turns out not to be 1, from the logits,
because scaling a rounded gradient would round it twice. Nothing waits for the device to find out.

Half precision and ``reduction="none"`` form the gradient in the backward only: a loss scale, or per-token weights, would make
the forward's gradient useless, and fp16 could not even hold it.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._errors import raise_typed

# Rows of the `floats` and `ints` state tensors, as csrc/torch/ops_ce_loss.cpp lays them out.
SCALE, MAX, SUM, LOSS, ENTROPY = range(5)
TARGET, PREDICTION = range(2)

MATHS = ("class_weight", "label_smoothing", "z_loss", "softcap", "logit_scale")


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that the autograd formula is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(
        forward=ops._cross_entropy_forward.default,
        forward_=ops._cross_entropy_forward_.default,
        backward=ops._cross_entropy_backward.default,
        backward_=ops._cross_entropy_backward_.default,
    )


def graph_is_kept() -> bool:
    """Whether the running backward keeps its graph, so that it may run again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def check_may_overwrite(logits: Tensor, op: str) -> None:
    """ValueError unless the gradient can take the place of the logits."""
    if logits.is_leaf:
        raise ValueError(f"packops.{op}: inplace=True would overwrite a leaf tensor that needs its value; pass a computed one")
    rows = [(size, stride) for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if size != 1]
    jumps = sum(outer != size * stride for (_, outer), (size, stride) in itertools.pairwise(rows))
    if jumps > 1 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError(
            f"packops.{op}: inplace=True needs logits with a contiguous last dimension and at most two strided leading ones, got "
            f"shape {tuple(logits.shape)} with strides {logits.stride()}"
        )


class CrossEntropyFunction(torch.autograd.Function):
    """``loss, floats, ints, counts, sequence_loss = apply(ops, logits, labels, options, with_stats, inplace)``.

    Only the loss is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, ops: SimpleNamespace, logits: Tensor, labels: Tensor, options: dict[str, Any], with_stats: bool, inplace: bool
    ):
        early = options["reduction"] != "none" and logits.dtype != torch.float16
        ctx.ops, ctx.early, ctx.inplace = ops, early, inplace
        ctx.maths = {name: options[name] for name in MATHS if name != "class_weight"}
        if inplace and early:
            loss, *stats = ops.forward_(logits, labels, **options, with_stats=with_stats)
            torch.autograd.graph.increment_version(logits)
            grad = logits
        else:
            loss, grad, *stats = ops.forward(logits, labels, **options, with_grad=early, with_stats=with_stats)
        ctx.save_for_backward(logits, grad, *stats[:2], options["class_weight"])
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any):
        grad_logits = None
        if grad_output is not None:
            logits, grad, floats, ints, class_weight = ctx.saved_tensors
            if graph_is_kept():  # what is saved must survive, and what is handed out must be the caller's alone
                if ctx.early and ctx.inplace:
                    grad_logits = grad * grad_output
                else:
                    grad_logits = ctx.ops.backward(grad_output, logits, floats, ints, class_weight=class_weight, **ctx.maths)
            elif ctx.early or ctx.inplace:
                grad_logits = grad if ctx.early else logits
                source = None if ctx.inplace else logits
                options = {"class_weight": class_weight, "holds_gradient": ctx.early, **ctx.maths}
                ctx.ops.backward_(grad_logits, grad_output, source, floats, ints, **options)
            else:
                grad_logits = ctx.ops.backward(grad_output, logits, floats, ints, class_weight=class_weight, **ctx.maths)
        return None, grad_logits, None, None, None, None


def loss_like(logits: Tensor, reduction: str) -> Tensor:
    """What a fake kernel returns as the loss."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype)


def stats_like(logits: Tensor, cu_seqlens: Tensor | None, with_stats: bool) -> tuple[Tensor, ...]:
    """What a fake kernel returns beside the loss."""
    batch = logits.shape[:-1]
    rows = batch.numel()
    documents = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch[:-1].numel()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    floats = logits.new_empty((5 if with_stats else 4, rows), dtype=dtype)
    ints = logits.new_empty((2 if with_stats else 1, rows), dtype=torch.int32)
    counts = logits.new_empty((2 if with_stats else 0,), dtype=torch.int64)
    return floats, ints, counts, logits.new_empty((documents if with_stats else 0,), dtype=dtype)


def register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    raw = raw_ops(namespace)

    @torch.library.register_fake(f"{namespace}::cross_entropy")
    def _(logits, labels, *, reduction="mean", **options):
        return loss_like(logits, reduction)

    @torch.library.register_fake(f"{namespace}::cross_entropy_stats")
    def _(logits, labels, *, cu_seqlens=None, reduction="mean", **options):
        return loss_like(logits, reduction), *stats_like(logits, cu_seqlens, True)

    @torch.library.register_fake(f"{namespace}::_cross_entropy_prepare")
    def _(vocab, labels, *, double_precision=False, **options):
        rows = labels.numel()
        scale = labels.new_empty((rows,), dtype=torch.float64 if double_precision else torch.float32)
        return labels.new_empty((rows,), dtype=torch.int32), scale, labels.new_empty((2,), dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::_cross_entropy_forward")
    def _(logits, labels, *, cu_seqlens=None, reduction="mean", with_grad=False, with_stats=False, **options):
        grad = torch.empty_like(logits) if with_grad else logits.new_empty((0,))
        return loss_like(logits, reduction), grad, *stats_like(logits, cu_seqlens, with_stats)

    @torch.library.register_fake(f"{namespace}::_cross_entropy_forward_")
    def _(logits, labels, *, cu_seqlens=None, reduction="mean", with_stats=False, **options):
        return loss_like(logits, reduction), *stats_like(logits, cu_seqlens, with_stats)

    @torch.library.register_fake(f"{namespace}::_cross_entropy_backward")
    def _(grad_output, logits, floats, ints, **maths):
        return torch.empty_like(logits)

    @torch.library.register_fake(f"{namespace}::_cross_entropy_backward_")
    def _(grad_logits, grad_output, logits, floats, ints, **options):
        return None

    def differentiable(op: Any, with_stats: bool):
        def autograd(logits, labels, **options):
            options = {**DEFAULTS, **options}
            try:
                if torch.is_grad_enabled() and logits.requires_grad:
                    outputs = CrossEntropyFunction.apply(raw, logits, labels, options, with_stats, False)
                    return outputs if with_stats else outputs[0]
                with torch._C._AutoDispatchBelowAutograd():
                    return op(logits, labels, **options)
            except RuntimeError as error:
                raise_typed(error)

        return autograd

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl("cross_entropy", differentiable(ops.cross_entropy.default, False), "Autograd")
    library.impl("cross_entropy_stats", differentiable(ops.cross_entropy_stats.default, True), "Autograd")
    _LIBRARIES.append(library)


DEFAULTS: dict[str, Any] = {
    "cu_seqlens": None,
    "shift": False,
    "reduction": "mean",
    "num_items": None,
    "ignore_index": -100,
    "token_weight": None,
    "class_weight": None,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
}
_LIBRARIES: list[torch.library.Library] = []  # a Library unregisters its kernels when it is collected
