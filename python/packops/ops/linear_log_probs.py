"""Log-probabilities of labels and entropies from hidden states and the lm_head, a chunk of rows at a time.

With the logits ``x' = softcap tanh(logit_scale x / softcap)`` of a row, ``x = weight @ hidden + bias``, and label y::

    lse      = log sum_j exp(x'_j)
    log_prob = x'_y - lse
    entropy  = -sum_j p_j log p_j,    p_j = exp(x'_j - lse)

    d (g log_prob + h entropy + l lse) / d x'_j  =  g (1[j = y] - p_j) - h p_j (log p_j + entropy) + l p_j

The forward keeps four numbers per row and no logits. g, h and l are not known before the backward, which makes a chunk's logits
anew, turns them into their gradient in place, and multiplies that with the hidden states and the weight: four products in all.
Logits are fp32 (fp64 for fp64) whatever the dtype of the hidden states, so they are not rounded; their gradient is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import ce_loss as ce
from . import linear_ce_loss as linear
from .linear_ce_loss import IGNORED, Wanted
from .op import library
from .vocab_shard import Shard

__all__ = ["LinearLogProbs", "linear_log_probs"]

OP = "linear_log_probs"
BAD_LABEL = _checks.BAD_LABEL
PIECE_BYTES = 1 << 26  # of logits whose gradient is formed at once: what elementwise operations need as temporaries

#: The arguments beside hidden, weight, labels and bias, and what they are when left out.
DEFAULTS: dict[str, Any] = {
    "cu_seqlens": None,
    "shift": False,
    "ignore_index": -100,
    "logit_scale": 1.0,
    "softcap": None,
    "entropy": True,
    "num_valid": None,
    "chunk_tokens": None,
}
MATHS = ("logit_scale", "softcap")
CHUNKS = ("num_valid", "chunk_tokens")


class LinearLogProbs(NamedTuple):
    """What :func:`packops.linear_log_probs` returns, per token, in the labels' shape; 0 where a token does not count."""

    log_probs: Tensor  #: of the token's label, in nats
    entropy: Tensor | None  #: of the softmax, in nats; None where it was not asked for
    lse: Tensor  #: log-sum-exp of the (scaled, capped) logits


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    num_valid: int | None = None,
    chunk_tokens: int | None = None,
) -> LinearLogProbs:
    """Log-probabilities of the labels, and entropies, without the logits: what DPO, GRPO and PPO take from a policy.

    The logits ``softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap)`` exist a chunk of tokens at a time, in fp32
    whatever the dtype of ``hidden``; both the forward and the backward make them. A gradient nobody wants
    (``requires_grad=False``) costs no product. Nothing waits for the device.

    Args:
        hidden: (..., H) bf16, fp16 or fp32 (fp64 on the CPU): what the lm_head is applied to. Rows that do not count may hold
            anything, NaN included.
        weight: (V, H), of the same dtype: a plain tensor. FSDP gathers it for the forward of the module that owns it, so the
            log-probabilities belong there.
        labels: (...) int32 or int64.
        bias: (V,) or None.
        cu_seqlens, shift, ignore_index: which label a row is scored against, and which rows count, as in :func:`cross_entropy`.
        logit_scale: 1 / temperature.
        softcap: caps the scaled logits, as in :func:`cross_entropy`.
        entropy: whether to return it.
        num_valid, chunk_tokens: as in :func:`linear_cross_entropy`. If more than ``num_valid`` rows count, that is a ValueError
            on the CPU, and on CUDA with :func:`packops.checks` on; otherwise all results are NaN.

    Returns:
        :class:`LinearLogProbs`, of the labels' shape, fp32 (fp64 for fp64); 0 where a row does not count. Every part is
        differentiable once in ``hidden``, ``weight`` and ``bias``. Sums per document: :func:`document_sums`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; it is named.
        IndexError: a label outside [0, V) that is not ``ignore_index``, on the CPU. On CUDA that row's results are NaN and its
            gradient 0, unless :func:`packops.checks` is on.
    """
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            f"packops.{OP}: weight must be a plain tensor, got a DTensor, a sharded parameter; compute the log-probabilities "
            "within the forward of the module that owns it, where FSDP has gathered it"
        )
    if isinstance(num_valid, Tensor):
        raise TypeError(f"packops.{OP}: num_valid must be an int on the host, got a Tensor; reading it would wait for the device")
    log_probs, entropies, lse = torch.ops.packops.linear_log_probs(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        entropy=entropy,
        num_valid=num_valid,
        chunk_tokens=chunk_tokens,
    )
    return LinearLogProbs(log_probs, entropies if entropy else None, lse)


class Rows(NamedTuple):
    """What the forward finds of T rows and the backward needs, fp32 (fp64 for fp64)."""

    entropy: Tensor | None
    row_max: Tensor  #: of the logits. It and log_sum stay apart: beside a maximum of 1e8 the sum would be lost
    log_sum: Tensor  #: log sum_j exp(x'_j - row_max)


class Chunk(NamedTuple):
    """Some rows, and their logits in a buffer that the next chunk uses again."""

    rows: slice | Tensor  #: which; a Tensor of their numbers where rows that do not count are left out
    hidden: Tensor  #: (c, H), zero where a row does not count: 0 * NaN in the weight's gradient would be NaN
    target: Tensor  #: (c,) int32 label, or negative
    logits: Tensor  #: (c, V) fp32 or fp64


def choose_chunk_tokens(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, num_valid: int | None = None) -> int:
    """Rows of a chunk, as for the loss; of 16-bit dtypes a row's logits take two elements and their gradient one."""
    return linear.choose_chunk_tokens(tokens, hidden_size, vocab, num_valid=num_valid, copies=3 if dtype.itemsize == 2 else 1)


def chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_valid: int | None,
    chunk_tokens: int | None,
) -> Iterator[Chunk]:
    """Of hidden (T, H) and target (T,): all rows, or with ``num_valid`` the rows that count and some more."""
    (tokens, hidden_size), vocab = hidden.shape, weight.shape[0]
    order = None
    if num_valid is not None and num_valid < tokens:
        order = (target < 0).to(torch.uint8).argsort(stable=True)[:num_valid]
    rows = tokens if order is None else order.shape[0]
    if chunk_tokens is None:
        compacted = None if order is None else rows
        chunk_tokens = choose_chunk_tokens(tokens, hidden_size, vocab, hidden.dtype, num_valid=compacted)
    wide = state_dtype(hidden)
    buffer = linear.logits_buffer(hidden, min(chunk_tokens, rows), vocab, wide)
    for begin in range(0, rows, chunk_tokens):
        here: slice | Tensor = slice(begin, min(begin + chunk_tokens, rows))
        if order is None:
            y = target[here]
            h = hidden[here].masked_fill((y < 0)[:, None], 0)
        else:
            here = order[here]
            y = target.index_select(0, here)
            h = hidden.index_select(0, here).masked_fill_((y < 0)[:, None], 0)
        logits = buffer[: len(y)]
        linear.make_logits(h, weight, bias, out=logits)
        yield Chunk(here, h, y, logits)
        del h, y  # before the next chunk's are made


def state_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def rows_of(
    ops: SimpleNamespace, logits: Tensor, target: Tensor, maths: dict[str, Any], with_entropy: bool, shard: Shard | None
) -> tuple[Tensor, Rows]:
    """Log-probabilities and the rest, from one read of the logits: the forward of the cross-entropy kernel."""
    if logits.dtype == torch.float64:  # the kernel's options are fp32
        _scale_and_cap_(logits, **maths)
        maths = {}
    local = target if shard is None else _column(target, shard, logits.shape[1], elsewhere=0)
    loss, _, floats, *_ = ops.forward(
        logits, local, reduction="none", ignore_index=IGNORED, with_grad=False, with_stats=with_entropy, **maths
    )
    rows = Rows(floats[ce.ENTROPY] if with_entropy else None, floats[ce.MAX], floats[ce.SUM].log())
    return (loss.neg(), rows) if shard is None else _over_shards(loss.neg(), rows, target, shard, logits.shape[1])


def _column(target: Tensor, shard: Shard, width: int, elsewhere: int) -> Tensor:
    """The label as a column of this shard, or ``elsewhere`` where another has it; negative labels stay."""
    local = target - shard.first_class
    return torch.where(target < 0, target, torch.where((local >= 0) & (local < width), local, elsewhere))


def _over_shards(log_prob: Tensor, rows: Rows, target: Tensor, shard: Shard, width: int) -> tuple[Tensor, Rows]:
    """What every shard knows of its own classes, combined in the order of the shards, so that all have the same bits.

    With w_r the probability of shard r, and H_r the entropy of its classes alone: ``entropy = sum_r w_r (H_r - log w_r)``.
    """
    owned = (target >= shard.first_class) & (target < shard.first_class + width)
    entropy = torch.zeros_like(log_prob) if rows.entropy is None else rows.entropy
    place = log_prob.new_tensor([shard.first_class, width])
    everyone = shard.gather(torch.cat([rows.row_max, rows.log_sum, entropy, log_prob, owned.to(place.dtype), place]))
    everyone = everyone.view(-1, 5 * len(target) + 2)
    maxima, log_sums, entropies, log_probs, owners = everyone[:, :-2].view(len(everyone), 5, -1).unbind(1)
    begins, widths = everyone[:, -2:].unbind(1)
    lined_up = (begins == widths.cumsum(0) - widths).all() & (widths.sum() == shard.vocab_size)

    row_max = maxima.amax(0)
    empty = maxima == -torch.inf  # such a shard's own softmax is NaN
    relative = torch.where(empty, -torch.inf, maxima - row_max + log_sums)
    log_sum = relative.logsumexp(0)
    log_share = relative - log_sum
    share = log_share.exp()
    if rows.entropy is not None:
        entropy = torch.where(share > 0, share * (entropies - log_share), 0).sum(0)
    log_prob = torch.where(owners > 0, log_share + torch.where(empty, 0, log_probs), 0).sum(0)
    log_prob = log_prob.masked_fill(~lined_up, torch.nan)
    return log_prob, Rows(None if rows.entropy is None else entropy, row_max, log_sum)


def _scale_and_cap_(logits: Tensor, logit_scale: float, softcap: float | None) -> None:
    if softcap is not None:
        logits.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    elif logit_scale != 1:
        logits.mul_(logit_scale)


def gradient_of_logits_(
    logits: Tensor,
    target: Tensor,
    rows: Rows,
    g: Tensor | None,
    h: Tensor | None,
    l: Tensor | None,  # noqa: E741
    *,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Replace logits (c, V) by the gradient that the module's docstring states, for g, h and l (c,), None meaning 0.

    target: column of the label, negative where it is none of these. Rows whose g, h and l are 0 get 0, or NaN where the logits
    are not finite.
    """
    zero = torch.zeros_like(rows.row_max)
    g_, l_ = zero if g is None else g, zero if l is None else l
    of_p = l_ - g_
    if h is not None and rows.entropy is not None:
        of_p = of_p - h * rows.entropy
    column = target.clamp(min=0).long()[:, None]
    has_label = (target >= 0)[:, None]
    pieces = max(1, PIECE_BYTES // max(1, logits.shape[1] * logits.element_size()))
    for begin in range(0, len(logits), pieces):
        here = slice(begin, begin + pieces)
        x = logits[here]
        slope = None
        if softcap is not None:
            slope = (x * (logit_scale / softcap)).cosh_().square_().reciprocal_()  # 1 - tanh² would cancel near the cap
        _scale_and_cap_(x, logit_scale, softcap)
        log_p = x.sub_(rows.row_max[here, None]).sub_(rows.log_sum[here, None])
        at = column[here]
        if g is not None:
            # 1 - p of the label, to the digits that a confident row has left
            of_one = g_[here, None] * -log_p.gather(1, at).expm1()
        if h is None:
            x.exp_()
            of_label = x.gather(1, at) * (of_p + g_)[here, None]
            x.mul_(of_p[here, None])
        else:
            p = x.exp()
            x.clamp_(min=-1e4).neg_()  # where p is 0, p log p is 0
            x.mul_(h[here, None])
            of_label = (x.gather(1, at) + (of_p + g_)[here, None]) * p.gather(1, at)
            x.add_(of_p[here, None]).mul_(p)
            del p
        if g is not None:
            x.scatter_(1, at, torch.where(has_label[here], of_one + of_label, x.gather(1, at)))
        if logit_scale != 1:
            x.mul_(logit_scale)
        if slope is not None:
            x.mul_(slope)


def forward_and_backward(ops: SimpleNamespace, op: str = OP, shard: Shard | None = None) -> SimpleNamespace:
    """What :class:`LinearLogProbsFunction` is made of. Where ``weight`` is one of several shards, gradients of the hidden states
    leave with the parts of all shards added up."""

    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, **given: Any
    ) -> tuple[Tensor, Rows, Tensor]:
        vocab = weight.shape[0] if shard is None else shard.vocab_size
        target, counts = prepare(ops, hidden, vocab, labels, given, op)
        flat, maths = hidden.reshape(-1, hidden.shape[-1]), {name: given[name] for name in MATHS}
        log_probs, row_max, log_sum = torch.zeros((3, len(target)), dtype=state_dtype(hidden), device=hidden.device)
        rows = Rows(torch.zeros_like(row_max) if given["entropy"] else None, row_max, log_sum)
        for chunk in chunks(flat, weight, bias, target, **{name: given[name] for name in CHUNKS}):
            log_prob, found = rows_of(ops, chunk.logits, chunk.target, maths, given["entropy"], shard)
            for whole, part in zip((log_probs, *rows), (log_prob, *found), strict=True):
                if whole is not None and part is not None:
                    whole[chunk.rows] = part
        unread = target < 0
        wrong = None
        if hidden.is_cuda:  # what the CPU refuses must show
            wrong = target == BAD_LABEL
            if given["num_valid"] is not None:
                wrong = wrong | (counts[0] > given["num_valid"])

        def finish(x: Tensor) -> Tensor:
            x = x.masked_fill(unread, 0)
            return x if wrong is None else x.masked_fill_(wrong, torch.nan)

        entropy = None if rows.entropy is None else finish(rows.entropy)
        return finish(log_probs), Rows(entropy, finish(row_max), finish(log_sum)), target

    def backward(
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Rows,
        wanted: Wanted,
        **given: Any,
    ) -> list[Tensor | None]:
        flat, dtype = hidden.reshape(-1, hidden.shape[-1]), linear.accumulator_dtype(hidden.dtype, torch.float32)
        tokens, vocab = len(flat), weight.shape[0]
        coefficients = [None if x is None else x.reshape(-1).to(rows.row_max.dtype).masked_fill(target < 0, 0) for x in grads]
        unit = None
        if hidden.dtype == torch.float16 and tokens:
            unit = _unit(coefficients, rows.entropy, given["logit_scale"])
            coefficients = [None if x is None else x / unit for x in coefficients]
        device = hidden.device
        grad_hidden = torch.zeros(flat.shape, dtype=dtype, device=device) if wanted.hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=device) if wanted.weight else None
        grad_bias = torch.zeros(vocab, dtype=dtype, device=device) if wanted.bias else None
        maths = {name: given[name] for name in MATHS}
        for number, chunk in enumerate(chunks(flat, weight, bias, target, **{name: given[name] for name in CHUNKS})):
            entropy = None if rows.entropy is None else rows.entropy[chunk.rows]
            of_rows = Rows(entropy, rows.row_max[chunk.rows], rows.log_sum[chunk.rows])
            column = chunk.target
            if shard is not None:
                column = _column(column, shard, vocab, elsewhere=IGNORED)
            gradient_of_logits_(
                chunk.logits, column, of_rows, *(None if x is None else x[chunk.rows] for x in coefficients), **maths
            )
            chunk.logits.masked_fill_((chunk.target < 0)[:, None], 0)
            part = None
            if grad_hidden is not None:
                part = grad_hidden[chunk.rows] if isinstance(chunk.rows, slice) else torch.empty_like(chunk.hidden, dtype=dtype)
            # Matrix units take two operands of one dtype.
            grad_logits = chunk.logits.to(hidden.dtype) if hidden.is_cuda else chunk.logits
            linear.multiply(grad_logits, chunk.hidden, weight, part, grad_weight, grad_bias, first=number == 0)
            if grad_hidden is not None and part is not None and not isinstance(chunk.rows, slice):
                grad_hidden[chunk.rows] = part
        if grad_hidden is not None and shard is not None:
            shard.add_up(grad_hidden)
        made = (None if grad_hidden is None else grad_hidden.view(hidden.shape), grad_weight, grad_bias)
        return [None if x is None else (x if unit is None else x * unit).to(hidden.dtype) for x in made]

    return SimpleNamespace(forward=forward, backward=backward)


def _unit(coefficients: list[Tensor | None], entropy: Tensor | None, logit_scale: float) -> Tensor:
    """What fp16 gradients are measured in, a power of two: the largest is about 2^8 units, far from both of fp16's ends."""
    g, h, l = coefficients  # noqa: E741
    bounds = [x.abs().amax() for x in (g, l) if x is not None]
    if h is not None and entropy is not None:
        bounds.append((h.abs() * (entropy.nan_to_num() + 1)).amax())
    largest = torch.stack(bounds).sum() * max(logit_scale, 1.0)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 8)


def prepare(
    ops: SimpleNamespace, hidden: Tensor, vocab: int, labels: Tensor, given: dict[str, Any], op: str
) -> tuple[Tensor, Tensor]:
    """target (T,) int32 and counts of the rows; data that is wrong raises here on the CPU, and on CUDA with checks on."""
    options = {**ce.DEFAULTS, "reduction": "none", **{name: given[name] for name in ("cu_seqlens", "shift", "ignore_index")}}
    options |= {name: given[name] for name in MATHS}
    target, _, counts = linear.prepare(ops, hidden, vocab, labels, {**options, "num_valid": given["num_valid"]}, op=op)
    return target, counts


class LinearLogProbsFunction(torch.autograd.Function):
    """``log_probs, entropy, row_max, log_sum, target = apply(ops, hidden, weight, bias, labels, options)``, one of each per row.

    Differentiable through log_probs, entropy and log_sum; row_max + log_sum is lse, and its gradient comes in through log_sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: SimpleNamespace,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: dict[str, Any],
    ):
        log_probs, entropy, row_max, log_sum, target = ops.forward(hidden, weight, labels, bias=bias, **options)
        ctx.ops, ctx.options = ops, {name: options[name] for name in (*MATHS, *CHUNKS)}
        ctx.wanted = Wanted(*ctx.needs_input_grad[1:4])
        ctx.save_for_backward(hidden, weight, bias, target, entropy, row_max, log_sum)
        ctx.mark_non_differentiable(row_max, target, *([] if options["entropy"] else [entropy]))
        ctx.set_materialize_grads(False)
        return log_probs, entropy, row_max, log_sum, target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, _max: Any, l: Tensor | None, _target: Any):  # noqa: E741
        if g is None and h is None and l is None:
            return (None,) * 6
        hidden, weight, bias, target, *rows = ctx.saved_tensors
        flags = {f"grad_{name}": want for name, want in ctx.wanted._asdict().items()}
        grads = ctx.ops.backward(g, h, l, hidden, weight, target, *rows, bias=bias, **ctx.options, **flags)
        made = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
        return None, *made, None, None


def results(found: Sequence[Tensor], shape: torch.Size, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs, entropy and lse in the labels' shape."""
    log_probs, entropy, row_max, log_sum, _ = found
    return log_probs.view(shape), entropy.view(shape) if with_entropy else entropy, (row_max + log_sum).view(shape)


def register(namespace: str) -> None:
    """Define ``linear_log_probs`` and the ops that its autograd formula is made of."""
    ops = getattr(torch.ops, namespace)
    kernels = library(namespace)
    rows = "Tensor? cu_seqlens=None, bool shift=False, int ignore_index=-100"
    maths = "float logit_scale=1.0, float? softcap=None"
    chunk = "SymInt? num_valid=None, SymInt? chunk_tokens=None"
    inputs = f"Tensor hidden, Tensor weight, Tensor labels, *, Tensor? bias=None, {rows}, {maths}, bool entropy=True, {chunk}"
    kernels.define(f"{OP}({inputs}) -> (Tensor, Tensor, Tensor)")
    kernels.define(f"_{OP}_forward({inputs}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    kernels.define(
        f"_{OP}_backward(Tensor? grad_log_probs, Tensor? grad_entropy, Tensor? grad_lse, Tensor hidden, Tensor weight, Tensor "
        "target, Tensor entropy, Tensor row_max, Tensor log_sum, *, Tensor? bias=None, "
        f"{maths}, {chunk}, bool grad_hidden=False, bool grad_weight=False, bool grad_bias=False) -> (Tensor, Tensor, Tensor)"
    )
    public = getattr(ops, OP).default
    raw = SimpleNamespace(forward=getattr(ops, f"_{OP}_forward").default, backward=getattr(ops, f"_{OP}_backward").default)
    work = as_ops(forward_and_backward(raw_ops(namespace)))

    def forward(hidden, weight, labels, *, bias=None, **given):
        given = {**DEFAULTS, **given}
        check(OP, hidden, weight, bias, labels, given)
        return work.forward(hidden, weight, labels, bias=bias, **given)

    def backward(*args, **given):
        given = {**{name: DEFAULTS[name] for name in (*MATHS, *CHUNKS)}, **given}  # a schema's defaults do not arrive
        made = work.backward(*args, **given)
        return tuple(args[3].new_empty((0,)) if x is None else x for x in made)  # an op cannot return None

    def plain(hidden, weight, labels, *, entropy=True, **given):
        return results(forward(hidden, weight, labels, entropy=entropy, **given), labels.shape, entropy)

    for key in ("CPU", "CUDA"):
        kernels.impl(OP, plain, key)
        kernels.impl(f"_{OP}_forward", forward, key)
        kernels.impl(f"_{OP}_backward", backward, key)

    def row_like(hidden: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(hidden)
        row = hidden.new_empty((labels.numel(),), dtype=dtype)
        return row, hidden.new_empty((labels.numel() if entropy else 0,), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::{OP}")
    def _(hidden, weight, labels, *, entropy=True, **given):
        row, entropies = row_like(hidden, labels, entropy)
        log_probs = row.new_empty(labels.shape)
        return log_probs, torch.empty_like(log_probs) if entropy else entropies, torch.empty_like(log_probs)

    @torch.library.register_fake(f"{namespace}::_{OP}_forward")
    def _(hidden, weight, labels, *, entropy=True, **given):
        row, entropies = row_like(hidden, labels, entropy)
        target = labels.new_empty((labels.numel(),), dtype=torch.int32)
        return row, entropies, torch.empty_like(row), torch.empty_like(row), target

    @torch.library.register_fake(f"{namespace}::_{OP}_backward")
    def _(grad_log_probs, grad_entropy, grad_lse, hidden, weight, *args, **given):
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        wanted = linear.wanted_of(given)
        return tuple(hidden.new_empty(shape if want else (0,)) for want, shape in zip(wanted, shapes, strict=True))

    def autograd(hidden, weight, labels, *, bias=None, **given):
        needs = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if torch.is_grad_enabled() and needs:
            options = {**DEFAULTS, **given}
            found = LinearLogProbsFunction.apply(raw, hidden, weight, bias, labels, options)
            return results(found, labels.shape, options["entropy"])
        with torch._C._AutoDispatchBelowAutograd():
            return public(hidden, weight, labels, bias=bias, **given)

    kernels.impl(OP, autograd, "Autograd")
    linear.implement_autocast(kernels, OP, public)


def as_ops(work: SimpleNamespace) -> SimpleNamespace:
    """The two passes with tensors in the place of tuples, as an op takes and returns them."""

    @torch.no_grad()
    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, **given: Any) -> tuple[Tensor, ...]:
        log_probs, rows, target = work.forward(hidden, weight, labels, **given)
        entropy = log_probs.new_empty((0,)) if rows.entropy is None else rows.entropy
        return log_probs, entropy, rows.row_max, rows.log_sum, target

    @torch.no_grad()
    def backward(
        g: Tensor | None,
        h: Tensor | None,
        l: Tensor | None,  # noqa: E741
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        entropy: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        *,
        bias: Tensor | None = None,
        **given: Any,
    ) -> list[Tensor | None]:
        rows = Rows(None if h is None else entropy, row_max, log_sum)
        return work.backward((g, h, l), hidden, weight, bias, target, rows, linear.wanted_of(given), **given)

    return SimpleNamespace(forward=forward, backward=backward)


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that a chunk is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(prepare=ops._cross_entropy_prepare.default, forward=ops._cross_entropy_forward.default)


def check(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, given: dict[str, Any]) -> None:
    linear.check_arguments(
        hidden, weight, bias, labels, **{name: given[name] for name in CHUNKS}, accum_dtype=torch.float32, op=op
    )
