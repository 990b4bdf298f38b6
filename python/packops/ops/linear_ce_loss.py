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

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._errors import raise_typed
from .ce_loss import DEFAULTS as CE_DEFAULTS
from .ce_loss import MATHS, Reduction, as_num_items, graph_is_kept
from .op import library

__all__ = ["linear_cross_entropy"]

OP = "linear_cross_entropy"
CHUNKS = ("num_valid", "chunk_tokens", "accum_dtype")
IGNORED = -1  # csrc/ce_loss.h: kIgnored. Classes are not negative, so target < 0 is a row without a gradient.

LOGITS_SHARE = 0.35  # of the memory that all logits would take
MIN_ROWS = 1024  # below, a product of a chunk is bound by reading and writing the (V, H) matrices, not by the matrix units
MAX_ROWS = 4096  # above, a larger chunk saves a few percent at most
COLUMN_MULTIPLE = 64  # of the tiles of matrix products
CPU_BLOCKS = 32  # pieces of the vocabulary in which the CPU widens 16-bit operands


def choose_chunk_tokens(tokens: int, hidden_size: int, vocab: int, *, num_valid: int | None = None, copies: int = 1) -> int:
    """Rows of a chunk: all, where they fit, or else a power of two.

    A chunk of c rows takes ``c (V + H)`` elements of the hidden states' dtype: its logits, which become their own gradient, and a
    copy of its hidden rows without what does not count; ``c (copies V + H)`` where the logits are wider than that. Compacted rows
    (``num_valid``) take another c H in fp32. This may be ``LOGITS_SHARE`` of the memory of all logits, but always
    ``MIN_ROWS`` rows and never more than ``MAX_ROWS``. (Below ``MIN_ROWS / LOGITS_SHARE`` tokens, about 2900, ``MIN_ROWS``
    decides and the share is larger.)

    A power of two, because a chunk's gradient of the hidden states has few tiles, about ``(c / 128) (H / 256)``: where these do
    not come out even over the multiprocessors, most of the device waits for the last ones. A last chunk that is shorter lacks
    work as it lacks rows, so chunks of even size would gain nothing. docs/design.md has the figures.

    Not in this: the gradients and their accumulators, ``4 V H`` bytes for the weight and ``4 T H`` for the hidden states (half
    with ``accum_dtype=torch.bfloat16``; where the parameters are fp32 the accumulators become the gradients).
    """
    rows = tokens if num_valid is None else num_valid
    row = copies * vocab + hidden_size + (0 if num_valid is None else 2 * hidden_size)
    most = min(max(int(LOGITS_SHARE * tokens * vocab / max(row, 1)), MIN_ROWS), MAX_ROWS)
    return max(rows, 1) if rows <= most else 1 << (most.bit_length() - 1)


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that a chunk is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(
        prepare=ops._cross_entropy_prepare.default,
        loss=ops._cross_entropy_forward.default,
        loss_and_gradient_=ops._cross_entropy_forward_.default,
    )


class Wanted(NamedTuple):
    """Which gradients to make."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Chunked(NamedTuple):
    losses: Tensor  #: (T,), 0 for rows that were left out
    grad_hidden: Tensor | None  #: (T, H), all three in the accumulators' dtype; None where not wanted
    grad_weight: Tensor | None  #: (V, H)
    grad_bias: Tensor | None  #: (V,)


#: (logits (c, V), target (c,), scale (c,)) -> (c,) losses times scale; replaces the logits by their gradient if any is wanted.
ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def accumulator_dtype(dtype: torch.dtype, accum_dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else accum_dtype


def run_chunks(
    chunk_loss: ChunkLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    wanted: Wanted,
    *,
    num_valid: int | None = None,
    chunk_tokens: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
) -> Chunked:
    """The loop: losses of all rows, each times its scale, and the gradients of their sum.

    hidden (T, H), weight (V, H), bias (V,) or None; target (T,) and scale (T,) as ``_cross_entropy_prepare`` makes them.
    """
    (tokens, hidden_size), vocab = hidden.shape, weight.shape[0]
    order = None
    if num_valid is not None and num_valid < tokens:  # the rows that count come first; the rest is never touched
        order = (target == IGNORED).to(torch.uint8).argsort(stable=True)[:num_valid]
    rows = tokens if order is None else order.shape[0]
    if chunk_tokens is None:
        chunk_tokens = choose_chunk_tokens(tokens, hidden_size, vocab, num_valid=None if order is None else rows)

    dtype, device = accumulator_dtype(hidden.dtype, accum_dtype), hidden.device
    per_row = torch.empty if order is None else torch.zeros  # not every row is written
    losses = per_row((tokens,), dtype=scale.dtype, device=device)
    grad_hidden = per_row((tokens, hidden_size), dtype=dtype, device=device) if wanted.hidden else None
    grad_weight = (
        (torch.empty if rows else torch.zeros)((vocab, hidden_size), dtype=dtype, device=device) if wanted.weight else None
    )
    grad_bias = torch.zeros((vocab,), dtype=dtype, device=device) if wanted.bias else None

    buffer = logits_buffer(hidden, min(chunk_tokens, rows), vocab, hidden.dtype)
    for begin in range(0, rows, chunk_tokens):
        here = slice(begin, min(begin + chunk_tokens, rows))
        logits = buffer[: here.stop - begin]
        # A row without a gradient may hold anything, and 0 * NaN in the weight's gradient would be NaN.
        if order is None:
            y, s = target[here], scale[here]
            h = hidden[here].masked_fill((y < 0)[:, None], 0)
        else:
            at = order[here]
            y, s = target.index_select(0, at), scale.index_select(0, at)
            h = hidden.index_select(0, at).masked_fill_((y < 0)[:, None], 0)
        make_logits(h, weight, bias, out=logits)
        loss = chunk_loss(logits, y, s)
        if order is None:
            losses[here] = loss
            part = None if grad_hidden is None else grad_hidden[here]
            multiply(logits, h, weight, part, grad_weight, grad_bias, first=begin == 0)
        else:
            losses.index_copy_(0, at, loss)
            part = None if grad_hidden is None else torch.empty_like(h, dtype=dtype)
            multiply(logits, h, weight, part, grad_weight, grad_bias, first=begin == 0)
            if grad_hidden is not None and part is not None:
                grad_hidden.index_copy_(0, at, part)
        del h, part  # before the next chunk's are made
    return Chunked(losses, grad_hidden, grad_weight, grad_bias)


def logits_buffer(hidden: Tensor, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Memory for the logits of a chunk. Rows of an odd vocabulary would begin anywhere; here they begin where vector loads and
    products want them."""
    width = vocab if vocab % 8 == 0 else -(-vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    buffer = hidden.new_empty((rows, width), dtype=dtype)
    buffer[:, vocab:].zero_()  # products read whole vectors
    return buffer[:, :vocab]


def make_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, in the dtype of ``out``: that of the operands or, for 16-bit operands, fp32."""
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return
    if hidden.is_cuda:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    else:  # whose products cannot write a wider dtype than they read: a block of the vocabulary at a time
        hidden = hidden.to(out.dtype)
        columns = -(-weight.shape[0] // CPU_BLOCKS)
        for block, rows in zip(out.split(columns, dim=1), weight.split(columns), strict=True):
            torch.mm(hidden, rows.to(out.dtype).t(), out=block)
    if bias is not None:
        out += bias


def losses_and_gradients(
    ops: SimpleNamespace,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    maths: dict[str, Any],
    wanted: Wanted,
    **chunks: Any,
) -> tuple[Chunked, Tensor | None]:
    """:func:`run_chunks` with the cross-entropy kernel, and the unit of its gradients (None: 1)."""
    if maths["class_weight"] is not None:
        maths = {**maths, "class_weight": maths["class_weight"].float()}  # once, not in every chunk
    kernel = ops.loss_and_gradient_ if any(wanted) else ops.loss

    def chunk_loss(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return kernel(logits, y, reduction="none", ignore_index=IGNORED, token_weight=s, **maths)[0]

    def chunk_loss_fp64(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:  # the kernel's token weights are fp32
        loss = kernel(logits, y, reduction="none", ignore_index=IGNORED, **maths)[0]
        s = s.masked_fill(y < 0, 0)
        logits *= s[:, None]
        return loss * s

    unit = _unit(target, scale, maths) if any(wanted) and hidden.dtype == torch.float16 else None
    result = run_chunks(
        chunk_loss_fp64 if hidden.dtype == torch.float64 else chunk_loss,
        hidden,
        weight,
        bias,
        target,
        scale if unit is None else scale / unit,
        wanted,
        **chunks,
    )
    return (result if unit is None else result._replace(losses=result.losses * unit)), unit


def _unit(target: Tensor, scale: Tensor, maths: dict[str, Any]) -> Tensor:
    """What fp16 gradients are measured in: the largest is about 2^8 units, far from both of fp16's ends, whatever the loss is
    divided by. A power of two, so that it rounds nothing."""
    if not target.numel():
        return scale.new_ones(())
    largest = scale.abs().masked_fill(target < 0, 0).amax() * max(maths["logit_scale"], 1.0)
    if maths["class_weight"] is not None:
        largest = largest * maths["class_weight"].amax().clamp(min=1)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 8)


def multiply(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    first: bool,
) -> None:
    """grad_hidden = grad_logits @ weight, grad_weight += grad_logits.T @ hidden, grad_bias += grad_logits.sum(0); at `first`, the
    weight's is set."""
    made = next((g for g in (grad_hidden, grad_weight, grad_bias) if g is not None), None)
    if made is None:
        return
    wide = made.dtype
    if wide != hidden.dtype and not hidden.is_cuda:
        return _multiply_widened(grad_logits, hidden, weight, grad_hidden, grad_weight, grad_bias, wide, first)
    if grad_hidden is not None:
        _product(grad_hidden, grad_logits, weight, add=False)
    if grad_weight is not None:
        _product(grad_weight, grad_logits.t(), hidden, add=not first)
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0, dtype=wide)


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (+)= a @ b, accumulated in the dtype of `out` by the product itself."""
    if out.dtype == a.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _multiply_widened(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    wide: torch.dtype,
    first: bool,
) -> None:
    """The same on the CPU, whose products cannot write a wider dtype than they read: a block of the vocabulary at a time."""
    hidden = hidden.to(wide)
    vocab = weight.shape[0]
    columns = -(-vocab // CPU_BLOCKS)
    for begin in range(0, vocab, columns):
        block = slice(begin, min(begin + columns, vocab))
        g = grad_logits[:, block].to(wide)
        if grad_hidden is not None:
            _product(grad_hidden, g, weight[block].to(wide), add=begin > 0)
        if grad_weight is not None:
            _product(grad_weight[block], g.t(), hidden, add=not first)
        if grad_bias is not None:
            grad_bias[block] += g.sum(0)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """``loss = apply(ops, hidden, weight, bias, labels, options)``."""

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
        wanted = Wanted(*ctx.needs_input_grad[1:4])
        # Each row of the hidden states' gradient belongs to one token: its grad_output can be multiplied on later.
        early = options["reduction"] != "none" or not (wanted.weight or wanted.bias)
        flags = wanted._asdict() if early else {}
        loss, *grads, unit, target, scale = ops.forward(
            hidden, weight, labels, bias=bias, **options, **{f"grad_{name}": want for name, want in flags.items()}
        )
        ctx.ops, ctx.wanted, ctx.early, ctx.dtype = ops, wanted, early, hidden.dtype
        ctx.per_token = options["reduction"] == "none"
        if early:
            ctx.save_for_backward(target, unit, *grads)
        else:
            ctx.save_for_backward(target, scale, hidden, weight, bias, options["class_weight"])
            ctx.options = {name: options[name] for name in (*MATHS, *CHUNKS) if name != "class_weight"}
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None):
        if grad_output is None:
            return (None,) * 6
        if ctx.early:
            target, unit, *grads = ctx.saved_tensors
            keep = graph_is_kept()  # then what is saved must survive
            factor = grad_output * unit if ctx.dtype == torch.float16 else grad_output
            if ctx.per_token:  # only the hidden states' gradient is wanted, and it has a row for each
                factor = factor.masked_fill(target.view(factor.shape) < 0, 0).unsqueeze(-1)
        else:
            target, scale, hidden, weight, bias, class_weight = ctx.saved_tensors
            flags = {f"grad_{name}": want for name, want in ctx.wanted._asdict().items()}
            *grads, unit = ctx.ops.backward(
                grad_output, hidden, weight, target, scale, bias=bias, class_weight=class_weight, **ctx.options, **flags
            )
            keep = False
            factor = unit if ctx.dtype == torch.float16 else None
        made = [
            _finish(grad, factor, ctx.dtype, keep, blocks=CPU_BLOCKS if name == "weight" else 1) if want else None
            for name, want, grad in zip(Wanted._fields, ctx.wanted, grads, strict=True)
        ]
        return None, *made, None, None


def _finish(grad: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool, blocks: int) -> Tensor:
    """`grad` times `factor` in `dtype`, computed in the wider of their dtypes and rounded once."""
    if factor is None:
        return grad.to(dtype)
    if factor.dim() == 0:
        factor = factor.reshape((1,) * grad.dim())  # a 0-d factor would be rounded to the dtype of a 16-bit gradient first
    out = grad if grad.dtype == dtype and not keep else torch.empty_like(grad, dtype=dtype)
    if blocks == 1 or grad.is_cuda or torch.compiler.is_compiling():
        return torch.mul(grad, factor, out=out)
    for piece, source in zip(out.tensor_split(blocks), grad.tensor_split(blocks), strict=True):  # the CPU converts in temporaries
        torch.mul(source, factor, out=piece)
    return out


DEFAULTS: dict[str, Any] = {**CE_DEFAULTS, "num_valid": None, "chunk_tokens": None, "accum_dtype": torch.float32}


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_valid: int | None,
    chunk_tokens: int | None,
    accum_dtype: torch.dtype,
    op: str = OP,
) -> None:
    """TypeError or ValueError for what the ops that do the work would not name as the caller does."""

    def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
        if not condition:
            raise error(f"packops.{op}: {message}")

    def show(x: Tensor) -> str:
        return str(tuple(x.shape))

    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require(hidden.dim() >= 1, "hidden must have shape (..., hidden_size), got a 0-d tensor")
    require(hidden.dtype in floats, f"hidden must be bfloat16, float16 or float32, got {hidden.dtype}", TypeError)
    require(weight.dim() == 2, f"weight must have shape (vocab, hidden_size), got {show(weight)}")
    require(
        weight.shape[1] == hidden.shape[-1],
        f"weight must have shape (vocab, {hidden.shape[-1]}) for hidden {show(hidden)}, got {show(weight)}",
    )
    require(weight.shape[0] > 0 or hidden.numel() == 0, "weight must have at least one class, got none")
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
        accum_dtype == torch.float32 or accum_dtype == hidden.dtype != torch.float16,
        f"accum_dtype must be torch.float32, or torch.bfloat16 for bfloat16 parameters, got {accum_dtype} for {hidden.dtype}",
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
    checked = not hidden.is_cuda or _checks.enabled()
    if checked and hidden.is_cuda:
        _checks.raise_bad_rows(
            labels,
            options["cu_seqlens"],
            target,
            shift=options["shift"],
            ignore_index=options["ignore_index"],
            vocab=vocab,
            op=op,
        )
    if checked and num_valid is not None and num_valid < int(counts[0]):
        counted = int(counts[0])
        raise ValueError(f"packops.{op}: num_valid must be at least the number of rows that count ({counted}), got {num_valid}")
    return target, scale, counts


def forward_and_backward(
    ce: SimpleNamespace, *, vocab_size: int | None = None, add_up: Callable[[Tensor], None] | None = None
) -> SimpleNamespace:
    """What :class:`LinearCrossEntropyFunction` is made of, with None for gradients that nobody wants.

    Where ``weight`` is one of several shards, ``vocab_size`` is that of all, and ``add_up`` adds a tensor up over them, in place.
    """

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, given: dict[str, Any]):
        flat, maths = hidden.reshape(-1, hidden.shape[-1]), {name: given[name] for name in MATHS}
        chunks = {name: given[name] for name in CHUNKS}
        result, unit = losses_and_gradients(ce, flat, weight, bias, target, scale, maths, wanted_of(given), **chunks)
        grad_hidden = result.grad_hidden
        if grad_hidden is not None:
            if add_up is not None:
                add_up(grad_hidden)
            grad_hidden = grad_hidden.view(hidden.shape)
        return result.losses, grad_hidden, result.grad_weight, result.grad_bias, unit

    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, **given: Any):
        target, scale, counts = prepare(ce, hidden, vocab_size or weight.shape[0], labels, given)
        losses, *grads = run(hidden, weight, bias, target, scale, given)
        if given["reduction"] == "none":
            loss = losses.view(labels.shape)
        else:
            loss = losses.sum(dtype=torch.float64).to(losses.dtype)
        if given["num_valid"] is not None and hidden.is_cuda:  # a row left out must show
            loss = loss.masked_fill(counts[0] > given["num_valid"], torch.nan)
        return loss, *grads, target, scale

    def backward(
        grad_output: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, scale: Tensor, *, bias: Tensor | None, **given: Any
    ):
        return run(hidden, weight, bias, target, scale * grad_output.reshape(-1), given)[1:]

    return SimpleNamespace(forward=forward, backward=backward)


def wanted_of(given: dict[str, Any]) -> Wanted:
    return Wanted(*(given.get(f"grad_{name}", False) for name in Wanted._fields))


def register(namespace: str) -> None:
    """Define ``linear_cross_entropy`` and the ops its autograd formula is made of, with the options of ``cross_entropy``."""
    ops = getattr(torch.ops, namespace)
    ce = raw_ops(namespace)
    kernels = library(namespace)

    options = str(ops.cross_entropy.default._schema).split("Tensor labels, *, ")[1].split(") ->")[0]
    maths = options[options.index("Tensor? class_weight") :]
    chunks = "SymInt? num_valid=None, SymInt? chunk_tokens=None, ScalarType accum_dtype=float"
    flags = "bool grad_hidden=False, bool grad_weight=False, bool grad_bias=False"
    inputs = "Tensor hidden, Tensor weight, Tensor labels, *, Tensor? bias=None"
    kernels.define(f"{OP}({inputs}, {options}, {chunks}) -> Tensor")
    kernels.define(
        f"_{OP}_forward({inputs}, {options}, {chunks}, {flags}) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, "
        "Tensor grad_bias, Tensor unit, Tensor target, Tensor scale)"
    )
    kernels.define(
        f"_{OP}_backward(Tensor grad_output, Tensor hidden, Tensor weight, Tensor target, Tensor scale, *, Tensor? bias=None, "
        f"{maths}, {chunks}, {flags}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor unit)"
    )
    public = getattr(ops, OP).default
    raw = SimpleNamespace(forward=getattr(ops, f"_{OP}_forward").default, backward=getattr(ops, f"_{OP}_backward").default)

    work = forward_and_backward(ce)

    def as_outputs(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
        return [like.new_empty((0,)) if grad is None else grad for grad in grads]  # an op cannot return None

    @torch.no_grad()
    def forward(hidden, weight, labels, *, bias=None, **given):
        given = {**DEFAULTS, **given}
        check_arguments(hidden, weight, bias, labels, **{name: given[name] for name in CHUNKS})
        loss, *grads, target, scale = work.forward(hidden, weight, labels, bias=bias, **given)
        return loss, *as_outputs(grads, scale), target, scale

    @torch.no_grad()
    def backward(grad_output, hidden, weight, target, scale, *, bias=None, **given):
        grads = work.backward(grad_output, hidden, weight, target, scale, bias=bias, **{**DEFAULTS, **given})
        return tuple(as_outputs(grads, scale))

    def loss_only(hidden, weight, labels, **given):
        return forward(hidden, weight, labels, **given)[0]

    for key in ("CPU", "CUDA"):
        kernels.impl(OP, loss_only, key)
        kernels.impl(f"_{OP}_forward", forward, key)
        kernels.impl(f"_{OP}_backward", backward, key)

    def state_like(hidden: Tensor) -> Tensor:
        return hidden.new_empty((0,), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    def loss_like(hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return state_like(hidden).new_empty(labels.shape if reduction == "none" else ())

    def grads_like(hidden: Tensor, weight: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
        wanted = wanted_of(given)
        dtype = accumulator_dtype(hidden.dtype, given.get("accum_dtype", torch.float32))
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        made = (
            hidden.new_empty(shape, dtype=dtype) if want else state_like(hidden)
            for want, shape in zip(wanted, shapes, strict=True)
        )
        unit = state_like(hidden)
        if any(wanted) and hidden.dtype == torch.float16:
            unit = unit.new_empty(())
        return *made, unit

    @torch.library.register_fake(f"{namespace}::{OP}")
    def _(hidden, weight, labels, *, reduction="mean", **given):
        return loss_like(hidden, labels, reduction)

    @torch.library.register_fake(f"{namespace}::_{OP}_forward")
    def _(hidden, weight, labels, *, reduction="mean", **given):
        target = labels.new_empty((labels.numel(),), dtype=torch.int32)
        scale = state_like(hidden).new_empty((labels.numel(),))
        return loss_like(hidden, labels, reduction), *grads_like(hidden, weight, given), target, scale

    @torch.library.register_fake(f"{namespace}::_{OP}_backward")
    def _(grad_output, hidden, weight, target, scale, **given):
        return grads_like(hidden, weight, given)

    def autograd(hidden, weight, labels, *, bias=None, **given):
        needs = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if torch.is_grad_enabled() and needs:
            return LinearCrossEntropyFunction.apply(raw, hidden, weight, bias, labels, {**DEFAULTS, **given})
        with torch._C._AutoDispatchBelowAutograd():
            return public(hidden, weight, labels, bias=bias, **given)

    kernels.impl(OP, autograd, "Autograd")

    implement_autocast(kernels, OP, public)


def implement_autocast(kernels: torch.library.Library, op: str, public: Callable[..., Any]) -> None:
    """As autocast treats a linear layer; labels, weights of tokens and classes, and num_items keep their dtypes."""

    def implement(device_type: str, key: str):
        def cast(x: Tensor | None) -> Tensor | None:
            castable = x is not None and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device_type
            return x.to(torch.get_autocast_dtype(device_type)) if x is not None and castable else x

        def call(hidden, weight, labels, *, bias=None, **given):
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return public(cast(hidden), cast(weight), labels, bias=cast(bias), **given)

        kernels.impl(op, call, key)

    implement("cpu", "AutocastCPU")
    implement("cuda", "AutocastCUDA")


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
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, labels, ...)`` without the logits: the lm_head and the loss in one.

    The logits exist a chunk of tokens at a time. Their gradient, and from it those of ``hidden``, ``weight`` and ``bias``, are
    formed while they do; a gradient nobody wants (``requires_grad=False``) costs no product. Peak memory beyond the gradients is
    at most 0.35 of what the logits would take for 3000 tokens or more, plus the accumulators (see ``accum_dtype``). Nothing waits
    for the device.

    Args:
        hidden: (..., H) bf16, fp16 or fp32 (fp64 on the CPU): what the lm_head is applied to. Rows that do not count may hold
            anything, NaN included.
        weight: (V, H), of the same dtype: a plain tensor. FSDP gathers it for the forward of the module that owns it, so the loss
            belongs there.
        labels: (...) int32 or int64.
        bias: (V,) or None.
        cu_seqlens, shift, reduction, num_items, ignore_index, token_weight, class_weight, label_smoothing, z_loss, softcap,
            logit_scale: as in :func:`cross_entropy`.
        num_valid: how many rows count, after ``shift``, boundaries and ``ignore_index``, or an upper bound of it: a host int,
            which whoever packed the batch knows (``PackedBatch.num_valid``). Then the other rows cost no matrix product. If more
            rows count, that is a ValueError on the CPU, and on CUDA with :func:`packops.checks` on; otherwise the loss is NaN.
        chunk_tokens: rows of a chunk; None: chosen from the shapes. Fewer need less memory; below about 1000 the matrix units
            idle.
        accum_dtype: in which the gradients are accumulated over the chunks: ``torch.float32`` (``4 V H + 4 T H`` bytes, held
            until the backward), or for bf16 parameters ``torch.bfloat16`` (half of that, and less accurate with every chunk).

    Returns:
        The loss, fp32 (fp64 for fp64): () or, for ``"none"``, the labels' shape. Differentiable once, for any ``grad_output``.
        ``reduction="none"`` makes the logits twice if ``weight`` or ``bias`` needs a gradient: in the backward again, because
        the weight's gradient depends on each token's ``grad_output``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cross_entropy`.
    """
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            "packops.linear_cross_entropy: weight must be a plain tensor, got a DTensor, a sharded parameter; compute the loss "
            "within the forward of the module that owns it, where FSDP has gathered it"
        )
    if num_valid is not None and isinstance(num_valid, Tensor):
        raise TypeError(
            "packops.linear_cross_entropy: num_valid must be an int on the host, got a Tensor; reading it would wait for the "
            "device"
        )
    return torch.ops.packops.linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        reduction=reduction,
        num_items=as_num_items(num_items),
        ignore_index=ignore_index,
        token_weight=token_weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        num_valid=num_valid,
        chunk_tokens=chunk_tokens,
        accum_dtype=accum_dtype,
    )
