"""Log-probabilities of labels and entropies from hidden states and the lm_head, a chunk of rows at a time.

With the logits ``x' = softcap tanh(logit_scale x / softcap)`` of a row, ``x = weight @ hidden + bias``, and label y::

    lse      = log sum_j exp(x'_j)
    log_prob = x'_y - lse
    entropy  = -sum_j p_j log p_j,    p_j = exp(x'_j - lse)

    d (g log_prob + h entropy + l lse) / d x'_j  =  g (1[j = y] - p_j) - h p_j (log p_j + entropy) + l p_j

The forward keeps four numbers per row and no logits. g, h and l are not known before the backward, which makes the logits anew,
turns them into their gradient in place, and multiplies that with the hidden states and the weight: four products in all. The
forward takes a chunk of rows at a time. The backward knows lse, so it can take a block of the vocabulary for all rows at a time:
then the weight's gradient is final at once, and only that of the hidden states, which is smaller, is accumulated.
Logits are fp32 (fp64 for fp64) whatever the dtype of the hidden states, so they are not rounded; their gradient is rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _checks
from . import autocast, lm_head
from . import ce_loss as ce
from . import linear_ce_loss as linear
from .arguments import check_types, is_dtensor
from .derivatives import is_differentiated, no_forward_mode, once, refuse_transforms
from .lm_head import (
    IGNORED,
    Product,
    Wanted,
    accumulator_dtype,
    check_main_grad,
    choose_block_columns,
    column_blocks,
    finish,
    hidden_rows,
    logits_buffer,
    make_logits,
    product_,
    row_chunks,
    rows_to_score,
    stand_in,
    take,
    unit_of,
    wanted_of,
    weight_gradient_,
)
from .op import below_autograd, fakes, library, maths_dtype, may_be_saved
from .vocab_shard import Shard

__all__ = ["LinearLogProbs", "linear_log_probs"]

OP = "linear_log_probs"
REFUSED = "use torch.log_softmax of the logits"
BAD_LABEL = _checks.BAD_LABEL
ELSEWHERE = 2**31 - 1  # a column that no shard has
PARTIAL_STATES = 5  # numbers per row that shards tell each other; two more follow
LEAST_LOG = -1e4  # stands for log 0: where p is 0, p log p is 0
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
    "main_grad": None,
}
MATHS = ("logit_scale", "softcap")
CHUNKS = ("num_valid", "chunk_tokens")


class LinearLogProbsOptions(TypedDict, total=False):
    """The keyword arguments of :func:`linear_log_probs` that its form over ranks shares."""

    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    logit_scale: float
    softcap: float | None
    entropy: bool
    num_valid: int | None
    chunk_tokens: int | None
    main_grad: Tensor | None


class LinearLogProbs(NamedTuple):
    """What :func:`packops.linear_log_probs` returns, per token, in the labels' shape; 0 where a token does not count."""

    log_probs: Tensor  #: of the token's label, in nats
    entropy: Tensor | None  #: of the softmax, in nats; None where it was not asked for
    lse: Tensor  #: log-sum-exp of the (scaled, capped) logits


may_be_saved(LinearLogProbs)


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
    main_grad: Tensor | None = None,
) -> LinearLogProbs:
    """Log-probabilities of the labels, and entropies, without the logits: what DPO, GRPO and PPO take from a policy.

    The logits ``softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap)`` exist a chunk at a time, in fp32 whatever
    the dtype of ``hidden``; both the forward and the backward make them. A gradient nobody wants (``requires_grad=False``) costs
    no product. Nothing waits for the device.

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
        main_grad: as in :func:`linear_cross_entropy`.

    Returns:
        :class:`LinearLogProbs`, of the labels' shape, fp32 (fp64 for fp64); 0 where a row does not count. Every part is
        differentiable once in ``hidden``, ``weight`` and ``bias``. Sums per document: :func:`document_sums`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; it is named.
        IndexError: a label outside [0, V) that is not ``ignore_index``, on the CPU. On CUDA that row's results are NaN and its
            gradient 0, unless :func:`packops.checks` is on.
    """
    if is_dtensor(weight):
        raise TypeError(
            f"packops.{OP}: weight must be a plain tensor, got a DTensor, a sharded parameter; compute the log-probabilities "
            "within the forward of the module that owns it, where FSDP has gathered it"
        )
    options = {
        "bias": bias,
        "cu_seqlens": cu_seqlens,
        "shift": shift,
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "entropy": entropy,
        "num_valid": num_valid,
        "chunk_tokens": chunk_tokens,
        "main_grad": main_grad,
    }
    named = {"hidden": hidden, "weight": weight, "labels": labels, **options}
    check_types(OP, {**linear.KINDS, "entropy": "bool"}, named.items())
    refuse_transforms(OP, REFUSED)
    log_probs, entropies, lse = torch.ops.packops.linear_log_probs(hidden, weight, labels, **options)
    return LinearLogProbs(log_probs, entropies if entropy else None, lse)


class Rows(NamedTuple):
    """What the forward finds of T rows and the backward needs, fp32 (fp64 for fp64)."""

    entropy: Tensor | None
    row_max: Tensor  #: of the logits. It and log_sum stay apart: beside a maximum of 1e8 the sum would be lost
    log_sum: Tensor  #: log sum_j exp(x'_j - row_max)


def choose_chunk_tokens(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, num_valid: int | None = None) -> int:
    """Rows of a chunk, as for the loss."""
    return lm_head.choose_chunk_tokens(tokens, hidden_size, vocab, num_valid=num_valid, copies=copies_of(dtype))


def copies_of(dtype: torch.dtype) -> int:
    """Of 16-bit dtypes a row's logits take two elements and their gradient one."""
    return 3 if dtype.itemsize == 2 else 1


def rows_of(
    ops: SimpleNamespace, logits: Tensor, target: Tensor, maths: dict[str, Any], with_entropy: bool
) -> tuple[Tensor, Rows]:
    """Log-probabilities and the rest: the forward of the cross-entropy kernel. May change the logits."""
    if not logits.shape[1]:  # a shard without classes
        none = logits.new_zeros(len(logits))
        return none, Rows(none if with_entropy else None, torch.full_like(none, -torch.inf), none)
    if logits.dtype == torch.float64:  # the kernel's options are fp32
        _scale_and_cap_(logits, **maths)
        maths = {}
    options = {"reduction": "none", "ignore_index": IGNORED, "with_grad": False, **maths}
    loss, _, floats, *_ = ops.forward(logits, target, with_stats=with_entropy, **options)
    return loss.neg(), Rows(floats[ce.ENTROPY] if with_entropy else None, floats[ce.MAX], floats[ce.SUM].log())


def block_columns(rows: int, vocab: int, dtype: torch.dtype, by_product: bool, chunk_tokens: int | None) -> int:
    """Columns of a block in the backward, all rows of which take the memory of ``chunk_tokens`` rows of the whole vocabulary."""
    if chunk_tokens is None or rows == 0:
        return choose_block_columns(vocab, copies=1 if by_product else copies_of(dtype))
    return min(-(-vocab * chunk_tokens // (8 * rows)) * 8, vocab)


def _column(target: Tensor, first: int, width: int, elsewhere: int) -> Tensor:
    """The label as one of ``width`` columns from class ``first`` on, or ``elsewhere``; negative labels stay."""
    local = target - first
    return torch.where(target < 0, target, torch.where((local >= 0) & (local < width), local, elsewhere))


def _over_shards(log_prob: Tensor, rows: Rows, target: Tensor, shard: Shard, width: int) -> tuple[Tensor, Rows]:
    """What every shard knows of its own classes, combined in the order of the shards, so that all have the same bits.

    With w_r the probability of shard r, and H_r the entropy of its classes alone: ``entropy = sum_r w_r (H_r - log w_r)``.
    """
    owned = (target >= shard.first_class) & (target < shard.first_class + width)
    entropy = torch.zeros_like(log_prob) if rows.entropy is None else rows.entropy
    place = [log_prob.new_full((1,), number) for number in (shard.first_class, width)]  # a list would be copied to the device
    everyone = shard.gather(torch.cat([rows.row_max, rows.log_sum, entropy, log_prob, owned.to(log_prob.dtype), *place]))
    everyone = everyone.view(-1, PARTIAL_STATES * len(target) + 2)
    maxima, log_sums, entropies, log_probs, owners = everyone[:, :-2].view(len(everyone), PARTIAL_STATES, -1).unbind(1)
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
    row_max: Tensor,
    log_sum: Tensor,
    on_p: Tensor | None,
    on_p_log: Tensor | None,
    on_label: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Replace logits (c, V) by ``on_p p + on_p_log p log p + on_label 1[label]`` times the slope of scale and cap.

    target: column of the label, negative where it is none of these. Rows of zeros get 0, or NaN where the logits are not finite.
    """
    on_p = torch.zeros_like(row_max) if on_p is None else on_p
    column = target.clamp(min=0).long()[:, None]
    has_label = (target >= 0)[:, None]
    rows = max(1, PIECE_BYTES // max(1, logits.shape[1] * logits.element_size()))
    for begin in range(0, len(logits), rows):
        here = slice(begin, begin + rows)
        x, at = logits[here], column[here]
        slope = None
        if softcap is not None:
            slope = (x * (logit_scale / softcap)).cosh_().square_().reciprocal_()  # 1 - tanh² would cancel near the cap
        _scale_and_cap_(x, logit_scale, softcap)
        log_p = x.sub_(row_max[here, None]).sub_(log_sum[here, None])
        of_label = None
        if on_label is not None:  # 1 - p to the digits that a confident row has left
            log_p_label = log_p.gather(1, at)
            rest = on_p[here, None] + on_label[here, None]
            if on_p_log is not None:
                rest = rest + on_p_log[here, None] * log_p_label.clamp(min=LEAST_LOG)
            of_label = on_label[here, None] * -log_p_label.expm1() + log_p_label.exp() * rest
        if on_p_log is None:
            x.exp_().mul_(on_p[here, None])
        else:
            p = x.exp()
            x.clamp_(min=LEAST_LOG).mul_(on_p_log[here, None]).add_(on_p[here, None]).mul_(p)
            del p
        if of_label is not None:
            x.scatter_(1, at, torch.where(has_label[here], of_label, x.gather(1, at)))
        if logit_scale != 1:
            x.mul_(logit_scale)
        if slope is not None:
            x.mul_(slope)


def forward_and_backward(ops: SimpleNamespace, op: str = OP, shard: Shard | None = None) -> SimpleNamespace:
    """What :class:`LinearLogProbsFunction` is made of. Where ``weight`` is one of several shards, gradients of the hidden states
    leave with the parts of all shards added up."""

    def chunks_of(
        given: dict[str, Any], target: Tensor, dtype: torch.dtype, sizes: tuple[int, int], product_rows: int | None
    ) -> tuple[Iterator[slice | Tensor], int]:
        """Which rows each chunk has, and how many the largest; ``product_rows``: where the product needs no logits."""
        num_valid, chunk_tokens = given["num_valid"], given["chunk_tokens"]
        tokens = len(target)
        compacted = num_valid if num_valid is not None and num_valid < tokens else None
        if chunk_tokens is None:
            chunk_tokens = product_rows or choose_chunk_tokens(tokens, *sizes, dtype, num_valid=compacted)
        rows = tokens if compacted is None else compacted
        return row_chunks(target, num_valid, chunk_tokens), min(chunk_tokens, rows)

    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, **given: Any
    ) -> tuple[Tensor, Rows, Tensor]:
        vocab = weight.shape[0]
        target, counts = prepare(ops, hidden, vocab if shard is None else shard.vocab_size, labels, given, op)
        flat, maths, with_entropy = hidden.reshape(-1, hidden.shape[-1]), {name: given[name] for name in MATHS}, given["entropy"]
        log_probs, row_max, log_sum = torch.zeros((3, len(target)), dtype=maths_dtype(hidden), device=hidden.device)
        rows = Rows(torch.zeros_like(row_max) if with_entropy else None, row_max, log_sum)
        product = ops.product if ops.product.fits(flat, weight) else None
        bias = None if bias is None else bias.contiguous()
        sizes = (flat.shape[1], vocab)
        chunks, largest = chunks_of(given, target, hidden.dtype, sizes, None if product is None else Product.ROWS)
        buffer = None if product is not None else logits_buffer(hidden, largest, vocab, row_max.dtype)
        for here in chunks:
            y = take(target, here)
            column = y if shard is None else _column(y, shard.first_class, vocab, elsewhere=0)
            if product is not None:
                log_prob, *found = product.statistics(take(flat, here), weight, bias, column, *maths.values(), with_entropy)
                of_chunk = Rows(found[0] if with_entropy else None, *found[1:])
            elif buffer is not None:
                logits = buffer[: len(y)]
                make_logits(hidden_rows(flat, target, here)[0], weight, bias, out=logits)
                log_prob, of_chunk = rows_of(ops, logits, column, maths, with_entropy)
            for whole, part in zip((log_probs, *rows), (log_prob, *of_chunk), strict=True):
                if whole is not None and part is not None:
                    whole[here] = part
        if shard is not None:
            log_probs, rows = _over_shards(log_probs, rows, target, shard, vocab)
        unread = target < 0
        wrong = None
        if hidden.is_cuda:  # what the CPU refuses must show
            wrong = target == BAD_LABEL
            if given["num_valid"] is not None:
                wrong = wrong | (counts[0] > given["num_valid"])

        def mask(x: Tensor) -> Tensor:
            x = x.masked_fill(unread, 0)
            return x if wrong is None else x.masked_fill_(wrong, torch.nan)

        entropy = None if rows.entropy is None else mask(rows.entropy)
        return mask(log_probs), Rows(entropy, mask(rows.row_max), mask(rows.log_sum)), target

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
        flat, wide = hidden.reshape(-1, hidden.shape[-1]), accumulator_dtype(hidden.dtype, torch.float32)
        vocab, device, on_cuda = weight.shape[0], hidden.device, hidden.is_cuda
        coefficients = [None if x is None else x.reshape(-1).to(rows.row_max.dtype).masked_fill(target < 0, 0) for x in grads]
        unit = None
        if hidden.dtype == torch.float16 and len(flat):
            unit = _unit(coefficients, rows.entropy, given["logit_scale"])
            coefficients = [None if x is None else x / unit for x in coefficients]
        maths, main_grad = {name: given[name] for name in MATHS}, given["main_grad"]
        product = ops.product if ops.product.fits(flat, weight) else None
        bias = None if bias is None else bias.contiguous()

        here = rows_to_score(target, given["num_valid"])
        h, y = hidden_rows(flat, target, here)
        row_max, log_sum = take(rows.row_max, here), take(rows.log_sum, here)
        on = [None if x is None else take(x, here) for x in on_rows(coefficients, rows)]
        grad_hidden = torch.zeros(h.shape, dtype=wide, device=device) if wanted.hidden else None
        allocate = functools.partial(torch.empty if len(y) else torch.zeros, dtype=hidden.dtype, device=device)
        grad_weight = allocate(weight.shape) if wanted.weight and main_grad is None else None
        into = grad_weight if main_grad is None else main_grad
        grad_bias = allocate(vocab) if wanted.bias else None

        columns = max(block_columns(len(y), vocab, hidden.dtype, product is not None, given["chunk_tokens"]), 1)
        buffer = logits_buffer(hidden, len(y), columns, rows.row_max.dtype if product is None else hidden.dtype)
        operand = h if on_cuda else h.to(wide)
        for block in column_blocks(vocab if len(y) else 0, columns):
            w, of_bias = weight[block], None if bias is None else bias[block]
            logits = buffer[:, : w.shape[0]]
            first = block.start if shard is None else shard.first_class + block.start
            column = _column(y, first, w.shape[0], elsewhere=ELSEWHERE if product is not None else IGNORED)
            if product is not None:
                buffer[:, w.shape[0] :].zero_()  # products read whole vectors
                product.gradient_(logits, h, w, of_bias, column, row_max, log_sum, *on, *maths.values())
                grad_logits = logits
            else:
                make_logits(h, w, of_bias, out=logits)
                gradient_of_logits_(logits, column, row_max, log_sum, *on, **maths)
                logits.masked_fill_((y < 0)[:, None], 0)
                # Matrix units take two operands of one dtype.
                grad_logits = logits.to(hidden.dtype) if on_cuda else logits
            if grad_hidden is not None:
                product_(grad_hidden, grad_logits, w if on_cuda else w.to(wide), add=block.start > 0)
            if into is not None:
                weight_gradient_(into[block], grad_logits, operand, unit, main_grad is not None, product)
            if grad_bias is not None:
                of_block = grad_logits.sum(0, dtype=wide)
                grad_bias[block] = of_block if unit is None else of_block * unit
            del w, grad_logits  # before the next block's are made
        if grad_hidden is not None:
            if shard is not None:
                shard.add_up(grad_hidden)
            grad_hidden = finish(grad_hidden, unit, hidden.dtype, keep=False)
            if not isinstance(here, slice):
                grad_hidden = torch.zeros(flat.shape, dtype=hidden.dtype, device=device).index_copy_(0, here, grad_hidden)
            grad_hidden = grad_hidden.view(hidden.shape)
        return [grad_hidden, grad_weight, grad_bias]

    return SimpleNamespace(forward=forward, backward=backward, op=op)


def on_rows(coefficients: list[Tensor | None], rows: Rows) -> tuple[Tensor | None, ...]:
    """What multiplies p, p log p and 1[label] in a row's gradient of the logits, from g, h and l; None: 0."""
    g, h, l = coefficients  # noqa: E741
    on_p = torch.zeros_like(rows.row_max) if l is None else l
    if g is not None:
        on_p = on_p - g
    if h is not None and rows.entropy is not None:
        on_p = on_p - h * rows.entropy
    return on_p, None if h is None else -h, g


def _unit(coefficients: list[Tensor | None], entropy: Tensor | None, logit_scale: float) -> Tensor:
    """:func:`.lm_head.unit_of` the largest gradient."""
    g, h, l = coefficients  # noqa: E741
    bounds = [x.abs().amax() for x in (g, l) if x is not None]
    if h is not None and entropy is not None:
        bounds.append((h.abs() * (entropy.nan_to_num() + 1)).amax())
    largest = torch.stack(bounds).sum() * max(logit_scale, 1.0)
    return unit_of(largest)


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
        options = {**options}
        ctx.main_grad = options.pop("main_grad")  # not kept as saved tensors are, whose versions are compared: others add to it
        ctx.leaf = weight if ctx.main_grad is not None and hasattr(weight, "grad_added_to_main_grad") else None
        log_probs, entropy, row_max, log_sum, target = ops.forward(hidden, weight, labels, bias=bias, **options)
        ctx.ops, ctx.options = ops, {name: options[name] for name in (*MATHS, *CHUNKS)}
        ctx.wanted = Wanted(*ctx.needs_input_grad[1:4])
        ctx.save_for_backward(hidden, weight, bias, target, entropy, row_max, log_sum)
        ctx.mark_non_differentiable(row_max, target, *([] if options["entropy"] else [entropy]))
        ctx.set_materialize_grads(False)
        return log_probs, entropy, row_max, log_sum, target

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, _max: Any, l: Tensor | None, _target: Any):  # noqa: E741
        if g is None and h is None and l is None:
            return (None,) * 6
        flags = {f"grad_{name}": want for name, want in ctx.wanted._asdict().items()}

        def compute(g: Tensor | None, h: Tensor | None, l: Tensor | None, *saved: Any) -> tuple:  # noqa: E741
            hidden, weight, bias, target, *rows = saved
            more = {"bias": bias, "main_grad": ctx.main_grad, **ctx.options, **flags}
            grads = ctx.ops.backward(g, h, l, hidden, weight, target, *rows, **more)
            of_hidden, of_weight, of_bias = (grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True))
            if ctx.main_grad is not None:
                increment_version(ctx.main_grad)
                of_weight = stand_in(ctx.leaf)
            return of_hidden, of_weight, of_bias

        return None, *once(ctx.ops.op, compute, g, h, l, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(OP)


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
    kernels.define(f"{OP}({inputs}, Tensor? main_grad=None) -> (Tensor, Tensor, Tensor)")
    kernels.define(f"_{OP}_forward({inputs}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    kernels.define(
        f"_{OP}_backward(Tensor? grad_log_probs, Tensor? grad_entropy, Tensor? grad_lse, Tensor hidden, Tensor weight, Tensor "
        "target, Tensor entropy, Tensor row_max, Tensor log_sum, *, Tensor? bias=None, "
        f"{maths}, {chunk}, Tensor(a!)? main_grad=None, bool grad_hidden=False, bool grad_weight=False, bool grad_bias=False) -> "
        "(Tensor, Tensor, Tensor)"
    )
    public = getattr(ops, OP).default
    raw = SimpleNamespace(forward=getattr(ops, f"_{OP}_forward").default, backward=getattr(ops, f"_{OP}_backward").default, op=OP)
    work = as_ops(forward_and_backward(raw_ops(namespace)))

    def forward(hidden, weight, labels, *, bias=None, **given):
        given = {**DEFAULTS, **given}
        check(OP, hidden, weight, bias, labels, given)
        return work.forward(hidden, weight, labels, bias=bias, **given)

    def backward(*args, **given):
        defaults = {name: DEFAULTS[name] for name in (*MATHS, *CHUNKS, "main_grad")}  # a schema's do not arrive
        made = work.backward(*args, **{**defaults, **given})
        return tuple(args[3].new_empty((0,)) if x is None else x for x in made)  # an op cannot return None

    def plain(hidden, weight, labels, *, entropy=True, main_grad=None, **given):
        return results(forward(hidden, weight, labels, entropy=entropy, **given), labels.shape, entropy)

    for key in ("CPU", "CUDA"):
        kernels.impl(OP, plain, key)
        kernels.impl(f"_{OP}_forward", forward, key)
        kernels.impl(f"_{OP}_backward", backward, key)

    def row_like(hidden: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        row = hidden.new_empty((labels.numel(),), dtype=maths_dtype(hidden))
        return row, row.new_empty((labels.numel() if entropy else 0,))

    fake = fakes(namespace)

    @fake(OP)
    def _(hidden, weight, labels, *, entropy=True, **given):
        row, entropies = row_like(hidden, labels, entropy)
        log_probs = row.new_empty(labels.shape)
        return log_probs, torch.empty_like(log_probs) if entropy else entropies, torch.empty_like(log_probs)

    @fake(f"_{OP}_forward")
    def _(hidden, weight, labels, *, entropy=True, **given):
        row, entropies = row_like(hidden, labels, entropy)
        target = labels.new_empty((labels.numel(),), dtype=torch.int32)
        return row, entropies, torch.empty_like(row), torch.empty_like(row), target

    @fake(f"_{OP}_backward")
    def _(grad_log_probs, grad_entropy, grad_lse, hidden, weight, *args, main_grad=None, **given):
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        wanted = wanted_of(given)
        if main_grad is not None:
            wanted = wanted._replace(weight=False)
        return tuple(hidden.new_empty(shape if want else (0,)) for want, shape in zip(wanted, shapes, strict=True))

    below = below_autograd(public)

    def autograd(hidden, weight, labels, *, bias=None, **given):
        refuse_transforms(OP, REFUSED)
        check_main_grad(OP, given.get("main_grad"), weight, hidden.dtype)
        if any(x is not None and is_differentiated(x) for x in (hidden, weight, bias)):
            options = {**DEFAULTS, **given}
            found = LinearLogProbsFunction.apply(raw, hidden, weight, bias, labels, options)
            return results(found, labels.shape, options["entropy"])
        return below(hidden, weight, labels, bias=bias, **given)

    kernels.impl(OP, autograd, "Autograd")
    autocast.register(kernels, OP, public, autocast.lower_precision, keywords=("bias",))


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
        return work.backward((g, h, l), hidden, weight, bias, target, rows, wanted_of(given), **given)

    return SimpleNamespace(forward=forward, backward=backward, op=work.op)


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that a chunk is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(
        prepare=ops._cross_entropy_prepare.default,
        forward=ops._cross_entropy_forward.default,
        product=Product(namespace),
    )


def check(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, given: dict[str, Any], least: int = 1
) -> None:
    chunks = {name: given[name] for name in CHUNKS}
    linear.check_arguments(hidden, weight, bias, labels, **chunks, accum_dtype=torch.float32, op=op, least=least)
