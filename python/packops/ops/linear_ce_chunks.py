"""The loop of ``linear_cross_entropy`` over chunks of rows: losses, and gradients for ``grad_output = 1``.

Where all rows' logits take no more memory than a chunk and the weight's accumulator, there is one chunk and no accumulator: the
gradient of the logits is kept, and the backward makes the weight's gradient of it when ``grad_output`` is known: at once by the
handwritten product, or by torch's a block of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _checks
from .ce_loss import ENTROPY, PREDICTION
from .lm_head import (
    CPU_BLOCKS,
    IGNORED,
    LOGITS_SHARE,
    Product,
    Wanted,
    accumulator_dtype,
    choose_chunk_tokens,
    column_blocks,
    hidden_rows,
    logits_buffer,
    make_logits,
    multiply,
    row_chunks,
    rows_to_score,
    take,
    unit_of,
    weight_gradient_,
)
from .op import maths_dtype

BAD_LABEL = _checks.BAD_LABEL
BLOCK_BYTES = 65 << 20  # of the weight's gradient in fp32, on its way to the parameter's dtype
BLOCK_MULTIPLE = 1024  # rows of it: 4096 at H = 4096, whose 512 tiles keep 97 % of 132 multiprocessors busy


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that a chunk is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(
        prepare=ops._cross_entropy_prepare.default,
        loss=ops._cross_entropy_forward.default,
        loss_and_gradient_=ops._cross_entropy_forward_.default,
        product=Product(namespace),
        is_shard=False,
    )


class Chunked(NamedTuple):
    rows: tuple[Tensor, ...]  #: what the loss of a chunk returns, for all T rows; 0 for rows that were left out
    grad_hidden: Tensor | None  #: (T, H), all three in the accumulators' dtype; None where not wanted
    grad_weight: Tensor | None  #: (V, H); where the logits' gradient is kept that, (rows to score, V) in the dtype of hidden
    grad_bias: Tensor | None  #: (V,)


#: (logits (c, V), target (c,), scale (c,)) -> losses (c,) times scale, and other tensors (..., c); replaces the logits by their
#: gradient if any is wanted.
ChunkLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]

#: (hidden (c, H), target (c,), scale (c,)) -> losses (c,) times scale, where no gradient is wanted: no logits leave the product.
ProductLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    logits_dtype: torch.dtype | None = None,
    keep_logits: bool = False,
    with_stats: bool = False,
    product: Product | None = None,
    product_loss: ProductLoss | None = None,
) -> Chunked:
    """The loop: losses of all rows, each times its scale, and the gradients of their sum.

    hidden (T, H), weight (V, H), bias (V,) or None; target (T,) and scale (T,) as ``_cross_entropy_prepare`` makes them. With
    ``product_loss`` there are no logits, and ``chunk_loss`` is not called. ``keep_logits``: see :func:`keeps_logits`.
    """
    (tokens, hidden_size), vocab = hidden.shape, weight.shape[0]
    compacted = num_valid is not None and num_valid < tokens
    rows = num_valid if num_valid is not None and compacted else tokens
    logits_dtype = logits_dtype or hidden.dtype
    if chunk_tokens is None and product_loss is not None:
        chunk_tokens = Product.ROWS
    elif keep_logits:
        chunk_tokens = max(rows, 1)
    elif chunk_tokens is None:
        copies = 1 if logits_dtype == hidden.dtype else 3  # wider logits, and their gradient
        chunk_tokens = choose_chunk_tokens(tokens, hidden_size, vocab, num_valid=rows if compacted else None, copies=copies)

    dtype, device = accumulator_dtype(hidden.dtype, accum_dtype), hidden.device
    per_row = torch.zeros if compacted else torch.empty  # not every row is written
    kinds = [((), scale.dtype), *([((ENTROPY + 1,), scale.dtype), ((PREDICTION + 1,), torch.int32)] if with_stats else [])]
    results = tuple(per_row((*shape, tokens), dtype=kind, device=device) for shape, kind in kinds)
    grad_hidden = per_row((tokens, hidden_size), dtype=dtype, device=device) if wanted.hidden else None
    grad_weight = None
    if wanted.weight and not keep_logits:
        grad_weight = (torch.empty if rows else torch.zeros)((vocab, hidden_size), dtype=dtype, device=device)
    grad_bias = torch.zeros((vocab,), dtype=dtype, device=device) if wanted.bias else None

    buffer = None if product_loss is not None else logits_buffer(hidden, min(chunk_tokens, rows), vocab, logits_dtype)
    for number, here in enumerate(row_chunks(target, num_valid, chunk_tokens)):
        h, y = hidden_rows(hidden, target, here)
        s = take(scale, here)
        if buffer is None:
            results[0][here] = cast(Callable[..., Tensor], product_loss)(h, y, s)
            continue
        logits = buffer[: len(y)]
        make_logits(h, weight, bias, logits, product)
        for whole, piece in zip(results, chunk_loss(logits, y, s), strict=True):
            whole[..., here] = piece
        if h.is_cuda and any(wanted):
            logits = logits.to(h.dtype)  # matrix units take two operands of one dtype
        in_place = grad_hidden is not None and isinstance(here, slice)
        part = None
        if grad_hidden is not None:
            part = grad_hidden[here] if in_place else torch.empty_like(h, dtype=dtype)
        multiply(logits, h, weight, part, grad_weight, grad_bias, first=number == 0, product=product)
        if grad_hidden is not None and part is not None and not in_place:
            grad_hidden[here] = part
        del h, part  # before the next chunk's are made
    return Chunked(results, grad_hidden, buffer if keep_logits else grad_weight, grad_bias)


def keeps_logits(hidden: Tensor, *, num_valid: Any, chunk_tokens: Any, accum_dtype: Any, logits_dtype: Any) -> bool:
    """Whether the gradient of all logits is kept for the backward: where ``chunk_tokens`` wants them all at once, or because it
    takes no more memory than a chunk of logits and the weight's accumulator would, ``LOGITS_SHARE`` of the logits and 4 V H
    bytes, or half with bf16 accumulation.

    A yes to a symbolic size is a guard; to an unbacked one the answer is no.
    """
    if hidden.dtype.itemsize != 2 or logits_dtype not in (None, hidden.dtype):
        return False  # the accumulator becomes the gradient, or chunks are smaller
    hidden_size = hidden.shape[-1]
    rows = hidden.numel() // max(hidden_size, 1) if num_valid is None else num_valid
    accumulator = accumulator_dtype(hidden.dtype, accum_dtype).itemsize
    fits: Any = rows * hidden.dtype.itemsize * (1 - LOGITS_SHARE) <= accumulator * hidden_size
    if chunk_tokens is not None:
        fits = chunk_tokens >= rows
    if isinstance(fits, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(fits)
    return bool(fits)


def weight_gradient(
    product: Product,
    grad_output: Tensor,
    grad_logits: Tensor,
    hidden: Tensor,
    target: Tensor,
    unit: Tensor,
    *,
    num_valid: int | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """The gradient of the weight from that of the logits for ``grad_output = 1``, which :func:`run_chunks` kept: (V, H) in the
    dtype of hidden. With ``main_grad`` it is added to that, which is returned.

    unit: what the logits' gradient is measured in, for fp16.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    h, _ = hidden_rows(flat, target, rows_to_score(target, num_valid))
    vocab, (_, hidden_size), on_cuda = grad_logits.shape[1], h.shape, h.is_cuda
    factor = grad_output * unit if hidden.dtype == torch.float16 else grad_output
    out = h.new_empty((vocab, hidden_size)) if main_grad is None else main_grad
    if not len(h):
        return out.zero_() if main_grad is None else out
    add = main_grad is not None
    if product.weight_gradient_(out, grad_logits, h, factor, add):
        return out
    columns = max(BLOCK_BYTES // (4 * hidden_size + 1) // BLOCK_MULTIPLE, 1) * BLOCK_MULTIPLE
    if not on_cuda:
        h, columns = h.float(), max(-(-vocab // CPU_BLOCKS), 1)
    for block in column_blocks(vocab, columns):
        g = grad_logits[:, block]
        weight_gradient_(out[block], g if on_cuda else g.float(), h, factor, add)
    return out


def losses_and_gradients(
    ops: SimpleNamespace,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    maths: dict[str, Any],
    wanted: Wanted,
    *,
    with_stats: bool = False,
    **chunks: Any,
) -> tuple[Chunked, Tensor | None]:
    """:func:`run_chunks` with the cross-entropy kernel, and the unit of its gradients (None: 1)."""
    if maths["class_weight"] is not None:
        maths = {**maths, "class_weight": maths["class_weight"].to(maths_dtype(hidden))}  # once, not in every chunk
    kernel = ops.loss_and_gradient_ if any(wanted) else ops.loss
    stats = {"with_stats": True} if with_stats else {}
    product: Product | None = ops.product if ops.product.fits(hidden, weight) else None
    # Its losses are of fp32 logits and of all classes, and come without gradients.
    by_product = product is not None and not ops.is_shard and chunks.get("logits_dtype") == torch.float32
    if any(wanted) or with_stats or maths["label_smoothing"] or maths["z_loss"]:
        by_product = False
    bias = None if bias is None else bias.contiguous()

    def chunk_loss(logits: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        # Where all classes of a mean weigh nothing, a row counts, and its scale is 0. The kernel does not read rows of weight 0.
        nothing = None if maths["class_weight"] is None else (y >= 0) & (s == 0)
        weight = s if nothing is None else s.masked_fill(nothing, 1)
        loss, *found = kernel(logits, y, reduction="none", ignore_index=IGNORED, token_weight=weight, **maths, **stats)
        if nothing is not None:
            loss = loss * ~nothing
            if any(wanted):
                logits.masked_fill_(nothing[:, None], 0)
        return (loss, *found[-4:-2]) if with_stats else (loss,)

    def chunk_loss_fp64(logits: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:  # the kernel's token weights are fp32
        loss, *found = kernel(logits, y, reduction="none", ignore_index=IGNORED, **maths, **stats)
        s = s.masked_fill(y < 0, 0)
        logits *= s[:, None]
        return (loss * s, *found[-4:-2]) if with_stats else (loss * s,)

    def product_loss(h: Tensor, y: Tensor, s: Tensor) -> Tensor:
        if maths["class_weight"] is not None:
            s = s * maths["class_weight"][y.clamp(min=0)]
        log_prob = cast(Product, product).statistics(h, weight, bias, y, maths["logit_scale"], maths["softcap"], False)[0]
        return torch.where(y >= 0, -log_prob * s, 0).masked_fill_(y == BAD_LABEL, torch.nan)

    unit = _unit(target, scale, maths) if any(wanted) and hidden.dtype == torch.float16 else None
    result = run_chunks(
        chunk_loss_fp64 if hidden.dtype == torch.float64 else chunk_loss,
        hidden,
        weight,
        bias,
        target,
        scale if unit is None else scale / unit,
        wanted,
        with_stats=with_stats,
        product=product,
        product_loss=product_loss if by_product else None,
        **chunks,
    )
    if unit is not None:
        losses, *others = result.rows
        result = result._replace(rows=(losses * unit, *others))
    return result, unit


def _unit(target: Tensor, scale: Tensor, maths: dict[str, Any]) -> Tensor:
    """:func:`.lm_head.unit_of` the largest gradient, whatever the loss is divided by."""
    if not target.numel():
        return scale.new_ones(())
    largest = scale.abs().masked_fill(target < 0, 0).amax() * max(maths["logit_scale"], 1.0)
    if maths["class_weight"] is not None:
        largest = largest * maths["class_weight"].amax().clamp(min=1)
    return unit_of(largest)
