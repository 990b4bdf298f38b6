"""Linear cross entropy: the lm_head and the loss, one chunk of rows at a time, so that the logits never exist as a whole.

Per chunk of c rows, with logits (c, V) in one buffer that every chunk uses again::

    logits  = hidden @ weight.T + bias          2 c V H flops
    loss, logits <- its gradient, in place      the cross-entropy kernel, which reads and writes them once
    grad_hidden  = logits @ weight              2 c V H
    grad_weight += logits.T @ hidden            2 c V H, accumulated in fp32 by the product itself

Gradients are formed for ``grad_output = 1`` while the chunk's logits exist; the backward multiplies them by ``grad_output`` on
their way from fp32 to the parameters' dtype, so they are rounded once. With ``reduction="none"`` the weight's gradient depends on
every token's ``grad_output``, which the forward cannot know: then the backward makes the logits anew, a fourth product.

The loop is Python: a chunk costs it about a tenth of a millisecond and the device several. Nothing in it waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _checks
from .._errors import raise_typed
from . import autocast
from .arguments import check_types, is_dtensor, kinds_of
from .ce_loss import (
    CONSTANTS,
    LOSS,
    MATHS,
    PREDICTION,
    CrossEntropyStats,
    LossOptions,
    Reduction,
    as_num_items,
    graph_is_kept,
    stats_of,
)
from .ce_loss import DEFAULTS as CE_DEFAULTS
from .ce_loss import stats_like as ce_stats_like
from .derivatives import Link, check_constants, is_differentiated, no_forward_mode, once, refuse_transforms
from .document_sums import document_sums
from .linear_ce_chunks import keeps_logits, losses_and_gradients, raw_ops, weight_gradient
from .lm_head import (
    Wanted,
    accumulator_dtype,
    check_main_grad,
    finish,
    logits_buffer,
    stand_in,
    wanted_of,
)
from .op import below_autograd, fakes, library, maths_dtype, typed
from .scaled_rows import scaled_rows_

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["linear_cross_entropy"]

OP = "linear_cross_entropy"
REFUSED = "use packops.cross_entropy of the logits"
CHUNKS = ("num_valid", "chunk_tokens", "accum_dtype", "logits_dtype")
KINDS = {
    **dict.fromkeys(("hidden", "weight", "labels"), "Tensor"),
    "bias": "Tensor?",
    **{name: kind for name, kind in kinds_of(torch.ops.packops.cross_entropy.default).items() if name in CE_DEFAULTS},
    **dict.fromkeys(("num_valid", "chunk_tokens"), "int?"),
    "accum_dtype": "ScalarType",
    "logits_dtype": "ScalarType?",
    "main_grad": "Tensor?",
    "return_stats": "bool",
}


class LinearCrossEntropyOptions(LossOptions, total=False):
    """The keyword arguments of :func:`linear_cross_entropy` that its form over ranks shares."""

    num_valid: int | None
    chunk_tokens: int | None
    accum_dtype: torch.dtype
    logits_dtype: torch.dtype | None
    main_grad: Tensor | None


class LinearCrossEntropyFunction(torch.autograd.Function):
    """``loss = apply(ops, hidden, weight, bias, labels, options, with_stats, link)``; :meth:`call` makes the link.

    ``with_stats``: also what ``cross_entropy_stats`` returns beside the loss. Only the loss is differentiable."""

    @classmethod
    def call(
        cls,
        ops: SimpleNamespace,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: dict[str, Any],
        with_stats: bool = False,
    ) -> Any:
        return cls.apply(ops, hidden, weight, bias, labels, options, with_stats, (Link.apply(ops.op, hidden, weight, bias),))

    @staticmethod
    def forward(
        ctx: Any,
        ops: SimpleNamespace,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: dict[str, Any],
        with_stats: bool,
        link: tuple[Tensor],
    ):
        wanted = Wanted(*ctx.needs_input_grad[1:4])
        # Each row of the hidden states' gradient belongs to one token: its grad_output can be multiplied on later. Ranks add that
        # gradient up, all in the same pass, whatever else each of them wants.
        early = options["reduction"] != "none" or not (ops.is_shared or wanted.weight or wanted.bias)
        flags = {f"grad_{name}": want for name, want in wanted._asdict().items()} if early else {}
        if with_stats:
            flags["with_stats"] = True
        options = {**options}
        ctx.main_grad = options.pop("main_grad")  # not kept as saved tensors are, whose versions are compared: others add to it
        ctx.leaf = weight if ctx.main_grad is not None and hasattr(weight, "grad_added_to_main_grad") else None
        chunks = {name: options[name] for name in CHUNKS}
        ctx.keeps_logits = early and wanted.weight and keeps_logits(hidden, **chunks)
        if ctx.keeps_logits:
            flags["keep_logits"] = True
        loss, *grads, unit, target, scale, floats, ints, counts, sequence_loss = ops.forward(
            hidden, weight, labels, bias=bias, **options, **flags
        )
        ctx.ops, ctx.wanted, ctx.early, ctx.dtype = ops, wanted, early, hidden.dtype
        ctx.per_token = options["reduction"] == "none"
        ctx.link = link[0]
        if early:
            ctx.num_valid = options["num_valid"]
            ctx.save_for_backward(target, unit, *grads, *((hidden,) if ctx.keeps_logits else ()))
        else:
            ctx.save_for_backward(target, scale, hidden, weight, bias, options["class_weight"])
            ctx.options = {name: options[name] for name in (*MATHS, *CHUNKS) if name != "class_weight"}
        ctx.set_materialize_grads(False)
        if not with_stats:
            return loss
        ctx.mark_non_differentiable(floats, ints, counts, sequence_loss)
        return loss, floats, ints, counts, sequence_loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any):
        if grad_output is None:
            return (None,) * 8
        keep = graph_is_kept() or torch.is_grad_enabled()  # then what is saved must survive
        saved = ctx.saved_tensors

        def compute(grad_output: Tensor, _link: Tensor, *saved: Tensor) -> tuple:
            factor: Tensor | None
            if ctx.early:
                target, unit, *grads = saved
                keeps = keep
                factor = grad_output * unit if ctx.dtype == torch.float16 else grad_output
                if ctx.per_token:  # only the hidden states' gradient is wanted, and it has a row for each
                    factor = factor.masked_fill(target.view(factor.shape) < 0, 0).flatten()
            else:
                target, scale, hidden, weight, bias, class_weight = saved
                flags = {f"grad_{name}": want for name, want in ctx.wanted._asdict().items()}
                *grads, unit = ctx.ops.backward(
                    grad_output, hidden, weight, target, scale, bias=bias, class_weight=class_weight, **ctx.options, **flags
                )
                keeps = False
                factor = unit if ctx.dtype == torch.float16 else None
            main_grad: Tensor | None = ctx.main_grad

            def of_weight(grad: Tensor) -> Tensor | None:
                if ctx.keeps_logits:
                    hidden = grads[len(Wanted._fields)]
                    given = (grad_output, grad, hidden, target, unit)
                    if main_grad is None:
                        return ctx.ops.weight_gradient(*given, num_valid=ctx.num_valid)
                    ctx.ops.add_weight_gradient(main_grad, *given, num_valid=ctx.num_valid)
                elif main_grad is None:
                    return finish(grad, factor, ctx.dtype, keeps)
                else:
                    scaled_rows_(main_grad, grad, factor, add=True)
                increment_version(main_grad)
                return stand_in(ctx.leaf)

            return tuple(
                None if not want else of_weight(grad) if name == "weight" else finish(grad, factor, ctx.dtype, keeps)
                for name, want, grad in zip(Wanted._fields, ctx.wanted, grads, strict=False)
            )

        return None, *once(ctx.ops.op, compute, grad_output, ctx.link, *saved), *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(OP)


DEFAULTS: dict[str, Any] = {
    **CE_DEFAULTS,
    "num_valid": None,
    "chunk_tokens": None,
    "accum_dtype": None,
    "logits_dtype": None,
    "main_grad": None,
}


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_valid: int | None,
    chunk_tokens: int | None,
    accum_dtype: torch.dtype | None,
    logits_dtype: torch.dtype | None = None,
    op: str = OP,
    least: int = 1,
) -> None:
    """TypeError or ValueError for what the ops that do the work would not name as the caller does. least: classes of a weight,
    which may be a shard that holds none."""

    def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
        if not condition:
            raise error(f"packops.{op}: {message}")

    def show(x: Tensor) -> str:
        return str(tuple(x.shape))

    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require(hidden.dim() >= 1, "hidden must have shape (..., hidden_size), got a 0-d tensor")
    require(hidden.dtype in floats, f"hidden must be bfloat16, float16 or float32, got {hidden.dtype}", TypeError)
    require(hidden.shape[-1] >= 1, f"hidden must have at least one feature, got {show(hidden)}")
    require(weight.dim() == 2, f"weight must have shape (vocab, hidden_size), got {show(weight)}")
    require(
        weight.shape[1] == hidden.shape[-1],
        f"weight must have shape (vocab, {hidden.shape[-1]}) for hidden {show(hidden)}, got {show(weight)}",
    )
    require(weight.shape[0] >= least or hidden.numel() == 0, "weight must have at least one class, got none")
    require(weight.dtype == hidden.dtype, f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}", TypeError)
    require(weight.device == hidden.device, f"weight must be on hidden's device {hidden.device}, got {weight.device}")
    if bias is not None:
        require(bias.shape == weight.shape[:1], f"bias must have shape ({weight.shape[0]},), got {show(bias)}")
        require(bias.dtype == hidden.dtype, f"bias must have hidden's dtype {hidden.dtype}, got {bias.dtype}", TypeError)
        require(bias.device == hidden.device, f"bias must be on hidden's device {hidden.device}, got {bias.device}")
    require(
        labels.shape == hidden.shape[:-1],
        f"labels must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {show(labels)}",
    )
    require(labels.device == hidden.device, f"labels must be on hidden's device {hidden.device}, got {labels.device}")
    tokens = labels.numel()
    if num_valid is not None:
        require(0 <= num_valid <= tokens, f"num_valid must be between 0 and the {tokens} rows, got {num_valid}")
    if chunk_tokens is not None:
        require(chunk_tokens >= 1, f"chunk_tokens must be at least 1, got {chunk_tokens}")
    require(
        accum_dtype in (None, torch.float32) or accum_dtype == hidden.dtype != torch.float16,
        f"accum_dtype must be torch.float32, or torch.bfloat16 for bfloat16 parameters, got {accum_dtype} for {hidden.dtype}",
    )
    require(
        logits_dtype is None or logits_dtype == hidden.dtype or (logits_dtype == torch.float32 and hidden.dtype.itemsize == 2),
        f"logits_dtype must be None, torch.float32 or hidden's dtype {hidden.dtype}, got {logits_dtype}",
    )


def prepare(
    ops: SimpleNamespace, hidden: Tensor, vocab: int, labels: Tensor, options: dict[str, Any], op: str = OP
) -> tuple[Tensor, ...]:
    """target, scale and counts of the rows; data that is wrong raises here on the CPU, and on CUDA with checks on."""
    num_valid = options["num_valid"]
    options = {name: options[name] for name in CE_DEFAULTS}
    try:
        target, scale, counts = ops.prepare(vocab, labels, **options, double_precision=hidden.dtype == torch.float64)
    except Exception as error:
        raise_typed(error, op=op)
    if hidden.is_cuda and not _checks.enabled():
        return target, scale, counts
    if hidden.is_cuda:
        _checks.raise_bad_rows(
            labels,
            options["cu_seqlens"],
            target,
            shift=options["shift"],
            ignore_index=options["ignore_index"],
            vocab=vocab,
            op=op,
        )
    if num_valid is not None and num_valid < int(counts[0]):
        counted = int(counts[0])
        raise ValueError(f"packops.{op}: num_valid must be at least the number of rows that count ({counted}), got {num_valid}")
    return target, scale, counts


def forward_and_backward(
    ce: SimpleNamespace, op: str = OP, *, vocab_size: int | None = None, add_up: Callable[[Tensor], None] | None = None
) -> SimpleNamespace:
    """What :class:`LinearCrossEntropyFunction` is made of, with None for gradients that nobody wants. op: whom errors name.

    Where ``weight`` is one of several shards, ``vocab_size`` is that of all, and ``add_up`` adds a tensor up over them, in place.
    """

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, given: dict[str, Any]):
        flat, maths = hidden.reshape(-1, hidden.shape[-1]), {name: given[name] for name in MATHS}
        chunks = {name: given[name] for name in CHUNKS}
        chunks |= {name: given.get(name, False) for name in ("with_stats", "keep_logits")}
        result, unit = losses_and_gradients(ce, flat, weight, bias, target, scale, maths, wanted_of(given), **chunks)
        grad_hidden = result.grad_hidden
        if grad_hidden is not None:
            if add_up is not None:
                add_up(grad_hidden)
            grad_hidden = grad_hidden.view(hidden.shape)
        return result.rows, grad_hidden, result.grad_weight, result.grad_bias, unit

    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, **given: Any):
        target, scale, counts = prepare(ce, hidden, vocab_size or weight.shape[0], labels, given, op)
        (losses, *stats), *grads = run(hidden, weight, bias, target, scale, given)
        if given["reduction"] == "none":
            loss = losses.view(labels.shape)
        else:
            loss = losses.sum(dtype=torch.float64).to(losses.dtype)
        if given["num_valid"] is not None and hidden.is_cuda:  # a row left out must show
            loss = loss.masked_fill(counts[0] > given["num_valid"], torch.nan)
        if not stats:
            return loss, *grads, target, scale, *(loss.new_empty((0,), dtype=dtype) for dtype in NO_STATS)
        floats, ints = stats
        prediction = ints[PREDICTION].masked_fill(target < 0, -1)  # rows that were left out hold nothing
        ints = torch.stack([target, prediction])
        return loss, *grads, target, scale, floats, ints, counts, _sequence_loss(floats[LOSS], labels, target, given)

    def backward(
        grad_output: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, scale: Tensor, *, bias: Tensor | None, **given: Any
    ):
        return run(hidden, weight, bias, target, scale * grad_output.reshape(-1), given)[1:]

    of_weight = functools.partial(weight_gradient, ce.product)

    def add_weight_gradient(main_grad: Tensor, *given: Any, num_valid: int | None = None) -> None:
        of_weight(*given, num_valid=num_valid, main_grad=main_grad)

    return SimpleNamespace(
        forward=forward,
        backward=backward,
        weight_gradient=of_weight,
        add_weight_gradient=add_weight_gradient,
        is_shared=add_up is not None,
        op=op,
    )


NO_STATS = (torch.float32, torch.int32, torch.int64, torch.float32)  # dtypes of what an op returns instead


def _sequence_loss(row_loss: Tensor, labels: Tensor, target: Tensor, given: dict[str, Any]) -> Tensor:
    """Each document's mean, or for "seq-mean-token-sum" its sum; 0 where nothing counts."""
    cu_seqlens, counted = given["cu_seqlens"], target >= 0
    if cu_seqlens is None:
        length = labels.shape[-1] if labels.dim() else 1
        cu_seqlens = torch.arange(math.prod(labels.shape[:-1]) + 1, device=labels.device) * length
    weight = counted.to(row_loss.dtype)
    if given["token_weight"] is not None:
        weight = torch.where(counted, given["token_weight"].reshape(-1).to(weight.dtype), 0)
    sums = document_sums(torch.where(counted, row_loss * weight, 0), cu_seqlens)
    if given["reduction"] == "seq-mean-token-sum":
        return sums
    if given["class_weight"] is not None:
        weight = weight * given["class_weight"].to(weight.dtype)[target.clamp(min=0)]
    weights = document_sums(weight, cu_seqlens)
    return torch.where(weights != 0, sums / weights, 0)


def register(namespace: str) -> None:
    """Define ``linear_cross_entropy`` and the ops its autograd formula is made of, with the options of ``cross_entropy``."""
    ops = getattr(torch.ops, namespace)
    ce = raw_ops(namespace)
    kernels = library(namespace)

    options = str(ops.cross_entropy.default._schema).split("Tensor labels, *, ")[1].split(") ->")[0]
    maths = options[options.index("Tensor? class_weight") :]
    # None is float32: AOTInductor passes a dtype that is the default as an int, which its own runtime refuses (torch 2.13)
    chunks = "SymInt? num_valid=None, SymInt? chunk_tokens=None, ScalarType? accum_dtype=None, ScalarType? logits_dtype=None"
    flags = "bool grad_hidden=False, bool grad_weight=False, bool grad_bias=False"
    stats = "Tensor floats, Tensor ints, Tensor counts, Tensor sequence_loss"
    inputs = "Tensor hidden, Tensor weight, Tensor labels, *, Tensor? bias=None"
    kernels.define(f"{OP}({inputs}, {options}, {chunks}, Tensor? main_grad=None) -> Tensor")
    kernels.define(f"{OP}_stats({inputs}, {options}, {chunks}, Tensor? main_grad=None) -> (Tensor loss, {stats})")
    kernels.define(
        f"_{OP}_forward({inputs}, {options}, {chunks}, {flags}, bool keep_logits=False, bool with_stats=False) -> (Tensor loss, "
        f"Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor unit, Tensor target, Tensor scale, {stats})"
    )
    # Two ops: torch 2.11 does not compile one that may write to an argument and returns one tensor.
    kept = "Tensor grad_output, Tensor grad_logits, Tensor hidden, Tensor target, Tensor unit, *, SymInt? num_valid=None"
    kernels.define(f"_{OP}_weight_gradient({kept}) -> Tensor")
    kernels.define(f"_{OP}_add_weight_gradient(Tensor(a!) main_grad, {kept}) -> ()")
    kernels.define(
        f"_{OP}_backward(Tensor grad_output, Tensor hidden, Tensor weight, Tensor target, Tensor scale, *, Tensor? bias=None, "
        f"{maths}, {chunks}, {flags}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor unit)"
    )
    public, public_stats = getattr(ops, OP).default, getattr(ops, f"{OP}_stats").default
    raw = SimpleNamespace(
        forward=getattr(ops, f"_{OP}_forward").default,
        backward=getattr(ops, f"_{OP}_backward").default,
        weight_gradient=getattr(ops, f"_{OP}_weight_gradient").default,
        add_weight_gradient=getattr(ops, f"_{OP}_add_weight_gradient").default,
        is_shared=False,
        op=OP,
    )

    work = forward_and_backward(ce)

    def as_outputs(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
        return [like.new_empty((0,)) if grad is None else grad for grad in grads]  # an op cannot return None

    @torch.no_grad()
    def forward(hidden, weight, labels, *, bias=None, **given):
        given = {**DEFAULTS, **given}
        check_arguments(hidden, weight, bias, labels, **{name: given[name] for name in CHUNKS})
        loss, *grads, target, scale, floats, ints, counts, sums = work.forward(hidden, weight, labels, bias=bias, **given)
        return loss, *as_outputs(grads, scale), target, scale, floats, ints, counts, sums

    @torch.no_grad()
    def backward(grad_output, hidden, weight, target, scale, *, bias=None, **given):
        grads = work.backward(grad_output, hidden, weight, target, scale, bias=bias, **{**DEFAULTS, **given})
        return tuple(as_outputs(grads, scale))

    def loss_only(hidden, weight, labels, *, main_grad=None, **given):
        return forward(hidden, weight, labels, **given)[0]

    def loss_and_stats(hidden, weight, labels, *, main_grad=None, **given):
        loss, *_, floats, ints, counts, sequence_loss = forward(hidden, weight, labels, with_stats=True, **given)
        return loss, floats, ints, counts, sequence_loss

    for key in ("CPU", "CUDA"):
        kernels.impl(OP, loss_only, key)
        kernels.impl(f"{OP}_stats", loss_and_stats, key)
        kernels.impl(f"_{OP}_forward", forward, key)
        kernels.impl(f"_{OP}_backward", backward, key)
        kernels.impl(f"_{OP}_weight_gradient", torch.no_grad()(work.weight_gradient), key)
        kernels.impl(f"_{OP}_add_weight_gradient", torch.no_grad()(work.add_weight_gradient), key)

    def state_like(hidden: Tensor) -> Tensor:
        return hidden.new_empty((0,), dtype=maths_dtype(hidden))

    def loss_like(hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return state_like(hidden).new_empty(labels.shape if reduction == "none" else ())

    def grads_like(hidden: Tensor, weight: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
        wanted = wanted_of(given)
        dtype = accumulator_dtype(hidden.dtype, given.get("accum_dtype"))
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        made = [
            hidden.new_empty(shape, dtype=dtype) if want else state_like(hidden)
            for want, shape in zip(wanted, shapes, strict=True)
        ]
        if given.get("keep_logits", False):
            num_valid, tokens = given.get("num_valid"), hidden.numel() // hidden.shape[-1]
            made[1] = logits_buffer(hidden, tokens if num_valid is None else num_valid, weight.shape[0], hidden.dtype)
        unit = state_like(hidden)
        if any(wanted) and hidden.dtype == torch.float16:
            unit = unit.new_empty(())
        return *made, unit

    fake = fakes(namespace)

    @fake(OP)
    def _(hidden, weight, labels, *, reduction="mean", **given):
        return loss_like(hidden, labels, reduction)

    def stats_like(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, with_stats: bool) -> tuple[Tensor, ...]:
        if with_stats:
            return ce_stats_like(state_like(hidden).new_empty((*labels.shape, 0)), cu_seqlens, True)
        return tuple(state_like(hidden).new_empty((0,), dtype=dtype) for dtype in NO_STATS)

    @fake(f"{OP}_stats")
    def _(hidden, weight, labels, *, cu_seqlens=None, reduction="mean", **given):
        return loss_like(hidden, labels, reduction), *stats_like(hidden, labels, cu_seqlens, True)

    @fake(f"_{OP}_forward")
    def _(hidden, weight, labels, *, cu_seqlens=None, reduction="mean", with_stats=False, **given):
        target = labels.new_empty((labels.numel(),), dtype=torch.int32)
        scale = state_like(hidden).new_empty((labels.numel(),))
        loss = loss_like(hidden, labels, reduction)
        return loss, *grads_like(hidden, weight, given), target, scale, *stats_like(hidden, labels, cu_seqlens, with_stats)

    @fake(f"_{OP}_backward")
    def _(grad_output, hidden, weight, target, scale, **given):
        return grads_like(hidden, weight, given)

    @fake(f"_{OP}_weight_gradient")
    def _(grad_output, grad_logits, hidden, *args, **given):
        return hidden.new_empty((grad_logits.shape[1], hidden.shape[-1]))

    @fake(f"_{OP}_add_weight_gradient")
    def _(*args, **given):
        return None

    def differentiable(op: Any, with_stats: bool):
        below = below_autograd(op)

        def autograd(hidden, weight, labels, *, bias=None, **given):
            refuse_transforms(OP, REFUSED)
            check_constants(OP, {name: given.get(name) for name in CONSTANTS})
            check_main_grad(OP, given.get("main_grad"), weight, hidden.dtype)
            if any(x is not None and is_differentiated(x) for x in (hidden, weight, bias)):
                options = {**DEFAULTS, **given}
                return LinearCrossEntropyFunction.call(raw, hidden, weight, bias, labels, options, with_stats)
            return below(hidden, weight, labels, bias=bias, **given)

        return typed(autograd)

    for name, op, with_stats in ((OP, public, False), (f"{OP}_stats", public_stats, True)):
        kernels.impl(name, differentiable(op, with_stats), "Autograd")
        autocast.register(kernels, name, op, autocast.lower_precision, keywords=("bias",))


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[Tensor, CrossEntropyStats]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    return_stats: bool,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor | tuple[Tensor, CrossEntropyStats]: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_valid: int | None = None,
    chunk_tokens: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """``cross_entropy(hidden @ weight.T + bias, labels, ...)`` without the logits: the lm_head and the loss in one.

    The logits exist a chunk of tokens at a time. Their gradient, and from it those of ``hidden``, ``weight`` and ``bias``, are
    formed while they do. With 16-bit parameters there is one chunk up to about 3 H tokens, where all logits take no more memory
    than a chunk and the accumulator of ``weight``; the backward then forms its gradient. A gradient nobody wants
    (``requires_grad=False``) costs no product. Peak memory beyond the gradients is at most 0.35 of what the logits would take
    for 3000 tokens or more, plus the accumulators (see ``accum_dtype``). Nothing waits for the device.

    Args:
        hidden: (..., H) bf16, fp16 or fp32 (fp64 on the CPU): what the lm_head is applied to. Rows that do not count may hold
            anything, NaN included.
        weight: (V, H), of the same dtype: a plain tensor. FSDP gathers it for the forward of the module that owns it, so the loss
            belongs there.
        labels: (...) int32 or int64.
        bias: (V,) or None.
        cu_seqlens, shift, reduction, num_items, ignore_index: as in :func:`cross_entropy`.
        token_weight, class_weight, label_smoothing, z_loss, softcap, logit_scale: as in :func:`cross_entropy`.
        num_valid: how many rows count, after ``shift``, boundaries and ``ignore_index``, or an upper bound of it: a host int,
            which whoever packed the batch knows (``PackedBatch.num_valid``). Then the other rows cost no matrix product. If more
            rows count, that is a ValueError on the CPU, and on CUDA with :func:`packops.checks` on; otherwise the loss is NaN.
        chunk_tokens: rows of a chunk; None: chosen from the shapes. Fewer need less memory; below about 1000 the matrix units
            idle. As many as there are tokens: the gradient of 16-bit logits is kept for the backward, and nothing is accumulated.
        accum_dtype: in which the gradients are accumulated over the chunks: ``torch.float32`` (``4 V H + 4 T H`` bytes, held
            until the backward), or for bf16 parameters ``torch.bfloat16`` (half of that, and less accurate with every chunk).
        logits_dtype: ``torch.float32`` keeps the logits of 16-bit parameters in fp32; chunks are smaller for it (on Hopper, where
            no gradient is wanted, the logits never leave the product). None: the dtype of ``hidden``.
        main_grad: (V, H) fp32 (fp64 for fp64), contiguous: ``weight.main_grad`` of Megatron-LM and Transformer Engine. The
            backward adds the gradient of ``weight`` to it, in fp32 and not rounded, and autograd gets none for ``weight``. It
            does so whenever it runs, also where other gradients alone are asked for, as Megatron's layers do. If the parameter
            has an attribute ``grad_added_to_main_grad``, the backward sets it and autograd gets memory that Megatron's hooks drop
            unread (not in compiled code). None: autograd gets the gradient, in the dtype of ``weight``.
        return_stats: also return :class:`CrossEntropyStats`.

    Returns:
        The loss, fp32 (fp64 for fp64): () or, for ``"none"``, the labels' shape. Differentiable once, for any ``grad_output``.
        ``reduction="none"`` makes the logits twice if ``weight`` or ``bias`` needs a gradient: in the backward again, because
        the weight's gradient depends on each token's ``grad_output``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cross_entropy`.
    """
    if is_dtensor(weight):
        raise TypeError(
            "packops.linear_cross_entropy: weight must be a plain tensor, got a DTensor, a sharded parameter; compute the loss "
            "within the forward of the module that owns it, where FSDP has gathered it"
        )
    options = {
        "bias": bias,
        "cu_seqlens": cu_seqlens,
        "shift": shift,
        "reduction": reduction,
        "num_items": as_num_items(OP, num_items),
        "ignore_index": ignore_index,
        "token_weight": token_weight,
        "class_weight": class_weight,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "num_valid": num_valid,
        "chunk_tokens": chunk_tokens,
        "accum_dtype": accum_dtype,
        "logits_dtype": logits_dtype,
        "main_grad": main_grad,
    }
    named = {"hidden": hidden, "weight": weight, "labels": labels, "return_stats": return_stats, **options}
    check_types(OP, KINDS, named.items())
    check_constants(OP, {name: options[name] for name in CONSTANTS})
    refuse_transforms(OP, REFUSED)
    op = torch.ops.packops.linear_cross_entropy_stats if return_stats else torch.ops.packops.linear_cross_entropy
    result = op(hidden, weight, labels, **options)
    return (result[0], stats_of(labels.shape, *result[1:])) if return_stats else result
